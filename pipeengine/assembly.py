"""From what a user asked for to everything that a step needs, as a line of values.

``assemble(options, workers, device)`` records the model, prices it, plans it, places it and connects the workers; each
step is a function of what came before, and every worker comes to the same end or raises the same error.
"""
from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import networkx
import torch

import partitioners
from partitioners import Plan
from partitioners.plan import check_rules
from pipeengine.agreement import agree_on_construction, hashed
from pipeengine.autograd import Recompute, find_deferrable
from pipeengine.checkpoint import fetch_missing, load_stage, release_foreign
from pipeengine.choosing import choose, progress
from pipeengine.costs import analytic, cost_graph, made_up_target, measure, price_modules, price_stages
from pipeengine.data import Batch
from pipeengine.distributed import Grid, NoTies, Sharding, Transport, Workers
from pipeengine.errors import InputError, PlanError, ScheduleError
from pipeengine.options import Options
from pipeengine.ownership import Tensors, first_names, sharding_of, share, tensors_of
from pipeengine.rng import RngStreams
from pipeengine.runtime import BatchReader, ProgramCache, ScheduleChoice, splits_backward
from pipeengine.simulation import LinkTimes, costs_of, memory_model_of
from pipeengine.stages import (
    Placement,
    SettledPlacement,
    SpecializationCache,
    check_recording,
    compare_two_microbatches,
)
from pipeengine.synthesis import build
from pipeengine.tracing import WHOLE_LOSS, Dataflow, Inputs, analyse, capture, needs_target

# A message between busy processes of one machine: from the end of what made it to the start of what waits for it, and
# what the sender spends on it; measured over gloo. For other backends nobody has measured yet: the same, but with the
# bandwidth of one 200 Gb/s link, so that bytes do not drown everything else.
LINKS = {"gloo": LinkTimes(4e-4, 1e-4, 1e9)}
_UNMEASURED = LinkTimes(4e-4, 1e-4, 25e9)
_GAP, _PLANNING_SECONDS = 0.01, 10.0        # measured costs are not better known than to one per cent
_NOISE_SECONDS = 5e-4       # differences between stages below this are not worth a second tensor across a cut


@dataclass(frozen=True)
class Layout:
    """How many stages there are, which worker holds each, and what the schedule asks of backward."""

    choice: ScheduleChoice
    worker_of: tuple[int, ...]
    splits_backward: bool
    memory_model: partitioners.MemoryModel
    recompute: Recompute
    order: str                                  # the whole schedule, as text

    @property
    def num_stages(self) -> int:
        """Stages of the whole pipeline."""
        return self.choice.num_stages

    def facts(self) -> dict[str, object]:
        """What every worker must have alike, by name."""
        return {"num_stages": self.num_stages, "schedule": self.choice.name,
                "the schedule's order": hashed(self.order),
                "recompute": (sorted(self.recompute.stages), sorted(self.recompute.modules))}


@dataclass(frozen=True)
class Recorded:
    """The model, recorded on the first micro-batch of the example; ``batch`` is the whole of it, ``num_parts``
    micro-batches it makes."""

    flow: Dataflow
    inputs: Inputs
    num_parts: int
    batch: Batch


@dataclass(frozen=True)
class Assembly:
    """Everything that was decided and made at construction; nothing in it changes which is not said to."""

    graph: networkx.DiGraph                     # what was planned: nodes with their costs
    plan: Plan
    priced: Plan                                # the plan with what recomputation changes
    layout: Layout
    reader: BatchReader
    placement: SettledPlacement
    tensors: Tensors
    rng: RngStreams
    programs: ProgramCache
    specializations: SpecializationCache
    transport: Transport
    ties: NoTies
    num_parts: int
    link: LinkTimes


