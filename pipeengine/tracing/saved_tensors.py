"""What autograd keeps for backward while a node runs, and whether somebody recomputes it instead."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from pipeengine.torch_private import (
    pop_saved_tensor_hooks,
    push_saved_tensor_hooks,
    storage_number,
    top_saved_tensor_hooks,
)
from pipeengine.tracing.meter import kept_bytes
from pipeengine.tracing.value_table import ValueTable


class SavedTensors:
    """Counts, by hooks on saved tensors, the bytes that each node keeps; parameters and buffers are kept anyway."""

    def __init__(self, values: ValueTable):
        self._values = values
        self._bytes: dict[int, int] = {}                # storage -> bytes
        self._in_reentrant = False
        self._pack_hook = self._pack                    # one object, to be known again by identity

    def start(self) -> None:
        """A new node begins."""
        self._bytes = {}

    def only(self, kept: list[torch.Tensor]) -> None:
        """The node keeps ``kept`` and makes the rest again in backward."""
        self._bytes = {storage_number(tensor): kept_bytes(tensor) for tensor in kept}

    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(storage, bytes) of what the node keeps."""
        return tuple(self._bytes.items())

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = storage_number(tensor)
        if storage not in self._values.attribute_storages:
            self._bytes[storage] = kept_bytes(tensor)
        # A step that saves its own output would hold itself alive for ever through it.
        return tensor if self._values.knows(tensor) else tensor.detach()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Count what is saved inside."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack_hook, _unpack):
            yield

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Without the innermost hooks inside: function transforms do not work under them."""
        hooks = top_saved_tensor_hooks(True)
        pop_saved_tensor_hooks()
        try:
            yield
        finally:
            push_saved_tensor_hooks(*hooks)

    @contextlib.contextmanager
    def reentrant(self) -> Iterator[None]:
        """Inside runs the function of a re-entrant checkpoint."""
        self._in_reentrant = True
        try:
            yield
        finally:
            self._in_reentrant = False

    @property
    def recomputing(self) -> bool:
        """Whether what runs now is checkpointed: made again in backward."""
        pack = self._foreign_pack()
        return self._in_reentrant or (pack is not None and _is_checkpoint(pack))

    @property
    def foreign_hooks(self) -> bool:
        """Whether the user's own hooks on saved tensors are active, other than a checkpoint's."""
        pack = self._foreign_pack()
        return pack is not None and not _is_checkpoint(pack)

    def _foreign_pack(self) -> Callable | None:
        hooks = top_saved_tensor_hooks(True)
        return None if hooks is None or hooks[0] is self._pack_hook else hooks[0]


def _unpack(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _is_checkpoint(pack: Callable) -> bool:
    return "checkpoint" in getattr(pack, "__qualname__", "").lower()
