"""One way down and back: a batch goes in, runs on every worker, and comes back as a loss.

What changes from step to step lives here and nowhere else: the numbers of steps and calls, the last loss, and whether
the pipeline is still open.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar

import torch

from pipeengine.distributed import NoTies, TiedParameters, Transport, Workers, headline
from pipeengine.errors import InputError, WorkerError
from pipeengine.runtime.executor import Executor
from pipeengine.runtime.outputs import merge_outputs
from pipeengine.runtime.programs import ProgramCache
from pipeengine.runtime.tasks import Prepared, TaskMaker
from pipeengine.stages import Specialization
from pipeengine.tracing import Inputs, fill, tensors

_ACTIONS = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient",
            "SA": "sending an activation", "RA": "receiving an activation",
            "SG": "sending a gradient", "RG": "receiving a gradient"}
T = TypeVar("T")
_FACTS = ("the number of calls", "the batch",
          "what the forward or the loss reads from Python (attributes, configs, globals, closures), which every worker "
          "must set alike", "the recorded model")


@dataclass
class Progress:
    """What changes from step to step. ``closed`` says why, once the pipeline is; ``microbatches`` are the last
    step's."""

    microbatches: int
    step: int = 0
    calls: int = 0
    loss: torch.Tensor | None = None
    trained_loss: torch.Tensor | None = None
    closed: str | None = None

    def counters(self) -> dict[str, int]:
        """The numbers that random numbers are keyed by: part of the state of a training."""
        return {"step": self.step, "calls": self.calls}

    def set_counters(self, counters: Mapping[str, int]) -> None:
        """Go on from such numbers; every worker is given the same."""
        self.step, self.calls = int(counters["step"]), int(counters["calls"])