def assemble(options: Options, workers: Workers, device: torch.device) -> Assembly:
    """Everything a step needs. Every worker calls it; it raises the same error on each of them."""
    chosen = choose(options, workers, device, link_times(workers))
    options, given, reader, grid = chosen.options, chosen.plan, chosen.reader, workers.grid
    layout = workers.run_synchronized(lambda: lay_out(options, given, chosen.num_microbatches, grid.width))
    recorded = workers.run_synchronized(lambda: record(options, reader))
    agree_on_construction(options, layout.facts(), recorded.flow, workers)
    link = link_times(workers)
    graph = workers.run_synchronized(lambda: price(recorded.flow, options, layout, device, workers.rank))
    price_modules(graph, recorded.flow, layout.recompute.spans(recorded.flow.recording))
    plan = make_plan(graph, given, options, layout, link, workers)
    layout = workers.run_synchronized(lambda: with_recomputation(layout, plan, options.model))
    priced = price_stages(plan, layout.recompute.stages)
    programs = ProgramCache(layout.choice, grid.place, costs_of(priced, link), reduces=grid.num_replicas > 1)
    placement, tensors, sharding = workers.run_synchronized(lambda: place(options, recorded, plan, layout, grid))
    fetch_missing(options.model, tensors.held, device, workers)
    rng = RngStreams(device)
    specializations = workers.run_synchronized(
        lambda: settle(options, recorded, layout, programs, placement, tensors, rng, device, grid.place))
    transport = workers.connect_stages(layout.worker_of, device)
    ties = share(options.model, placement, tensors, layout.worker_of, workers, device, sharding)
    return Assembly(graph, plan, priced, layout, reader, placement, tensors, rng, programs, specializations, transport,
                    ties, recorded.num_parts, link)


# -- what was asked for -----------------------------------------------------------------------------------------------


def lay_out(options: Options, plan: Plan | None, num_microbatches: int, num_workers: int) -> Layout:
    """Check the options against each other and against the number of workers; what is unknown is refused here."""
    num_stages = _count_stages(options, plan, num_microbatches, num_workers)
    if num_stages % num_workers:
        raise InputError(
            f"{num_stages} stages on {num_workers} workers; every worker holds the same number of stages: try "
            f"num_stages={num_workers * max(1, round(num_stages / num_workers))}"
        )
    choice = ScheduleChoice(options.schedule, num_stages, num_microbatches, num_workers)
    schedule = choice.build()
    return Layout(choice, choice.worker_of(schedule), splits_backward(schedule), memory_model_of(schedule),
                  Recompute.of(options.recompute, num_stages, options.model),
                  # One that is searched for follows from costs, which come later and are equal by then.
                  "" if options.schedule == "auto" else schedule.to_text())


def _count_stages(options: Options, plan: Plan | None, microbatches: int, num_workers: int) -> int:
    """As asked, else the plan's, else one per worker; more where the schedule cannot do with one."""
    if options.num_stages is not None:
        return options.num_stages
    if plan is not None:
        return plan.num_stages
    with contextlib.suppress(ScheduleError):
        return ScheduleChoice(options.schedule, num_workers, microbatches, num_workers).build().topology.num_stages
    with contextlib.suppress(ScheduleError):
        return build(options.schedule, num_workers=num_workers, num_microbatches=microbatches).topology.num_stages
    return num_workers


# -- the model --------------------------------------------------------------------------------------------------------


def record(options: Options, reader: BatchReader) -> Recorded:
    """The model, recorded on the example's first micro-batch."""
    batch = reader.read(Inputs.of(options.example, options.target))
    parts = batch.split(reader.num_microbatches, reader.device)
    inputs = batch.again(parts[0])
    if options.loss_fn is not None and needs_target(options.loss_fn) and options.target is None:
        inputs = Inputs(inputs.args, inputs.kwargs,
                        made_up_target(options.model, inputs, options.loss_fn, reader.device))
    with torch.enable_grad():
        recording = capture(options.model, inputs, loss_fn=options.loss_fn, device=reader.device)
    flow = analyse(recording, outputs=False)
    if not any(recording.values[v].spec.requires_grad for v in flow.goals):
        raise InputError("the loss does not depend on any parameter that needs a gradient; is every parameter frozen?")
    return Recorded(flow, inputs, len(parts), batch)


