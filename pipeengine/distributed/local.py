"""Hand values over inside one process, or nowhere (to measure the engine alone)."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch

from pipeengine.program import Message
from pipeengine.stages import Layout, unpack

Receipts = Mapping[Message, tuple[Message, ...]]


class Transport(Protocol):
    """Carries the values of a boundary from the worker of one stage to that of another, per micro-batch.

    ``kind`` is ``ACTIVATION`` (from ``source`` to ``target``) or ``GRADIENT`` (back); ``layout`` says which tensors.
    """

    messages: int
    bytes: int

    def begin(self, step: int, digest: int, receipts: Receipts) -> None:
        """A new step: everything sent from now on belongs to it. ``receipts``: what each message to come proves."""

    def irecv(self, kind: int, source: int, target: int, microbatch: int, layout: Layout) -> None:
        """Make room for a message, so that it can arrive while this worker computes."""

    def send(self, kind: int, source: int, target: int, microbatch: int, tensors: list[torch.Tensor],
             layout: Layout) -> None:
        """Start sending ``tensors``; returns before they have arrived."""

    def recv(self, kind: int, source: int, target: int, microbatch: int, layout: Layout) -> list[torch.Tensor]:
        """The tensors of a message; waits until it is here."""

    def own_memory(self) -> AbstractContextManager[None]:
        """Inside, what a receiver is given has memory of its own, so that what is counted there is its."""

    def finish(self) -> None:
        """Wait until everything sent has been received."""

    def close(self) -> None:
        """Give the connections up."""


class LocalTransport:
    """All stages in one process: values are handed over as they are."""

    def __init__(self) -> None:
        self._held: dict[tuple, list[torch.Tensor]] = {}
        self._copies = False
        self.messages = 0
        self.bytes = 0

    def begin(self, step: int, digest: int, receipts: Receipts) -> None:
        """A new step: what an earlier one left behind is dropped."""
        self._held.clear()

    def irecv(self, kind: int, source: int, target: int, microbatch: int, layout: Layout) -> None:
        """Nothing to prepare: nothing travels."""

    def send(self, kind: int, source: int, target: int, microbatch: int, tensors: list[torch.Tensor],
             layout: Layout) -> None:
        """Hold the tensors, as they are, for ``recv``."""
        self._held[kind, source, target, microbatch] = tensors

    def recv(self, kind: int, source: int, target: int, microbatch: int, layout: Layout) -> list[torch.Tensor]:
        """The very tensors that ``send`` was given; inside ``own_memory`` equal ones."""
        found = self._held.pop((kind, source, target, microbatch))
        return [tensor.clone() for tensor in found] if self._copies else found

    @contextmanager
    def own_memory(self) -> Iterator[None]:
        """Inside, a receiver gets copies, as another worker would."""
        self._copies = True
        try:
            yield
        finally:
            self._copies = False

    def finish(self) -> None:
        """Nothing is on its way."""

    def close(self) -> None:
        """Drop what nobody asked for."""
        self._held.clear()


class NullTransport(LocalTransport):
    """Sends nothing and receives zeros: what remains is the time of the engine itself."""

    def __init__(self) -> None:
        super().__init__()
        self._zeros: dict[int, list[torch.Tensor]] = {}

    def send(self, kind: int, source: int, target: int, microbatch: int, tensors: list[torch.Tensor],
             layout: Layout) -> None:
        """Send nothing."""

    def recv(self, kind: int, source: int, target: int, microbatch: int, layout: Layout) -> list[torch.Tensor]:
        """Zeros of the right shapes."""
        found = self._zeros.get(id(layout))
        if found is None:
            found = self._zeros[id(layout)] = unpack(torch.zeros(layout.bytes, dtype=torch.uint8), layout)
        return [tensor.detach() for tensor in found]
