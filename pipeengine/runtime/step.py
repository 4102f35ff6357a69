"""One way down and back: a batch goes in, runs on every worker, and comes back as a loss.

What changes from step to step lives here and nowhere else: the numbers of steps and calls, the last loss, and whether
the pipeline is still open.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch

from pipeengine.distributed import ConnectionLost, NoTies, Transport, Workers, headline
from pipeengine.errors import InputError, WorkerError, told
from pipeengine.runtime.clock import HOST, Clock, clock_of
from pipeengine.runtime.executor import Executor
from pipeengine.runtime.gradients import Gradients, scale_of
from pipeengine.runtime.memory_count import MemoryCount, count_memory
from pipeengine.runtime.outputs import join_outputs, shaped, tell_missing
from pipeengine.runtime.parameter_hooks import once_per_batch
from pipeengine.runtime.programs import ProgramCache
from pipeengine.runtime.replica_batches import ReplicaBatches
from pipeengine.runtime.tasks import Facts, Look, Prepared, TaskMaker
from pipeengine.stages import Specialization
from pipeengine.torch_private import profiler_enabled
from pipeengine.tracing import Inputs

_ACTIONS = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient",
            "SA": "sending an activation", "RA": "receiving an activation",
            "SG": "sending a gradient", "RG": "receiving a gradient", "R": "summing gradients"}
T = TypeVar("T")
_FACTS = ("the number of calls", "the modes of the model, autocast or requires_grad", "the batch",
          "what the forward or the loss reads from Python (attributes, configs, globals, closures), which every worker "
          "must set alike", "the recorded model")
_OF_THE_BATCH = _FACTS[0], _FACTS[2]        # the others follow from what is set in Python, and names can be told


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
    amount: tuple[int, str] = (0, "rows")

    def counters(self) -> dict[str, int]:
        """The numbers that random numbers are keyed by: part of the state of a training."""
        return {"step": self.step, "calls": self.calls}

    def set_counters(self, counters: Mapping[str, int]) -> None:
        """Go on from such numbers; every worker is given the same."""
        self.step, self.calls = int(counters["step"]), int(counters["calls"])


class StepRunner:
    """Runs steps and evaluations; a failure becomes the same error on every worker and closes the pipeline."""

    def __init__(self, tasks: TaskMaker, programs: ProgramCache, executor: Executor, transport: Transport,
                 ties: NoTies, workers: Workers, worker_of: tuple[int, ...], num_microbatches: int,
                 gradients: Gradients):
        self._tasks, self._programs, self.executor, self.transport = tasks, programs, executor, transport
        self.ties, self._workers, self._worker_of = ties, workers, worker_of
        self._replicas = ReplicaBatches(tasks, workers) if workers.grid.num_replicas > 1 else None
        self.progress, self._gradients = Progress(num_microbatches), gradients
        self._run_before: set[tuple[str, int, int]] = set()
        self._published: dict[str, object] = {}
        self._told: set[str] = set()
        self.counts_memory = False

    def step(self, inputs: Inputs, scaler: object = None) -> torch.Tensor:
        """Forward and backward of a whole batch; returns its loss, detached, on every worker.

        With ``scaler`` gradients are those of the scaled loss, and finite on all workers or on none.
        """
        scale, problem = (None, None) if scaler is None else \
            attempt(lambda: scale_of(scaler, self._tasks.reader.device))
        # Workers that disagree on the name of a call are told so: the scale is a part of it.
        with self._call("step" if scale is None else f"step with a scale of {float(scale)}"):
            prepared = self._prepare(inputs, True, problem)
            with torch.enable_grad(), self._run("step", prepared):
                self.guarded(lambda: self._train_hooked(prepared, scale))
            if scale is not None:
                self.guarded(self._gradients.spread_overflow, harmless=InputError)
        assert self.progress.loss is not None, "what has no loss is refused before it runs"
        return self.progress.loss

    def clip(self, max_norm: float, norm_type: float) -> torch.Tensor:
        """Scale all gradients to a norm of at most ``max_norm``; returns the norm before, 0-dimensional, the same on
        every worker."""
        total = self.reduction("clip_grad_norm_", lambda: self._gradients.norm(norm_type))
        self._gradients.scale((max_norm / (total + 1e-6)).clamp(max=1.0))
        return total

    def evaluate(self, inputs: Inputs, gather: bool) -> object:
        """Forward only; the model's output for the whole batch on the worker of the last stage, or everywhere."""
        call = "evaluate(gather=True)" if gather else "evaluate"
        with torch.no_grad(), self._call(call):
            prepared = self._prepare(inputs, False)
            with self._run(call, prepared):
                return self.guarded(lambda: self._evaluate(prepared, gather), harmless=InputError)

    def _call(self, name: str, *, takes_long: bool = True) -> AbstractContextManager[None]:
        """Inside, the guard knows that this worker is in this call, and so do the others when they meet it."""
        return self._workers.activity.section(name, self.progress.step, takes_long=takes_long)

    def collective(self, call: str, what: Callable[[], T], harmless: type[BaseException] = InputError) -> T:
        """``what()`` on every worker, once all of them are in the same ``call``; else ``InputError`` on all."""
        self.check_open()
        with self._call(call):
            self.guarded(lambda: self._workers.agree((), None, ()), harmless=InputError)
            return self.guarded(what, harmless=harmless)

    def reduction(self, call: str, what: Callable[[], T]) -> T:
        """The same for what exchanges one number, which travels with the name of the call."""
        self.check_open()
        with self._call(call, takes_long=False):
            return self.guarded(what, harmless=InputError)

    def _run(self, name: str, prepared: Prepared) -> AbstractContextManager[None]:
        """Inside, stages run; what runs for the first time may be compiled, which takes long."""
        kind = name, prepared.recorded, len(prepared.tasks)
        new = kind not in self._run_before
        self._run_before.add(kind)
        return self._call(name, takes_long=new)

    def _prepare(self, inputs: Inputs, training: bool, wrong: InputError | None = None) -> Prepared:
        """The batch made ready on this worker, once all workers agree that theirs is the same and none has anything
        ``wrong``."""
        self.check_open()
        if wrong is not None:
            self.guarded(lambda: self._workers.agree((), wrong, ()), harmless=InputError)
        progress = self.progress
        call = progress.calls + 1
        if self._replicas is not None:
            whole = self._prepare_in_replicas(self._replicas, inputs, training, call)
            progress.calls = call
            return whole
        prepared, problem = attempt(lambda: self._ready(inputs, training, call))
        facts = (call, *(prepared.facts if prepared else Facts()))
        explain = partial(self._explain, prepared.specializations) if prepared else None
        self.guarded(lambda: self._workers.agree(facts, problem, _FACTS, (), explain), harmless=InputError)
        progress.calls = call           # one that was refused everywhere has not happened
        assert prepared is not None, "a problem of one worker is raised on all"
        return prepared

    def _look(self, inputs: Inputs, training: bool, call: int, first: int = 0) -> Look:
        with self.ties.recording():
            return self._tasks.look(inputs, training=training, step=self.progress.step, call=call, first=first,
                                    joined=self._replicas is not None)

    def _ready(self, inputs: Inputs, training: bool, call: int) -> Prepared:
        look = self._look(inputs, training, call)
        return self._tasks.prepare(look, self._tasks.weigh(look))

    def _explain(self, chosen: Sequence[Specialization], fact: str) -> dict[str, str]:
        return {} if fact in _OF_THE_BATCH else self._tasks.set_and_read(chosen)

    def _prepare_in_replicas(self, replicas: ReplicaBatches, inputs: Inputs, training: bool, call: int) -> Prepared:
        """The same for one replica's batch, which is a part of the whole: numbered and weighed in that."""
        firsts = replicas.usual_firsts()
        while True:
            seen, problem = attempt(lambda: replicas.see(self._look(inputs, training, call, firsts[replicas.replica])))
            facts = (call, *(seen.look.facts if seen else Facts()))
            told = replicas.tell(seen, self.ties.is_stale()) if seen else ()
            explain = partial(self._explain, seen.look.chosen) if seen else None
            everybody = self.guarded(partial(self._workers.agree, facts, problem, _FACTS, told, explain),
                                     harmless=InputError)
            assert seen is not None, "a problem of one worker is raised on all"
            known = replicas.read(everybody)
            if known.firsts == firsts:
                break
            firsts = known.firsts           # a short batch: the numbers of its micro-batches were a guess
        with self.ties.recording():
            weights = self.guarded(lambda: replicas.weigh(seen, known), harmless=InputError)
            prepared = self._tasks.prepare(seen.look, weights)
        if known.is_stale:
            self.guarded(self.ties.refresh)
        return replace(prepared, amount=(known.amount, prepared.amount[1]))

    def _train_hooked(self, prepared: Prepared, scale: torch.Tensor | None) -> None:
        with once_per_batch(self._tasks.specializations.hooked_parameters()):
            self._train(prepared, scale)

    def _train(self, prepared: Prepared, scale: torch.Tensor | None) -> None:
        progress, tasks = self.progress, prepared.tasks
        share = self._programs.share(len(tasks), prepared.edges, training=True)
        self.ties.begin()
        self.transport.begin(progress.calls, prepared.digest, share.receipts)
        counts = self.counts_memory and not profiler_enabled()       # which cannot run inside itself
        publishes = progress.step < 3 or progress.step % 10 == 0 or counts
        clock = clock_of(self._tasks.reader.device) if publishes else HOST
        start = clock.begin()
        run = partial(self.executor.run, share.actions, tasks, scale, clock)
        with self.transport.own_memory() if counts else nullcontext():
            counted = count_memory(run, self._tasks.reader.device) if counts else run()
        self.counts_memory = self.counts_memory and not counts
        self._tasks.specializations.ran()
        self.ties.reduce()
        if publishes:
            self._publish(start, clock, counted)
        progress.amount = prepared.amount
        progress.loss = progress.trained_loss = self._spread_loss(prepared.specializations[0], self.executor.loss)
        progress.step += 1

    def _evaluate(self, prepared: Prepared, gather: bool) -> object:
        tasks, first = prepared.tasks, prepared.specializations[0]
        share = self._programs.share(len(tasks), prepared.edges, training=False)
        self.transport.begin(self.progress.calls, prepared.digest, share.receipts)
        self.ties.gather()
        try:
            self.executor.run(share.actions, tasks)
        finally:
            self.ties.release()
        self._tasks.specializations.ran()
        loss = self.progress.loss = self._spread_loss(first, self.executor.loss)
        last = self._workers.grid.worker(self._worker_of[first.split.output_stage])
        # Nobody is at work any more: what cannot be merged is an error on all, and the next call runs.
        merged: Sequence[torch.Tensor] | None
        merged, problem = attempt(lambda: None if self._workers.rank != last else join_outputs(
            first, [self.executor.outputs[m] for m in range(len(tasks))], prepared.joins))
        self._workers.agree((), problem, ())
        if gather and self._replicas is not None:
            merged = self._replicas.gather(merged, prepared, self._worker_of[first.split.output_stage])
        elif gather:
            merged = self._share(merged, last)
        if self._workers.rank == 0:
            tell_missing(first, self._told)
        return shaped(first, merged, loss)

    def _share(self, merged: Sequence[torch.Tensor] | None, last: int) -> Sequence[torch.Tensor]:
        """The outputs of worker ``last`` everywhere; every worker's own recording gives them form."""
        arrived = self._workers.broadcast_object(merged, last)
        device = self._tasks.reader.device
        assert arrived is not None, "that worker has put them together"
        return merged if merged is not None else [tensor.to(device) for tensor in arrived]

    def _spread_loss(self, specialization: Specialization, own: torch.Tensor | None) -> torch.Tensor | None:
        """The loss of the worker that has it, on every worker."""
        value = specialization.recording.loss
        if value is None or specialization.split.loss_stage is None:
            return None
        spec = specialization.recording.values[value].spec
        loss = own if own is not None else \
            torch.zeros(spec.shape, dtype=spec.dtype, device=self._tasks.reader.device)
        if self._replicas is not None:          # each has the share of its own batch, the other workers 0
            return self._workers.all_reduce(loss)
        return self._workers.broadcast(loss, self._worker_of[specialization.split.loss_stage])

    def _publish(self, start: float, clock: Clock, counted: MemoryCount | None) -> None:
        """Leave for all to find when this step's actions ran, and what was counted in the last step that was."""
        if counted is not None:
            self._published["added"] = {"peak": counted.peak, "stages": list(counted.stages.items())}
        if counted is None or "records" not in self._published:         # counting takes time: better an earlier step's
            ran = [(op, stage, microbatch, clock.seconds(begin), clock.seconds(end))
                   for op, stage, microbatch, begin, end in self.executor.records]
            records = [(op, stage, microbatch, round(begin - start, 7), round(end - start, 7))
                       for op, stage, microbatch, begin, end in (*ran, *self._sums())]
            self.progress.microbatches = 1 + max((record[2] for record in records),
                                                 default=self.progress.microbatches - 1)
            self._published |= {"step": self.progress.step, "records": records}
        self._workers.publish(json.dumps(self._published))

    def _sums(self) -> list[tuple[str, int, int, float, float]]:
        """When gradients were on their way among replicas, by stage; those of several stages as their first one's."""
        own = min((record[1] for record in self.executor.records), default=0)
        return [("R", max(stage, own), -1, begin, end) for stage, begin, end in self.ties.spans]

    def guarded(self, what: Callable[[], T], harmless: type[BaseException] | tuple[type[BaseException], ...] = ()) -> T:
        """Run something that talks to other workers; a failure becomes the same error on every worker."""
        try:
            return what()
        except BaseException as error:
            if isinstance(error, harmless) and not isinstance(error, ConnectionLost):
                raise
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
        return f", stage {stage}, {_ACTIONS[op]}" + (f" of micro-batch {microbatch}" if microbatch >= 0 else "")

    def check_open(self) -> None:
        """Raise ``WorkerError`` where the pipeline is closed."""
        if self.progress.closed is not None:
            raise WorkerError(f"the pipeline is closed ({self.progress.closed}); make a new Pipeline")

    def close(self) -> None:
        """Give up the connections once every worker is here."""
        if self.progress.closed is None:
            self.collective("close", lambda: None)      # nobody leaves while another is at work
            self.give_up("closed by its owner")

    def give_up(self, why: str) -> None:
        """Give up the connections, wherever the others are."""
        self.progress.closed = why
        for part in (self.transport, self.ties, self._workers):
            part.close()


def attempt(what: Callable[[], T]) -> tuple[T | None, InputError | None]:
    """What comes of it, or the ``InputError`` that says why this batch cannot be used."""
    try:
        return what(), None
    except InputError as error:
        return None, error
    except Exception as error:
        problem = InputError(f"this batch cannot be used: {told(error)}")
        problem.__cause__ = error
        return None, problem
