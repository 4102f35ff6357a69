"""Run a program on one worker: the only place that acts on the order of a schedule."""
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from pipeengine.autograd import Queue
from pipeengine.autograd import run as run_deferred
from pipeengine.distributed import Transport, Unwatched
from pipeengine.rng import RngStreams
from pipeengine.runtime.clock import HOST, Clock
from pipeengine.stages import ACTIVATION, GRADIENT, Runnable
from pipeengine.torch_private import engine_run_backward, profiler_enabled


@dataclass(frozen=True)
class Task:
    """One micro-batch: its tensors, the runnable of each own stage, its weight, the key of its random numbers, its
    ``rows``."""

    inputs: Sequence[torch.Tensor]
    stages: dict[int, Runnable]
    weight: float
    key: int | None
    rows: int = 1


class Executor:
    """Runs the actions of one worker; ``start_sum(stage)`` begins to sum a stage's gradients among replicas.

    ``records`` holds (op, stage, microbatch, start, end) of the last step, as marks of its clock.
    """

    def __init__(self, transport: Transport, rng: RngStreams, activity: Unwatched | None = None,
                 start_sum: Callable[[int], None] = lambda stage: None):
        self._transport, self._rng, self._start_sum = transport, rng, start_sum
        self.activity = activity or Unwatched()
        self._do = {"F": self._forward, "B": self._backward, "I": self._input_gradient, "W": self._weight_gradient,
                    "SA": self._send_activation, "RA": self._post_activation,
                    "SG": self._send_gradient, "RG": self._post_gradient, "R": self._reduce}
        self.records: list[tuple[str, int, int, Any, Any]] = []
        self.position: tuple = ()
        self._mark = HOST.mark

    def run(self, actions: Sequence[tuple], tasks: Sequence[Task], scale: torch.Tensor | None = None,
            clock: Clock = HOST) -> None:
        """Do ``actions`` in order for the micro-batches ``tasks``; gradients are those of the loss times ``scale``.
        Afterwards ``loss`` (as it is) and ``outputs`` are set."""
        self._tasks, self._scale, self._mark = tasks, scale, clock.mark
        self._ready: dict[tuple, list] = {}         # what a send will carry
        self._saved: dict[tuple[int, int], tuple] = {}
        self._waiting: dict[tuple[int, int], Queue] = {}     # weight gradients that were put off
        self._seeds: dict[tuple, torch.Tensor] = {}
        self._training = torch.is_grad_enabled()
        self.loss: torch.Tensor | None = None
        self.outputs: dict[int, list] = {}
        self.records.clear()
        do, at = self._do if not profiler_enabled() else self._marked(), self.activity.at
        try:
            for action in actions:
                self.position = action
                op, stage, microbatch, peer = action
                at(op, stage, microbatch)
                do[op](stage, microbatch, peer)
            self._transport.finish()
            self.position = ()
        finally:
            self._saved.clear()
            self._waiting.clear()
            self._ready.clear()
            self._seeds.clear()
            self._tasks = ()

    def _marked(self) -> dict[str, Callable[[int, int, int], None]]:
        """What to do, each inside a range by which torch.profiler tells stages apart, waiting included."""
        def marked(op: str, do: Callable[[int, int, int], None]) -> Callable[[int, int, int], None]:
            def run(stage: int, microbatch: int, peer: int) -> None:
                number = str(microbatch) if microbatch >= 0 else ""
                with record_function(f"stage {stage}: {op}{number}" + (f" with stage {peer}" if peer >= 0 else "")):
                    do(stage, microbatch, peer)
            return run
        return {op: marked(op, do) for op, do in self._do.items()}

    # -- computing --------------------------------------------------------------------------------------------------

    def _forward(self, stage: int, microbatch: int, peer: int) -> None:
        task = self._tasks[microbatch]
        runnable = task.stages[stage]
        received: list[torch.Tensor] = []
        for boundary in runnable.receives:
            if boundary.layout.slots:
                received += self._transport.recv(
                    ACTIVATION, boundary.source, boundary.target, microbatch, boundary.layout
                )
        start = self._mark()
        if self._training:
            for tensor, wants in zip(received, runnable.wants):
                if wants:
                    tensor.requires_grad_()
        inputs = task.inputs
        if runnable.deferral is not None:
            self._waiting[stage, microbatch] = runnable.deferral.begin()
        results = self._run(runnable, task.key, [inputs[i] for i in runnable.inputs], received)
        for boundary in runnable.sends:
            if boundary.positions:
                self._ready[ACTIVATION, boundary.source, boundary.target, microbatch] = \
                    [results[i].detach() for i in boundary.positions], boundary
        loss = None if runnable.loss is None else results[runnable.loss].detach()
        if loss is not None and task.weight:
            share = loss * task.weight
            self.loss = share if self.loss is None else self.loss + share
        if self._training:
            # Only the edges are kept: an output that nobody saved for backward is freed once it is sent.
            roots = [results[i] for i in runnable.roots]
            edges = [get_gradient_edge(root if root.requires_grad else _end_of_path(root)) for root in roots]
            edges += [get_gradient_edge(received[i]) for i in runnable.relays]
            leaves = [tensor if wants else None for tensor, wants in zip(received, runnable.wants)]
            self._saved[stage, microbatch] = edges, leaves, loss
        if runnable.keeps:
            self.outputs[microbatch] = [results[i] for i in runnable.keeps]
        self.records.append(("F", stage, microbatch, start, self._mark()))
        if len(task.stages) > 1:
            self._hand_over(runnable, microbatch)

    def _run(self, runnable: Runnable, key: int | None, inputs: list, received: list) -> tuple:
        """The stage's function, with its random numbers, and again in backward if asked."""
        run = self._with_random(runnable, key) if runnable.random else runnable.run
        if not runnable.recompute:
            return run(*inputs, *received)
        # A recomputed forward draws the same random numbers, since every place in the model has its own stream.
        return checkpoint(run, *inputs, *received, use_reentrant=False, preserve_rng_state=False)

    def _with_random(self, runnable: Runnable, key: int | None) -> Callable:
        def run(*arguments):
            states = self._rng.enter(key)
            try:
                return runnable.run(*arguments)
            finally:
                self._rng.leave(states)
        return run

    def _backward(self, stage: int, microbatch: int, peer: int) -> None:
        self._input_gradient(stage, microbatch, peer, "B")

    def _weight_gradient(self, stage: int, microbatch: int, peer: int) -> None:
        start = self._mark()
        run_deferred(self._waiting.pop((stage, microbatch), deque()))
        self.records.append(("W", stage, microbatch, start, self._mark()))

    def _input_gradient(self, stage: int, microbatch: int, peer: int, op: str = "I") -> None:
        task = self._tasks[microbatch]
        runnable = task.stages[stage]
        edges, leaves, loss = self._saved.pop((stage, microbatch))
        gradients: list[torch.Tensor | None] = [None] * len(edges)
        for boundary in runnable.sends:
            if boundary.gradient_positions:
                arrived = self._transport.recv(
                    GRADIENT, boundary.source, boundary.target, microbatch, boundary.gradient_layout
                )
                for position, gradient in zip(boundary.gradient_positions, arrived):
                    held = gradients[position]
                    gradients[position] = gradient if held is None else held + gradient
        start = self._mark()
        if runnable.loss_root is not None:
            gradients[runnable.loss_root] = self._seed(loss, task.weight)
        if edges:
            # torch.autograd.backward without its checks in Python: the layouts have settled the shapes.
            engine_run_backward(
                tuple(edges), tuple(gradients), False, False, (), allow_unreachable=True, accumulate_grad=True
            )
        for boundary in runnable.receives:
            if boundary.received:
                self._ready[GRADIENT, boundary.source, boundary.target, microbatch] = \
                    [_take_gradient(leaves[i]) for i in boundary.received], boundary
        self.records.append((op, stage, microbatch, start, self._mark()))
        if len(task.stages) > 1:
            self._hand_back(runnable, microbatch)

    def _reduce(self, stage: int, microbatch: int, peer: int) -> None:
        """Let the replicas' gradients of a stage travel; nobody waits here."""
        self._start_sum(stage)

    def _seed(self, loss: torch.Tensor, weight: float) -> torch.Tensor:
        """The gradient of a micro-batch's loss; most micro-batches weigh the same."""
        key = weight, loss.dtype, loss.shape
        seed = self._seeds.get(key)
        if seed is None:
            seed = torch.full_like(loss, weight)
            if self._scale is not None:         # rounded to the loss's type, as backward of the product rounds it
                seed = self._scale.to(loss) * seed
            self._seeds[key] = seed
        return seed

    # -- messages ---------------------------------------------------------------------------------------------------

    def _hand_over(self, runnable: Runnable, microbatch: int) -> None:
        """Give values to stages of this same worker: those have no message in the program."""
        for boundary in runnable.sends:
            if boundary.positions and self._is_here(boundary.source, boundary.target):
                self._send_activation(boundary.source, microbatch, boundary.target)

    def _hand_back(self, runnable: Runnable, microbatch: int) -> None:
        for boundary in runnable.receives:
            if boundary.received and self._is_here(boundary.source, boundary.target):
                self._send_gradient(boundary.target, microbatch, boundary.source)

    def _is_here(self, source: int, target: int) -> bool:
        stages = self._tasks[0].stages
        return source in stages and target in stages

    def _send_activation(self, stage: int, microbatch: int, peer: int) -> None:
        found = self._ready.pop((ACTIVATION, stage, peer, microbatch), None)
        if found is not None:
            self._transport.send(ACTIVATION, stage, peer, microbatch, found[0], found[1].layout)

    def _send_gradient(self, stage: int, microbatch: int, peer: int) -> None:
        found = self._ready.pop((GRADIENT, peer, stage, microbatch), None)
        if found is not None:
            self._transport.send(GRADIENT, peer, stage, microbatch, found[0], found[1].gradient_layout)

    def _post_activation(self, stage: int, microbatch: int, peer: int) -> None:
        for boundary in self._tasks[microbatch].stages[stage].receives:
            if boundary.source == peer and boundary.layout.slots:
                self._transport.irecv(ACTIVATION, peer, stage, microbatch, boundary.layout)

    def _post_gradient(self, stage: int, microbatch: int, peer: int) -> None:
        for boundary in self._tasks[microbatch].stages[stage].sends:
            if boundary.target == peer and boundary.gradient_positions:
                self._transport.irecv(GRADIENT, stage, peer, microbatch, boundary.gradient_layout)


def _end_of_path(value: torch.Tensor) -> torch.Tensor:
    """Takes the gradient of a value that needs none this time (a module that is kept whole skipped its layers)."""
    return value.detach().requires_grad_()


def _take_gradient(leaf: torch.Tensor) -> torch.Tensor:
    gradient = leaf.grad
    leaf.grad = None
    return torch.zeros_like(leaf) if gradient is None else gradient