# -- costs and plan ---------------------------------------------------------------------------------------------------


def price(flow: Dataflow, options: Options, layout: Layout, device: torch.device, rank: int) -> networkx.DiGraph:
    """The cost graph of one micro-batch: as given, measured (on all workers at once: contention counts) or
    estimated."""
    costs = options.costs
    if isinstance(costs, networkx.DiGraph):
        partitioners.check(costs)
        names = set(cost_graph(flow, analytic(flow)))
        if set(costs) != names:
            raise InputError(
                f"costs was made for another model: it has {len(costs)} nodes, this model has {len(names)}, "
                f"and {len(set(costs) ^ names)} are in one of them only, such as "
                f"{min(set(costs) ^ names, key=str)}; use pe.profile(model, example)"
            )
        return costs.copy()
    if costs not in (None, "measured", "analytic"):
        raise InputError(f'costs is {costs!r}; give "measured", "analytic" or a cost graph')
    deferrable = find_deferrable(flow.recording, options.model) if layout.splits_backward else {}
    seconds = analytic(flow) if costs == "analytic" else \
        measure(flow, options.model, device, deferrable=deferrable, progress=progress(rank)).seconds
    return cost_graph(flow, seconds, deferrable)


def link_times(workers: Workers) -> LinkTimes:
    """What a message between two stages takes, by the backend that carries it; nothing inside one process."""
    return LinkTimes.free() if workers.backend is None else LINKS.get(workers.backend, _UNMEASURED)


def make_plan(graph: networkx.DiGraph, given: Plan | None, options: Options, layout: Layout,
              link: LinkTimes, workers: Workers) -> Plan:
    """Rank 0 plans, everybody gets that plan: measured costs differ from worker to worker."""
    def plan_here() -> Mapping | None:
        if workers.rank:
            return None
        made = partition(graph, options, layout, link, workers.grid.width) if given is None else \
            fitting_plan(given, graph, layout.num_stages)
        return made.to_json()
    data = workers.broadcast_object(workers.run_synchronized(plan_here))
    assert data is not None, "worker 0 has planned"
    return Plan.from_json(data)


def partition(graph: networkx.DiGraph, options: Options, layout: Layout, link: LinkTimes,
              num_workers: int) -> Plan:
    """The best cut of ``graph`` for the workers that will hold the stages."""
    total = sum(data.get("forward", 0) + data.get("backward", 0) for _, data in graph.nodes(data=True))
    tolerance = max(0.05, min(0.5, _NOISE_SECONDS * layout.num_stages / max(total, 1e-12)))
    return partitioners.partition(graph, layout.num_stages, bandwidth=link.bytes_per_second,
                                  num_microbatches=layout.choice.num_microbatches,
                                  prefer_single_tensor=tolerance, gap=_GAP,
                                  time_limit=_PLANNING_SECONDS, memory_model=layout.memory_model,
                                  worker_of=layout.worker_of if num_workers > 1 else None, progress=progress(0))


def fitting_plan(plan: Plan, graph: networkx.DiGraph, num_stages: int) -> Plan:
    """``plan``, if it is one for this graph and this many stages. Raises ``PlanError``."""
    if plan.num_stages != num_stages:
        raise PlanError(
            f"the plan has {plan.num_stages} stages, the pipeline {num_stages}; make a plan for {num_stages} "
            f"stages or pass num_stages={plan.num_stages}"
        )
    missing = [name for name in graph if name not in plan.stage_of]
    if missing or len(plan.stage_of) != len(graph):
        raise PlanError(f"the plan was made for another model: it knows {len(plan.stage_of)} nodes, this model has "
                        f"{len(graph)}, and {len(missing)} of them are not in the plan"
                        + (f" (first {missing[0]})" if missing else "") + "; plan this model")
    check_rules(plan, graph)
    return plan