class StepRunner:
    """Runs steps and evaluations; a failure becomes the same error on every worker and closes the pipeline."""

    def __init__(self, tasks: TaskMaker, programs: ProgramCache, executor: Executor, transport: Transport,
                 ties: TiedParameters | NoTies, workers: Workers, worker_of: tuple[int, ...], num_microbatches: int):
        self._tasks, self._programs, self.executor, self.transport = tasks, programs, executor, transport
        self.ties, self._workers, self._worker_of = ties, workers, worker_of
        self.progress = Progress(num_microbatches)

    def step(self, inputs: Inputs) -> torch.Tensor | None:
        """Forward and backward of a whole batch; returns its loss, detached, on every worker."""
        prepared = self._prepare(inputs, training=True)
        with torch.enable_grad():
            self.guarded(lambda: self._train(prepared))
        return self.progress.loss

    def evaluate(self, inputs: Inputs, gather: bool) -> object:
        """Forward only; the model's output for the whole batch on the worker of the last stage, or everywhere."""
        with torch.no_grad():
            prepared = self._prepare(inputs, training=False)
            return self.guarded(lambda: self._evaluate(prepared, gather))

    def _prepare(self, inputs: Inputs, *, training: bool) -> Prepared:
        """The batch made ready on this worker, once all workers agree that theirs is the same."""
        self.check_open()
        progress = self.progress
        progress.calls += 1
        problem, prepared = None, None
        try:
            prepared = self._tasks.prepare(inputs, training=training, step=progress.step, call=progress.calls)
        except InputError as error:
            problem = error
        except Exception as error:
            problem = InputError(f"this batch cannot be used: {type(error).__name__}: {error}")
            problem.__cause__ = error
        facts = (progress.calls, prepared.digest, prepared.python, prepared.recorded) if prepared else \
            (progress.calls, 0, 0, 0)
        self.guarded(lambda: self._workers.agree(facts, problem, _FACTS), harmless=InputError)
        assert prepared is not None, "a problem of one worker is raised on all"
        return prepared

    def _train(self, prepared: Prepared) -> None:
        progress, tasks = self.progress, prepared.tasks
        actions = self._programs.actions(len(tasks), prepared.edges, training=True)
        self.ties.begin()
        self.transport.begin(progress.calls, prepared.digest)
        start = perf_counter()
        self.executor.run(actions, tasks)
        self._tasks.specializations.ran()
        self.ties.reduce()
        if progress.step < 3 or progress.step % 10 == 0:
            self._publish(start)
        progress.loss = progress.trained_loss = self._spread_loss(prepared.specializations[0], self.executor.loss)
        progress.step += 1

    def _evaluate(self, prepared: Prepared, gather: bool) -> object:
        tasks, first = prepared.tasks, prepared.specializations[0]
        self.transport.begin(self.progress.calls, prepared.digest)
        self.executor.run(self._programs.actions(len(tasks), prepared.edges, training=False), tasks)
        self._tasks.specializations.ran()
        loss = self.progress.loss = self._spread_loss(first, self.executor.loss)
        last = self._worker_of[first.split.output_stage]
        outputs = [self.executor.outputs.get(m) for m in range(len(tasks))]
        merged = merge_outputs(prepared.specializations, outputs if self._workers.rank == last else None, tasks, loss)
        return self._share(merged, first, last) if gather else merged

    def _share(self, merged: object, specialization: Specialization, last: int) -> object:
        """The output of worker ``last`` everywhere: its tensors travel, every worker's own recording gives it form."""
        own = tensors(merged) if self._workers.rank == last else []
        arrived = self._workers.broadcast_object(own, last)
        if self._workers.rank == last:
            return merged
        values = iter(arrived)
        device = self._tasks.reader.device
        return fill(specialization.recording.output, lambda _: next(values).to(device))

    def _spread_loss(self, specialization: Specialization, own: torch.Tensor | None) -> torch.Tensor | None:
        """The loss of the worker that has it, on every worker."""
        value = specialization.recording.loss
        if value is None or specialization.split.loss_stage is None:
            return None
        spec = specialization.recording.values[value].spec
        loss = own if own is not None else \
            torch.zeros(spec.shape, dtype=spec.dtype, device=self._tasks.reader.device)
        return self._workers.broadcast(loss, self._worker_of[specialization.split.loss_stage])

    def _publish(self, start: float) -> None:
        records = [(op, stage, microbatch, round(begin - start, 7), round(end - start, 7))
                   for op, stage, microbatch, begin, end in self.executor.records]
        self.progress.microbatches = 1 + max((record[2] for record in records),
                                             default=self.progress.microbatches - 1)
        self._workers.publish(json.dumps({"step": self.progress.step, "records": records}))

    def guarded(self, what: Callable[[], T], harmless: type[BaseException] | tuple[type[BaseException], ...] = ()) -> T:
        """Run something that talks to other workers; a failure becomes the same error on every worker."""
        try:
            return what()
        except harmless:
            raise
        except BaseException as error:
            failure = self._workers.fail(error, f"in step {self.progress.step}{self._where()}")
            self.ties.restore()
            self.give_up(headline(failure))
            if failure is error:
                raise
            raise failure from (error if not isinstance(error, WorkerError) else None)

    def _where(self) -> str:
        """The action that this worker was at, as text."""
        if not self.executor.position:
            return ""
        op, stage, microbatch, _ = self.executor.position
        return f", stage {stage}, {_ACTIONS[op]} of micro-batch {microbatch}"

    def check_open(self) -> None:
        """Raise ``WorkerError`` where the pipeline is closed."""
        if self.progress.closed is not None:
            raise WorkerError(f"the pipeline is closed ({self.progress.closed}); make a new Pipeline")

    def close(self) -> None:
        """Give up the connections once every worker is here."""
        if self.progress.closed is None:
            self.guarded(lambda: self._workers.all_gather_object(None))     # nobody leaves while another is at work
            self.give_up("closed by its owner")

    def give_up(self, why: str) -> None:
        """Give up the connections, wherever the others are."""
        self.progress.closed = why
        for part in (self.transport, self.ties, self._workers):
            part.close()
