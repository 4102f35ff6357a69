"""Parameters that several workers hold: one initial value, one gradient sum per step."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pipeengine.distributed.failure import start
from pipeengine.distributed.groups import GroupMaker
from pipeengine.distributed.waiting import Waiter, give_up
from pipeengine.errors import WorkerError


@dataclass(frozen=True)
class Tie:
    """A parameter or buffer on several workers, ``workers`` in order; the first one owns it."""

    name: str
    workers: tuple[int, ...]
    trained: bool


class NoTies:
    """Nothing is shared: one process, where aliases are one tensor. What is shared overrides what it needs."""

    messages, bytes = 0, 0
    spans: Sequence[tuple[int, float, float]] = ()
    """Stage, start and end, in seconds of ``perf_counter``, of each sum of the last step that ran behind others."""

    def begin(self) -> None:
        """Nothing to set aside."""

    def start(self, stage: int) -> None:
        """Nothing to begin: the gradients of ``stage`` are summed by ``reduce``, if at all."""

    def reduce(self) -> None:
        """Nothing to sum."""

    def gather(self) -> None:
        """Nothing to make whole."""

    def release(self) -> None:
        """Nothing to leave in shards."""

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, the model's tensors have their whole shapes, as they have anyway."""
        yield

    def collect(self, tensor: torch.Tensor, owner: int) -> torch.Tensor | None:
        """``tensor`` whole on the worker ``owner``, as it is anyway."""
        return tensor.detach()

    def restore(self) -> None:
        """Nothing was set aside."""

    def is_stale(self) -> bool:
        """Whether a copy waits for new values: never where every holder updates its own."""
        return False

    def refresh(self) -> None:
        """No new values to fetch."""

    def verify(self) -> None:
        """Nothing can differ."""

    def close(self) -> None:
        """Nothing to give up."""


class TiedParameters(NoTies):
    """Keeps the copies of shared parameters equal.

    Gradients of this step are summed among the holders; what earlier steps have accumulated is already a sum and stays
    out of it. ``tensors`` are this worker's copies by name.
    """

    def __init__(self, ties: Sequence[Tie], tensors: Mapping[str, torch.Tensor], worker: int, ranks: Sequence[int],
                 backend: str, groups: GroupMaker, waiter: Waiter):
        self._ties, self._tensors, self._worker, self._ranks = tuple(ties), dict(tensors), worker, tuple(ranks)
        self._waiter = waiter
        self._groups = {workers: groups.make([ranks[w] for w in workers], backend, "ties")
                        for workers in sorted({tie.workers for tie in ties}) if worker in workers}
        self._before: dict[str, torch.Tensor | None] = {}
        self.messages, self.bytes = 0, 0

    def _own(self) -> list[Tie]:
        return [tie for tie in self._ties if self._worker in tie.workers]

    def _wait(self, work: dist.Work) -> None:
        try:
            self._waiter.wait(work)
        finally:
            del work

    def _broadcast(self, tensor: torch.Tensor, tie: Tie) -> None:
        owner = self._ranks[tie.workers[0]]
        self._wait(start(dist.broadcast, tensor, owner, group=self._groups[tie.workers], async_op=True))

    def equalise(self) -> None:
        """Give every copy the value that the first holder has."""
        for tie in self._own():
            with torch.no_grad():
                value = self._tensors[tie.name].detach()
                sent = value if value.is_contiguous() else value.contiguous()
                self._broadcast(sent, tie)
                if sent is not value:
                    value.copy_(sent)

    def begin(self) -> None:
        """Set aside what earlier steps have accumulated."""
        for tie in self._own():
            if tie.trained:
                parameter = self._tensors[tie.name]
                self._before[tie.name], parameter.grad = parameter.grad, None

    def reduce(self) -> None:
        """Sum this step's gradients among the holders and add them to what was set aside."""
        for tie in self._own():
            if not tie.trained:
                continue
            parameter = self._tensors[tie.name]
            used = parameter.grad is not None
            gradient = parameter.grad if used else torch.zeros_like(parameter)
            gradient = gradient.to_dense() if gradient.is_sparse else gradient.contiguous()
            self._wait(start(dist.all_reduce, gradient, group=self._groups[tie.workers], async_op=True))
            self.messages += 1
            self.bytes += gradient.numel() * gradient.element_size()
            before = self._before.pop(tie.name, None)
            parameter.grad = gradient if before is None else before.add_(gradient)

    def restore(self) -> None:
        """After a step that failed: gradients as they were before it."""
        for name, before in self._before.items():
            self._tensors[name].grad = before
        self._before.clear()

    def verify(self) -> None:
        """Raise ``WorkerError`` unless every copy holds the same bits."""
        for tie in self._own():
            value = self._tensors[tie.name].detach().contiguous()
            first = value.clone()
            self._broadcast(first, tie)
            if not torch.equal(first, value):
                worst = (first.double() - value.double()).abs().max().item()
                raise WorkerError(
                    f"the copies of {tie.name} on workers {tie.workers[0]} and {self._worker} differ by up to "
                    f"{worst:.3g}; was one of them changed outside the optimizer?"
                )

    def close(self) -> None:
        """Give the groups up."""
        self._before.clear()
        groups = list(self._groups.values())
        self._groups.clear()
        give_up(groups)
