"""Parameters that several workers hold: one initial value, one gradient sum per step."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pipeengine.distributed.waiting import Waiter, give_up
from pipeengine.errors import WorkerError


@dataclass(frozen=True)
class Shared:
    """A parameter or buffer on several workers; ``workers`` in order, the first one owns it."""

    name: str
    workers: tuple[int, ...]
    trained: bool


class SharedParameters:
    """Keeps the copies of shared parameters equal.

    Gradients of this step are summed among the holders; what earlier steps have accumulated is already a sum and stays
    out of it.
    """

    def __init__(self, shared: Sequence[Shared], tensors: Mapping[str, torch.Tensor], worker: int, ranks: Sequence[int],
                 backend: str, timeout, waiter: Waiter):
        self._shared, self._tensors, self._worker, self._ranks = tuple(shared), dict(tensors), worker, tuple(ranks)
        self._waiter = waiter
        self._groups = {workers: dist.new_group([ranks[w] for w in workers], backend=backend, timeout=timeout)
                        for workers in sorted({entry.workers for entry in shared})}
        self._before: dict[str, torch.Tensor | None] = {}
        self.messages, self.bytes = 0, 0

    def _own(self) -> list[Shared]:
        return [entry for entry in self._shared if self._worker in entry.workers]

    def _wait(self, work: dist.Work) -> None:
        try:
            self._waiter.wait(work)
        finally:
            del work

    def equalise(self) -> None:
        """Give every copy the value that the first holder has."""
        for entry in self._own():
            with torch.no_grad():
                value = self._tensors[entry.name].detach()
                sent = value if value.is_contiguous() else value.contiguous()
                self._wait(dist.broadcast(sent, self._ranks[entry.workers[0]], group=self._groups[entry.workers], async_op=True))
                if sent is not value:
                    value.copy_(sent)

    def begin(self) -> None:
        """Set aside what earlier steps have accumulated."""
        for entry in self._own():
            if entry.trained:
                parameter = self._tensors[entry.name]
                self._before[entry.name], parameter.grad = parameter.grad, None

    def reduce(self, is_shared: Callable[[str], bool] = lambda name: True) -> None:
        """Sum this step's gradients among the holders and add them to what was set aside."""
        for entry in self._own():
            if not entry.trained:
                continue
            parameter = self._tensors[entry.name]
            used = parameter.grad is not None
            gradient = parameter.grad if used else torch.zeros_like(parameter)
            gradient = gradient.to_dense() if gradient.is_sparse else gradient.contiguous()
            self._wait(dist.all_reduce(gradient, group=self._groups[entry.workers], async_op=True))
            self.messages += 1
            self.bytes += gradient.numel() * gradient.element_size()
            before = self._before.pop(entry.name, None)
            parameter.grad = gradient if before is None else before.add_(gradient)

    def restore(self) -> None:
        """After a step that failed: gradients as they were before it."""
        for name, before in self._before.items():
            self._tensors[name].grad = before
        self._before.clear()

    def verify(self) -> None:
        """Raise ``WorkerError`` unless every copy holds the same bits."""
        for entry in self._own():
            value = self._tensors[entry.name].detach().contiguous()
            first = value.clone()
            self._wait(dist.broadcast(first, self._ranks[entry.workers[0]], group=self._groups[entry.workers], async_op=True))
            if not torch.equal(first, value):
                worst = (first.double() - value.double()).abs().max().item()
                raise WorkerError(f"the copies of {entry.name} on workers {entry.workers[0]} and {self._worker} differ by up to "
                                  f"{worst:.3g}; was one of them changed outside the optimizer?")

    def close(self) -> None:
        self._before.clear()
        groups = list(self._groups.values())
        self._groups.clear()
        while groups:
            give_up(groups.pop())
