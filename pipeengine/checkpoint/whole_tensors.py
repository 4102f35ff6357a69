"""Whole tensors from the rows that replicas hold: each is put together on the one worker that writes it."""
from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from pipeengine.distributed import check_rows, is_sharded, own_rows, shard_like
from pipeengine.errors import InputError

Collect = Callable[[torch.Tensor, int], torch.Tensor | None]
"""A sharded tensor whole on a worker, None on the others; all that hold rows of it call it alike."""


def as_it_is(tensor: torch.Tensor, owner: int) -> torch.Tensor:
    """Where nothing is sharded: the tensor."""
    return tensor.detach()


def make_whole(tensors: Mapping[str, torch.Tensor], owner: Callable[[str], int], collect: Collect
               ) -> dict[str, torch.Tensor]:
    """``tensors``, with the sharded ones whole on their ``owner`` and left out elsewhere, in the order of names."""
    found = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        whole = collect(tensor, owner(name)) if is_sharded(tensor) else tensor.detach()
        if whole is not None:
            found[name] = whole
    return found


def check_state(part: str, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ``InputError`` for state of a sharded parameter that cannot be put together: of rows, or a single number,
    all must be."""
    for key, tensor in tensors.items():
        if is_sharded(tensor):
            check_rows(f"{key} of {part}", tensor)
        elif tensor.dim():
            raise InputError(f"{part} keeps {key} of shape {tuple(tensor.shape)} for rows of {name} alone, which other "
                             "workers could not read; take an optimizer that works element by element, such as AdamW")


def rows_for(parameter: torch.Tensor, value: torch.Tensor, what: str) -> torch.Tensor:
    """A state of ``parameter`` that was read whole, sharded as the parameter is. Raises ``InputError``, which names
    ``what``, for another shape."""
    if not is_sharded(parameter) or not value.dim():
        return value
    if value.shape != parameter.shape:
        raise InputError(f"{what} is of shape {tuple(value.shape)}, its parameter of {tuple(parameter.shape)}, so that "
                         "nothing tells which of it belongs to which rows; train without shards")
    return shard_like(own_rows(value, parameter).to(parameter.device, copy=True), parameter)
