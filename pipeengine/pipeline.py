"""The user's object: hand over a model, get it trained over stages."""
from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from time import perf_counter

import networkx
import torch

import partitioners
from partitioners import Plan
from partitioners.plan import check_rules
from pipeengine.autograd import Recompute, find_deferrable
from pipeengine.checkpoint import load_stage, save_weights
from pipeengine.costs import analytic, cost_graph, made_up_target, measure, price_modules, price_stages
from pipeengine.data import Batch, argument_names, take_apart
from pipeengine.distributed import (
    DistributedTransport,
    LocalTransport,
    ProcessGroupWorkers,
    Shared,
    SharedParameters,
    SingleProcess,
    connect,
)
from pipeengine.errors import InputError, PlanError, ScheduleError, WorkerError
from pipeengine.report import RunReport, measured, predict, report_text, save, stage_rows
from pipeengine.rng import RngStreams, mix
from pipeengine.runtime import Executor, ProgramCache, Task, merge_outputs
from pipeengine.schedules import Schedule
from pipeengine.simulation import Timeline, costs_of
from pipeengine.stages import (
    Placement,
    Specialization,
    SpecializationCache,
    Weights,
    check_recording,
    even_weights,
)
from pipeengine.synthesis import build
from pipeengine.tracing import Dataflow, Inputs, analyse, capture, current_modes, node_refs, refs

# A message between busy processes of one machine: from the end of what made it to the start of what waits for it, and what the
# sender spends on it (measured over gloo).
_HOP_SECONDS, _HANDLING_SECONDS, _LINK_BYTES_PER_SECOND = 4e-4, 1e-4, 1e9
_GAP, _PLANNING_SECONDS = 0.01, 10.0        # measured costs are not better known than to one per cent
_NOISE_SECONDS = 5e-4       # differences between stages below this are not worth a second tensor across a cut


