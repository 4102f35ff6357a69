"""Tensors of which each replica holds some rows: the one place that knows torch's ``DTensor``.

Importing it takes a second, so nothing does before there is one.
"""
from __future__ import annotations

import sys

import torch

from pipeengine.errors import InputError


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is a ``DTensor``: of its whole shape, with a part of the values."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """The values that this process has of ``tensor``, in the same memory: all of a plain one."""
    return tensor.to_local() if is_sharded(tensor) else tensor      # type: ignore[attr-defined]


def rows_of(num_rows: int, num_members: int, member: int) -> tuple[int, int]:
    """The first row of ``member`` and the one after its last, as ``torch.chunk`` deals them; the last members may have
    none."""
    each = -(-num_rows // num_members)
    return min(member * each, num_rows), min((member + 1) * each, num_rows)


def own_rows(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The rows of a whole ``tensor`` that this process has of the sharded ``like``, which has the same shape."""
    mesh = like.device_mesh             # type: ignore[attr-defined]
    low, high = rows_of(like.shape[0], mesh.size(), mesh.get_local_rank())
    return tensor[low:high]


def put_whole(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Copy ``value``, whole or sharded alike, into ``tensor``."""
    if is_sharded(tensor):
        value = own_part(value) if is_sharded(value) else own_rows(value, tensor)
        torch.autograd.graph.increment_version(tensor)      # who looks whether it has changed looks at the whole
    own_part(tensor).copy_(value)


def shard_like(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The rows ``values`` of this process as a tensor that is sharded as ``like`` is, and has its shape."""
    from torch.distributed.tensor import DTensor
    return DTensor.from_local(values, like.device_mesh, like.placements, run_check=False,     # type: ignore
                              shape=like.shape, stride=like.stride())


def check_rows(what: str, tensor: torch.Tensor) -> None:
    """Raise ``InputError``, which names ``what``, unless a sharded ``tensor`` is dealt by rows over one dimension."""
    placements = tensor.placements      # type: ignore[attr-defined]
    if len(placements) != 1 or not placements[0].is_shard(0):
        raise InputError(f"{what} is laid out as {placements}; only tensors that are dealt by rows can be put together "
                         "again")