def with_recomputation(layout: Layout, plan: Plan, model: torch.nn.Module) -> Layout:
    """The layout with what the plan says is recomputed. Raises ``PlanError`` for what is no module of the model."""
    modules = [path for cost in plan.stages for path in cost.recomputed]
    known = {path for path, _ in model.named_modules()}
    unknown = next((path for path in modules if path not in known), None)
    if unknown is not None:
        raise PlanError(f"the plan recomputes {unknown!r}, which is no module of the model; plan this model with "
                        "pipeengine plan --recompute, or pass recompute= instead")
    return replace(layout, recompute=layout.recompute.also(modules))


# -- stages -----------------------------------------------------------------------------------------------------------


def place(options: Options, recorded: Recorded, plan: Plan, layout: Layout, grid: Grid
          ) -> tuple[SettledPlacement, Tensors, Sharding | None]:
    """Which node runs where, and who holds which tensors; checked against eager execution where the model is real."""
    model, flow = options.model, recorded.flow
    placement = Placement(plan.stage_of, layout.num_stages, flow.recording.leaf_modules)
    stage_of = placement.assign(flow)
    settled = placement.settle(flow, stage_of, list(dict.fromkeys(first_names(model).values())))
    if options.check and all(t.device.type != "meta" for t in (*model.parameters(), *model.buffers())):
        check_recording(model, flow, stage_of, layout.num_stages, recorded.inputs, options.loss_fn)
        if grid.worker(grid.place) == 0:
            tell_other_loss(options, recorded)
    sharding = None
    if options.shard == "parameters" and grid.num_replicas > 1:
        sharding = sharding_of(model, flow, settled, layout.worker_of, grid)
        if grid.worker(grid.place) == 0 and sharding.kept:
            progress(0)(sharding.told({name: p.numel() for name, p in model.named_parameters()}))
    return settled, tensors_of(model, flow, settled, layout.worker_of, grid, options.shard, sharding), sharding


def tell_other_loss(options: Options, recorded: Recorded) -> None:
    """Say where the loss of a full batch is none that its micro-batches add up to: batch norm, a contrastive loss."""
    batch, device = recorded.batch, next(options.model.parameters()).device
    given = options.target is not None or not needs_target(options.loss_fn)
    if recorded.num_parts < 2 or options.loss_weight is not None or not given:
        return
    two = batch.split(recorded.num_parts, device)[:2]
    other = compare_two_microbatches(options.model, recorded.flow, two, batch.join(two), batch.again, options.loss_fn,
                                     device)
    reason = recorded.flow.recording.leaf_modules.get(WHOLE_LOSS)
    if other is None and reason is not None:
        other = (f"loss_fn is called as it is, because of {reason}; nothing tells what it is a mean over, so that each "
                 "micro-batch counts by its rows, and it sees the rows of one micro-batch. Pass loss_weight= with what "
                 "a micro-batch counts for if that is not so")
    if other is not None:
        progress(0)(other)


def settle(options: Options, recorded: Recorded, layout: Layout, programs: ProgramCache, placement: SettledPlacement,
           tensors: Tensors, rng: RngStreams, device: torch.device, rank: int) -> SpecializationCache:
    """The held tensors made or moved, the others let go, and the stages of this worker compiled for the example."""
    load_stage(options.model, tensors.held, device, weights=options.weights, seed=options.seed)
    release_foreign(options.model, tensors.held)
    own = tuple(stage for stage, worker in enumerate(layout.worker_of) if worker == rank)
    specializations = SpecializationCache(
        options.model,
        placement,
        own,
        loss_fn=options.loss_fn,
        device=device,
        rng=rng,
        split_backward=programs.splits_backward,
        recompute=layout.recompute,
        pieces=options.pieces(),
    )
    specialization = specializations.make(recorded.flow.recording, outputs=False)
    specialization.stages.of(programs.split_backward_stages(layout.choice.num_microbatches)[0])
    return specializations