class Pipeline:
    """Train ``model`` over pipeline stages, with the numbers that one process would give.

    ``example`` holds the model's inputs for a whole batch: a dict of keyword arguments or a tuple of positional ones. Under
    torchrun every process is a worker; in plain Python all stages run in this process. See the README for every option.
    ``recompute`` keeps only the inputs of all stages, or of the stages (by number) and modules (by path) that it names, and runs
    their forward again in backward.

    Raises ``CaptureError`` when the model cannot be recorded, ``PartitionError`` when it cannot be cut as asked, ``InputError``
    for options and batches of the wrong kind; the same error on every worker.
    """

    def __init__(self, model: torch.nn.Module, example: object, *, num_microbatches: int = 1,
                 schedule: str | Callable = "gpipe", num_stages: int | None = None, plan: Plan | str | Path | None = None,
                 costs: str | networkx.DiGraph | None = None, loss_fn: Callable | None = None, target: object = None,
                 loss_weight: Callable | None = None, batch_dims: Mapping[str, int | None] | None = None,
                 weights: str | Path | None = None, device: torch.device | str | None = None, mesh: object = None,
                 seed: int = 0, check: bool = True, recompute: bool | Collection[int | str] = False):
        self._closed: str | None = None
        self._model, self._loss_fn, self._loss_weight = model, loss_fn, loss_weight
        self._batch_dims, self._seed = batch_dims, seed
        self._schedule = str(schedule) if isinstance(schedule, Path) else schedule
        self._device = _device(model, device)
        self._recompute = recompute
        self._workers: SingleProcess | ProcessGroupWorkers = connect(mesh, self._device, _launched())
        try:
            self._construct(example, target, num_microbatches, num_stages, plan, costs, weights, check)
        except BaseException:
            self._close("construction failed")
            raise

    # -- construction -----------------------------------------------------------------------------------------------

    def _construct(self, example, target, num_microbatches, num_stages, plan, costs, weights, check) -> None:
        workers = self._workers
        plan = self._read_plan(plan)
        workers.run_synchronized(lambda: self._check_options(example, num_microbatches, num_stages, plan))
        self._num_stages = self._count_stages(num_stages, plan)
        self._recomputed = workers.run_synchronized(lambda: Recompute.of(self._recompute, self._num_stages, self._model))
        self._programs = ProgramCache(self._schedule, self._num_stages, num_microbatches, workers.size, workers.rank)
        self._worker_of = self._programs.worker_of
        self._own = tuple(s for s in range(self._num_stages) if self._worker_of[s] == workers.rank)
        flow = workers.run_synchronized(lambda: self._record(example, target))
        self._agree({"num_stages": self._num_stages, "num_microbatches": num_microbatches, "schedule": self._programs.name,
                     "seed": self._seed, "recompute": (sorted(self._recomputed.stages), sorted(self._recomputed.modules)),
                     "the model or the example": f"that with hash {_number(self._identity(flow))}"})
        graph = workers.run_synchronized(lambda: self._price(flow, costs))
        price_modules(graph, flow, self._recomputed.spans(flow.recording))
        self._plan: Plan = self._make_plan(graph, plan)
        self._priced = price_stages(self._plan, self._recomputed.stages)
        self._programs = dataclasses.replace(self._programs, costs=costs_of(self._priced, **self._link),
                                           _known={})
        workers.run_synchronized(lambda: self._place(flow, weights, check))
        self._connect_workers(flow)

    def _agree(self, facts: Mapping[str, object]) -> None:
        """Raise ``InputError`` on every worker unless all were given the same."""
        everybody = self._workers.all_gather_object(facts)
        for name, first in everybody[0].items():
            other = next((rank for rank, found in enumerate(everybody) if found[name] != first), None)
            if other is not None:
                raise InputError(f"workers disagree on {name}: worker 0 has {first}, worker {other} has {everybody[other][name]}; "
                                 "start every worker with the same arguments")

    def _read_plan(self, plan: Plan | str | Path | None) -> Plan | None:
        """The plan that the first worker was given, on every worker."""
        workers = self._workers

        def read() -> dict | None:
            if plan is None or workers.rank:
                return None
            if not isinstance(plan, (Plan, str, Path)):
                raise InputError(f"plan is a {type(plan).__name__}; give a Plan or the path of one")
            try:
                return (plan if isinstance(plan, Plan) else Plan.load(plan)).to_json()
            except OSError as error:
                raise PlanError(f"cannot read the plan: {error}") from error
        found = workers.broadcast_object(workers.run_synchronized(read))
        return None if found is None else Plan.from_json(found)

    def _check_options(self, example, num_microbatches, num_stages, plan) -> None:
        if not isinstance(self._model, torch.nn.Module):
            raise InputError(f"model is a {type(self._model).__name__}, not a torch.nn.Module; pass the model itself")
        if not isinstance(num_microbatches, int) or num_microbatches < 1:
            raise InputError(f"num_microbatches is {num_microbatches!r}; give a number of at least 1")
        if not isinstance(example, (Mapping, tuple, list, torch.Tensor)):
            raise InputError(f"example is a {type(example).__name__}; give a dict of keyword arguments or a tuple of positional "
                             "ones")
        if num_stages is not None and (not isinstance(num_stages, int) or num_stages < 1):
            raise InputError(f"num_stages is {num_stages!r}; give a number of at least 1")
        self._check_types()
        self._num_microbatches = num_microbatches
        count = self._count_stages(num_stages, plan)
        if count % self._workers.size:
            raise InputError(f"{count} stages on {self._workers.size} workers; every worker holds the same number of stages: try "
                             f"num_stages={self._workers.size * max(1, round(count / self._workers.size))}")
        # An unknown schedule is refused before anything else is done.
        ProgramCache(self._schedule, count, num_microbatches, self._workers.size, self._workers.rank).build()

    def _check_types(self) -> None:
        """What is not used until later is refused at once."""
        for name, value, fits, wanted in (
                ("schedule", self._schedule, isinstance(self._schedule, (str, Schedule)) or callable(self._schedule),
                 "the name of one, a function or a Schedule"),
                ("loss_fn", self._loss_fn, self._loss_fn is None or callable(self._loss_fn), "a function of output and target"),
                ("loss_weight", self._loss_weight, self._loss_weight is None or callable(self._loss_weight),
                 "a function of a micro-batch"),
                ("batch_dims", self._batch_dims, isinstance(self._batch_dims, (Mapping, type(None))),
                 "a dict from names of inputs to dimensions"),
                ("recompute", self._recompute, isinstance(self._recompute, (bool, Collection)), "True, stages or module paths"),
                ("seed", self._seed, isinstance(self._seed, int), "a whole number")):
            if not fits:
                raise InputError(f"{name} is {value!r}; give {wanted}")

    def _count_stages(self, num_stages, plan) -> int:
        """As asked, else the plan's, else one per worker; more where the schedule cannot do with one."""
        if num_stages is not None or plan is not None:
            return num_stages if num_stages is not None else plan.num_stages
        size = self._workers.size
        with contextlib.suppress(ScheduleError):
            return ProgramCache(self._schedule, size, self._num_microbatches, size, self._workers.rank).build().topology.num_stages
        with contextlib.suppress(ScheduleError):
            return build(self._schedule, num_workers=size, num_microbatches=self._num_microbatches).topology.num_stages
        return size

    def _record(self, example, target) -> Dataflow:
        self._signature = inspect.signature(self._model.forward)
        self._names = argument_names(self._model)
        batch = self._take_apart(Inputs.of(example, target))
        inputs = self._first_microbatch(batch)
        if self._loss_fn is not None and target is None:
            inputs = Inputs(inputs.args, inputs.kwargs, made_up_target(self._model, inputs, self._loss_fn, self._device))
        self._example = inputs
        with torch.enable_grad():
            recording = capture(self._model, inputs, loss_fn=self._loss_fn, device=self._device)
        flow = analyse(recording, outputs=False)
        if not any(recording.values[v].spec.requires_grad for v in flow.goals):
            raise InputError("the loss does not depend on any parameter that needs a gradient; is every parameter frozen?")
        return flow

    def _first_microbatch(self, batch: Batch) -> Inputs:
        parts = batch.split(self._num_microbatches, self._device)
        self._ran = len(parts)              # micro-batches of the last step that was recorded; before the first, the example's
        return batch.again(parts[0])

    def _identity(self, flow: Dataflow) -> str:
        """The model and the example, as text: what workers must agree on."""
        parameters = [(n, tuple(p.shape), str(p.dtype), p.requires_grad) for n, p in self._model.named_parameters()]
        nodes = [(node.name, [flow.recording.values[v].spec.shape for v in node.results]) for node in flow.recording.nodes]
        return repr((parameters, nodes))

    def _price(self, flow: Dataflow, costs) -> networkx.DiGraph:
        if isinstance(costs, networkx.DiGraph):
            partitioners.check(costs)
            names = set(cost_graph(flow, analytic(flow)))
            if set(costs) != names:
                raise InputError(f"costs was made for another model: it has {len(costs)} nodes, this model has {len(names)}, and "
                                 f"{len(set(costs) ^ names)} are in one of them only, such as "
                                 f"{min(set(costs) ^ names, key=str)}; use pe.profile(model, example)")
            return costs.copy()
        if costs not in (None, "measured", "analytic"):
            raise InputError(f'costs is {costs!r}; give "measured", "analytic" or a cost graph')
        deferrable = find_deferrable(flow.recording, self._model) if self._programs.splits_backward else {}
        seconds = analytic(flow) if costs == "analytic" else \
            measure(flow, self._model, self._device, deferrable=deferrable, progress=self._tell).seconds
        return cost_graph(flow, seconds, deferrable)

    def _tell(self, line: str) -> None:
        """Progress on what takes more than two seconds, from one worker."""
        if self._workers.rank == 0:
            print(f"pipeengine: {line}", file=sys.stderr, flush=True)

    def _make_plan(self, graph: networkx.DiGraph, plan) -> Plan:
        """Rank 0 plans, everybody gets that plan: measured costs differ from worker to worker."""
        workers = self._workers

        def plan_here() -> Plan | None:
            if workers.rank:
                return None
            return self._given_plan(plan, graph) if plan is not None else self._partition(graph)
        made = workers.run_synchronized(plan_here)
        return Plan.from_json(workers.broadcast_object(None if made is None else made.to_json()))

    def _partition(self, graph: networkx.DiGraph) -> Plan:
        total = sum(data.get("forward", 0) + data.get("backward", 0) for _, data in graph.nodes(data=True))
        tolerance = max(0.05, min(0.5, _NOISE_SECONDS * self._num_stages / max(total, 1e-12)))
        return partitioners.partition(graph, self._num_stages, bandwidth=self._link["bandwidth"],
                                      num_microbatches=self._num_microbatches, prefer_single_tensor=tolerance, gap=_GAP,
                                      time_limit=_PLANNING_SECONDS, memory_model=self._memory_model(),
                                      worker_of=self._worker_of if self._workers.size > 1 else None, progress=self._tell)

    def _memory_model(self) -> partitioners.MemoryModel:
        """How many micro-batches a stage holds at once: all where every forward comes first, else as 1F1B does."""
        return partitioners.MemoryModel(schedule="gpipe" if self._programs.name in ("gpipe", "bfs") else "1f1b")

    def _given_plan(self, plan: Plan, graph: networkx.DiGraph) -> Plan:
        if plan.num_stages != self._num_stages:
            raise PlanError(f"the plan has {plan.num_stages} stages, the pipeline {self._num_stages}; make a plan for "
                            f"{self._num_stages} stages or pass num_stages={plan.num_stages}")
        missing = [name for name in graph if name not in plan.stage_of]
        if missing or len(plan.stage_of) != len(graph):
            raise PlanError(f"the plan was made for another model: it knows {len(plan.stage_of)} nodes, this model has "
                            f"{len(graph)}, and {len(missing)} of them are not in the plan"
                            + (f" (first {missing[0]})" if missing else "") + "; plan this model")
        check_rules(plan, graph)
        return plan

    def _place(self, flow: Dataflow, weights, check) -> None:
        self._rng = RngStreams(self._device)
        self._placement = Placement(self._plan.stage_of, self._num_stages, flow.recording.leaf_modules)
        stage_of = self._placement.assign(flow)
        self._names_of = _all_names(self._model)
        self._placement.settle(flow, stage_of, list(dict.fromkeys(self._names_of.values())))
        self._held = self._held_names(flow)
        if check and all(p.device.type != "meta" for p in (*self._model.parameters(), *self._model.buffers())):
            check_recording(self._model, flow, stage_of, self._num_stages, self._example, self._loss_fn)
        load_stage(self._model, self._held, self._device, weights=weights, seed=self._seed)
        self._specializations = SpecializationCache(self._model, self._placement, self._own, loss_fn=self._loss_fn, device=self._device,
                                  rng=self._rng, split_backward=self._programs.splits_backward, recompute=self._recomputed)
        specialization = self._specializations.make(flow.recording, outputs=False)
        specialization.stages.of(self._programs.split_backward_stages(self._num_microbatches)[0])
        self._example_links = specialization.links
        self._example_split = specialization.split

    def _held_names(self, flow: Dataflow) -> frozenset[str]:
        """Parameters of the own stages, and the small buffers that every worker needs to follow the inputs."""
        own = {name for name, stages in self._placement.holders.items() if stages & set(self._own)}
        values = flow.recording.values
        given = {values[v].name for n in flow.replicated for v in node_refs(flow.recording.nodes[n]) if values[v].kind == "attribute"}
        given |= {values[v].name for guard in flow.recording.guards for v in (*refs(guard.args), *refs(guard.kwargs))
                  if values[v].kind == "attribute"}
        return frozenset(own | given)

    def _connect_workers(self, flow: Dataflow) -> None:
        workers = self._workers
        self._shared: SharedParameters | None = None
        shared = self._shared_entries()
        self._owned = frozenset(name for name in self._held
                                if self._owner(name) == workers.rank)
        if isinstance(workers, SingleProcess):
            self._transport = LocalTransport()
        else:
            backend = "gloo" if self._device.type == "cpu" else torch.distributed.get_default_backend_for_device(self._device)
            self._transport = DistributedTransport(self._worker_of, workers.rank, workers.ranks, self._device, backend, workers.timeout,
                                                   workers.waiter)
            tensors = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
            self._shared = SharedParameters(shared, {e.name: tensors[e.name] for e in shared if workers.rank in e.workers},
                                            workers.rank, workers.ranks, backend, workers.timeout, workers.waiter)
            self._shared.equalise()
        self._executor = Executor(self._transport, self._rng)
        self._step_number = 0
        self._calls = 0
        self.loss: torch.Tensor | None = None
        self._trained_loss: torch.Tensor | None = None

    def _shared_entries(self) -> list[Shared]:
        trained = {name: p.requires_grad for name, p in self._model.named_parameters()}
        found = []
        for name in dict.fromkeys(self._names_of.values()):
            workers = sorted({self._worker_of[s] for s in self._placement.holders.get(name, ())})
            if len(workers) > 1:
                found.append(Shared(name, tuple(workers), trained.get(name, False)))
        return found

    def _owner(self, name: str) -> int:
        return min((self._worker_of[s] for s in self._placement.holders.get(name, ())), default=-1)

    # -- steps ------------------------------------------------------------------------------------------------------

    def step(self, *args, target: object = None, **kwargs) -> torch.Tensor:
        """Forward and backward of a whole batch; gradients are added to ``.grad``.

        Every worker passes the same batch. Returns the loss of the full batch, detached, on every worker. A batch that cannot be
        used raises ``InputError`` on every worker and loses nothing; a failure while the step runs raises
        ``WorkerError`` with the same root cause on every worker and closes the pipeline.
        """
        tasks, specializations, digest = self._prepare(self._inputs(args, kwargs, target), training=True)
        links = frozenset().union(*(specialization.links for specialization in specializations))
        with torch.enable_grad():
            self._guarded(lambda: self._run_step(tasks, specializations, digest, links))
        return self.loss

    def _run_step(self, tasks, specializations, digest, links) -> None:
        actions = self._programs.actions(len(tasks), links, training=True)
        if self._shared is not None:
            self._shared.begin()
        self._transport.begin(self._calls, digest)
        start = perf_counter()
        self._executor.run(actions, tasks)
        if self._shared is not None:
            self._shared.reduce()
        if self._step_number < 3 or self._step_number % 10 == 0:
            self._publish(start)
        self.loss = self._trained_loss = self._spread_loss(specializations[0], self._executor.loss)
        self._step_number += 1

    def _spread_loss(self, specialization: Specialization, own: torch.Tensor | None) -> torch.Tensor | None:
        if specialization.split.loss_stage is None:
            return None
        spec = specialization.recording.values[specialization.recording.loss].spec
        loss = own if own is not None else torch.zeros(spec.shape, dtype=spec.dtype, device=self._device)
        return self._workers.broadcast(loss, self._worker_of[specialization.split.loss_stage])

    def evaluate(self, *args, target: object = None, gather: bool = False, **kwargs) -> object:
        """Forward only, without gradients, in the model's present mode; every worker calls it.

        Returns the model's own output for the whole batch on the worker of the last stage; elsewhere the same structure with the
        loss alone, or with ``gather`` everything everywhere. The loss is also in ``pipe.loss``.
        """
        with torch.no_grad():
            tasks, specializations, digest = self._prepare(self._inputs(args, kwargs, target), training=False)
            links = frozenset().union(*(specialization.links for specialization in specializations))
            return self._guarded(lambda: self._run_evaluation(tasks, specializations, digest, links, gather))

    def _run_evaluation(self, tasks, specializations, digest, links, gather: bool) -> object:
        self._transport.begin(self._calls, digest)
        self._executor.run(self._programs.actions(len(tasks), links, training=False), tasks)
        self.loss = self._spread_loss(specializations[0], self._executor.loss)
        last = self._worker_of[specializations[0].split.output_stage]
        outputs = [self._executor.outputs.get(m) for m in range(len(tasks))]
        merged = merge_outputs(specializations, outputs if self._workers.rank == last else None, tasks, self.loss)
        return self._workers.broadcast_object(merged, last) if gather and self._workers.size > 1 else merged

    def _inputs(self, args: tuple, kwargs: dict, target: object) -> Inputs:
        """``target`` is for ``loss_fn``; without one it may be an argument of the model's own."""
        if target is not None and self._loss_fn is None and "target" in self._signature.parameters:
            return Inputs(args, {**kwargs, "target": target})
        return Inputs(args, kwargs, target)

    def _take_apart(self, inputs: Inputs) -> Batch:
        try:
            self._signature.bind(*inputs.args, **inputs.kwargs)
        except TypeError as error:
            raise InputError(f"the model does not take these inputs: {error}; its forward is "
                             f"{type(self._model).__name__}.forward{self._signature}") from None
        return take_apart(inputs, names=self._names, batch_dims=self._batch_dims)

    def _prepare(self, inputs: Inputs, *, training: bool) -> tuple[list[Task], list[Specialization], int]:
        """Everything that can go wrong with a batch goes wrong here, before anything is sent."""
        self._check_open()
        self._calls += 1
        problem, facts, prepared = None, (self._calls, 0, 0), ([], [], 0)
        try:
            prepared, facts = self._tasks(inputs, training)
        except InputError as error:
            problem = error
        except Exception as error:
            problem = InputError(f"this batch cannot be used: {type(error).__name__}: {error}")
            problem.__cause__ = error
        self._guarded(lambda: self._workers.agree(facts, problem, ("the number of calls", "the batch", "the recorded model")),
                      harmless=InputError)
        return prepared

    def _tasks(self, inputs: Inputs, training: bool):
        if self._loss_fn is not None and training and inputs.target is None:
            raise InputError("the pipeline has a loss_fn; call step(..., target=...)")
        if self._loss_fn is None and inputs.target is not None:
            raise InputError("target= is given, but the pipeline has no loss_fn that would take it; make it with loss_fn=")
        batch = self._take_apart(inputs)
        parts = batch.split(self._num_microbatches, self._device)
        sizes = batch.sizes(self._num_microbatches)
        digest = batch.digest()
        base = (batch.key, self._state_key(training), batch.dims)
        specializations, keys = [], []
        alike: dict[int, Specialization] = {}              # by rows, where no guard tells micro-batches apart
        for index, (tensors, size) in enumerate(zip(parts, sizes)):
            key = mix(self._seed, self._step_number if training else (1 << 40) + self._calls, index)
            keys.append(key)
            specialization = alike.get(size) or self._specializations.find((base, size), tensors, lambda t=tensors: batch.again(t), key,
                                                             outputs=not training)
            if specialization.guards is None:
                alike[size] = specialization
            specializations.append(specialization)
        weights = self._weigh(specializations, parts, sizes, batch, base)
        split_backward_stages = self._programs.split_backward_stages(len(parts)) if training else (frozenset(),) * len(parts)
        tasks = [Task([*(t.clone() if i in specialization.cloned else t for i, t in enumerate(tensors)), *terms],
                      specialization.stages.of(apart), weight, key, specialization.links, size)
                 for tensors, size, specialization, weight, terms, key, apart in zip(parts, sizes, specializations, weights.loss, weights.terms, keys,
                                                                               split_backward_stages)]
        recorded = 0
        for specialization in specializations:
            recorded = mix(recorded, specialization.digest)
        return (tasks, specializations, digest), (self._calls, digest, recorded)

    def _state_key(self, training: bool) -> tuple:
        """Everything besides the batch that eager execution would depend on."""
        modules = bytes(module.training for module in self._model.modules())
        needs = bytes(p.requires_grad for p in self._model.parameters())
        return training, modules, needs, current_modes().autocast

    def _weigh(self, specializations, parts, sizes, batch: Batch, base: tuple) -> Weights:
        """What each micro-batch's loss counts for in the loss of the full batch."""
        if self._loss_weight is None:
            whole = [tensor.to(self._device) for tensor in batch.tensors]
            return self._specializations.weigh(base, specializations, parts, sizes, whole, lambda: batch.again(whole))
        raw = [float(self._loss_weight(*again.args, **again.kwargs) if again.target is None else
                     self._loss_weight(*again.args, target=again.target, **again.kwargs))
               for again in map(batch.again, parts)]
        return even_weights(raw, sizes, [len(specialization.terms) for specialization in specializations])

    def _guarded(self, what: Callable[[], object], harmless: type = ()) -> object:
        """Run something that talks to other workers; a failure becomes the same error on every worker."""
        try:
            return what()
        except harmless:
            raise
        except BaseException as error:
            where = f"in step {self._step_number}"
            position = getattr(getattr(self, "_executor", None), "position", ())
            if position:
                where += f", {_action_text(position)}"
            failure = self._workers.fail(error, where)
            if self._shared is not None:
                self._shared.restore()
            self._close(str(failure).splitlines()[0])
            if failure is error:
                raise
            raise failure from (error if not isinstance(error, WorkerError) else None)

    def _check_open(self) -> None:
        if self._closed is not None:
            raise WorkerError(f"the pipeline is closed ({self._closed}); make a new Pipeline")

    def close(self) -> None:
        """Give up the connections to the other workers; every worker calls it. Model, weights and gradients stay."""
        if self._closed is None:
            self._guarded(lambda: self._workers.all_gather_object(None))         # nobody leaves while another is still at work
            self._close("closed by its owner")

    def _close(self, why: str) -> None:
        self._closed = why
        for part in ("_transport", "_shared", "_workers"):
            held = getattr(self, part, None)
            if held is not None:
                held.close()

    # -- what the user's loop needs ---------------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Parameters that this worker holds, under their original names; shared ones on every holder."""
        for name, parameter in self._model.named_parameters():
            if name in self._held:
                yield name, parameter

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Parameters that this worker holds."""
        for _, parameter in self.named_parameters():
            yield parameter

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Parameters and persistent buffers that this worker holds, under their original names."""
        return {name: tensor for name, tensor in self._model.state_dict().items()
                if self._names_of.get(name, name) in self._held}

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Scale all gradients so that their norm over all stages, shared ones counted once, is at most ``max_norm``.

        Returns the norm before scaling, on every worker.
        """
        self._check_open()
        own = [p for p in self.parameters() if p.grad is not None]
        counted = [p.grad for name, p in self.named_parameters() if p.grad is not None and name in self._owned]
        total = self._guarded(lambda: self._norm(counted, norm_type))
        scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for parameter in own:
            parameter.grad.mul_(scale.to(parameter.grad.device))
        return total

    def _norm(self, gradients: list[torch.Tensor], norm_type: float) -> torch.Tensor:
        norms = torch._foreach_norm(gradients, norm_type) if gradients else []
        stacked = torch.stack([norm.double().to(self._device) for norm in norms]) if norms else \
            torch.zeros(1, dtype=torch.float64, device=self._device)
        if norm_type == float("inf"):
            return self._workers.all_reduce(stacked.max(), largest=True).float()
        return (self._workers.all_reduce(stacked.pow(norm_type).sum()) ** (1 / norm_type)).float()

    def train(self, mode: bool = True) -> Pipeline:
        """Set the model to training mode."""
        self._model.train(mode)
        return self

    def eval(self) -> Pipeline:
        """Set the model to evaluation mode."""
        return self.train(False)

    def verify_shared(self) -> None:
        """Raise ``WorkerError`` unless every copy of every shared parameter holds the same bits; every worker calls it."""
        if self._shared is not None:
            self._guarded(self._shared.verify)

    def save_weights(self, folder: str | Path) -> None:
        """Write all weights as safetensors with a sharded index in the original names; every worker calls it."""
        save_weights(self._model, self._owned, Path(folder), self._workers)

    # -- what happened ----------------------------------------------------------------------------------------------

    def _publish(self, start: float) -> None:
        records = [(op, stage, microbatch, round(begin - start, 7), round(end - start, 7))
                   for op, stage, microbatch, begin, end in self._executor.records]
        self._ran = 1 + max((microbatch for _, _, microbatch, _, _ in records), default=self._ran - 1)
        self._workers.publish(json.dumps({"step": self._step_number, "records": records}))

    def timeline(self) -> Timeline | None:
        """What every worker did in a recent step (one of the first three, then every tenth); None before the first.

        Any worker may call it alone. In one process every stage is shown as a worker of its own.
        """
        lanes: dict[int, list] = {}
        for rank, text in self._workers.published().items():
            for record in json.loads(text)["records"]:
                lanes.setdefault(record[1] if self._workers.size == 1 else rank, []).append(tuple(record))
        return measured(lanes, schedule=self._programs.name, num_workers=self._num_lanes)

    @property
    def _num_lanes(self) -> int:
        return self._workers.size if self._workers.size > 1 else self._num_stages

    def predicted_timeline(self) -> Timeline:
        """One step as the plan's costs predict it, with as many micro-batches as ``timeline()`` shows.

        In one process: what separate workers would take if messages took no time.
        """
        return predict(self._priced, self._programs.order(self._ran), **self._link)

    @property
    def _link(self) -> dict[str, float | None]:
        """What a message between two stages takes."""
        if self._workers.size == 1:
            return {"hop": 0.0, "bandwidth": None}
        return {"hop": _HOP_SECONDS, "bandwidth": _LINK_BYTES_PER_SECOND, "handling": _HANDLING_SECONDS}

    def run_report(self) -> RunReport:
        """Per stage: predicted and measured time, idle share, memory, what it sends. Any worker may call it alone."""
        schedule = self._programs.order(self._ran)
        sizes = {name: p.numel() for name, p in self._model.named_parameters()}
        parameters = {stage: sum(size for name, size in sizes.items() if stage in self._placement.holders.get(name, ()))
                      for stage in range(self._num_stages)}
        rows = tuple(stage_rows(self._priced, schedule, parameters, self._ran))
        return RunReport(type(self._model).__name__, self._programs.name, self._ran, rows, self.predicted_timeline(),
                         self.timeline(), None if self._trained_loss is None else float(self._trained_loss),
                         in_turns=self._workers.size == 1)

    def report(self) -> str:
        """The run so far as a table for a terminal."""
        return report_text(self.run_report())

    def save_report(self, folder: str | Path) -> None:
        """Write ``report.json``, ``report.html`` and ``trace.json`` (for Perfetto); only the first worker writes."""
        if self._workers.rank == 0:
            Path(folder).mkdir(parents=True, exist_ok=True)
            save(self.run_report(), Path(folder))

    @property
    def plan(self) -> Plan:
        """The plan that this pipeline runs."""
        return self._plan

    @property
    def num_stages(self) -> int:
        return self._num_stages

    @property
    def messages(self) -> int:
        """Data messages this worker has sent so far."""
        return self._transport.messages

    @property
    def message_bytes(self) -> int:
        """Bytes of values in them."""
        return self._transport.bytes


def _launched() -> bool:
    """Whether torchrun, or something like it, has started this process as one of several."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ) and int(os.environ["WORLD_SIZE"]) > 1


def _device(model: torch.nn.Module, device: torch.device | str | None) -> torch.device:
    """Where to run: as asked, else where the model is, else (for meta) the accelerator. Each local process has its own."""
    found = torch.device(device) if device is not None else None
    if found is None and isinstance(model, torch.nn.Module):
        found = next((t.device for t in (*model.parameters(), *model.buffers()) if t.device.type != "meta"), None)
    found = found or torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if found.type in ("cpu", "meta") or found.index is not None:
        return found
    return torch.device(found.type, int(os.environ.get("LOCAL_RANK", 0)) % max(1, torch.accelerator.device_count()))


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _all_names(model: torch.nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer, aliases included -> its first name."""
    first: dict[int, str] = {}
    found = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        found[name] = first.setdefault(id(tensor), name)
    return found


def _action_text(position: tuple) -> str:
    op, stage, microbatch, _ = position
    what = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient", "SA": "sending an activation",
            "RA": "receiving an activation", "SG": "sending a gradient", "RG": "receiving a gradient"}[op]
    return f"stage {stage}, {what} of micro-batch {microbatch}"
