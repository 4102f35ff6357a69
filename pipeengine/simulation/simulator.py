"""When everything happens: a schedule or program and costs in, a timeline out."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeengine.errors import ScheduleError
from pipeengine.schedules import Edge, Schedule, Topology
from pipeengine.simulation.costs import Costs
from pipeengine.simulation.critical_path import Stuck, solve
from pipeengine.simulation.dependencies import waits
from pipeengine.simulation.memory import peak_activations
from pipeengine.simulation.timeline import COLUMNS, R, Timeline, U, X


def simulate(order: object, costs: Costs | None = None, edges: Sequence[Edge] | None = None) -> Timeline:
    """The timeline of a schedule or program when every action takes what ``costs`` say and messages never queue.

    Costs are one second per F, I and W of a whole worker unless given. Messages overlap with computation.
    """
    schedule: Schedule = getattr(order, "schedule", order)
    if edges is None:
        edges = getattr(order, "edges", None) or schedule.topology.chain()
    costs = costs or Costs.uniform(schedule.topology)
    if len(costs.forward) != schedule.topology.num_stages:
        raise ScheduleError(f"costs are for {len(costs.forward)} stages, schedule {schedule.name} has "
                            f"{schedule.topology.num_stages}; give one entry per stage")
    op, stage, microbatch = schedule.columns
    try:
        start, end = solve(schedule.starts, costs.duration(op, stage), waits(schedule, edges, costs))
    except Stuck as stuck:
        raise ScheduleError(
            f"schedule {schedule.name} stops after "
            f"{int((stuck.position - schedule.starts[:-1]).sum())} of {schedule.num_actions} actions; check() shows "
            f"the cycle"
        ) from None
    worker = np.repeat(np.arange(schedule.topology.num_workers, dtype=np.int32), np.diff(schedule.starts))
    peaks = tuple(peak_activations(schedule, costs)) if costs.activation is not None else None
    timeline = Timeline(schedule.name, schedule.topology.num_workers, schedule.num_microbatches, worker, op, stage,
                        microbatch, start, end, peak_bytes=peaks)
    return _finish(timeline, schedule.topology, costs)


@dataclass(frozen=True)
class Breakdown:
    """Where the seconds of a makespan go; the four parts add up to it.

    ``ideal`` is the mean work of a worker. ``fill_drain`` is what the order adds when all workers are equal and
    messages free, ``imbalance`` what the real stages add to that, ``communication`` what the messages add to that.
    """
    ideal: float
    fill_drain: float
    imbalance: float
    communication: float


def breakdown(order: object, costs: Costs | None = None, edges: Sequence[Edge] | None = None) -> Breakdown:
    """Simulate without messages, then without differences between stages, and see what each takes away."""
    schedule: Schedule = getattr(order, "schedule", order)
    costs = costs or Costs.uniform(schedule.topology)
    op, stage, _ = schedule.columns
    ideal = float(costs.duration(op, stage).sum()) / schedule.topology.num_workers
    names = ("forward", "input_grad", "weight_grad", "backward")
    means = {name: (float(np.mean(getattr(costs, name))),) * len(costs.forward) for name in names}
    even = simulate(order, Costs(**means), edges).makespan
    uneven = simulate(order, Costs(**{name: getattr(costs, name) for name in names}), edges).makespan
    whole = simulate(order, replace(costs, exchange=None, optimizer=None, reduce=None), edges).makespan
    return Breakdown(ideal, even - ideal, uneven - even, whole - uneven)


def _finish(timeline: Timeline, topology: Topology, costs: Costs) -> Timeline:
    """``timeline`` with the end of the step: sums among replicas behind the last actions, shared gradients exchanged
    together, then each worker's update."""
    if costs.exchange is None and costs.optimizer is None and costs.reduce is None:
        return timeline
    owner = np.array(topology.worker_of)
    exchange = np.bincount(owner, costs.exchange or [0.0] * len(owner), topology.num_workers)
    update = np.bincount(owner, costs.optimizer or [0.0] * len(owner), topology.num_workers)
    ready = timeline.last.copy()
    together = exchange > 0
    ready[together] = ready[together].max(initial=0.0)
    ready += exchange
    extra = [(w, X, -1, -1, ready[w] - exchange[w], ready[w]) for w in range(topology.num_workers) if exchange[w] > 0]
    for worker, stage, begin, end in _reductions(timeline, costs.reduce or ()):
        extra.append((worker, R, stage, -1, begin, end))
        ready[worker] = max(ready[worker], end)
    extra += [(w, U, -1, -1, ready[w], ready[w] + update[w]) for w in range(topology.num_workers) if update[w] > 0]
    added = list(zip(*extra)) or [()] * len(COLUMNS)
    joined = {name: np.concatenate([getattr(timeline, name), np.array(more, getattr(timeline, name).dtype)])
              for name, more in zip(COLUMNS, added)}
    order = np.argsort(joined["worker"], kind="stable")
    return replace(timeline, **{name: column[order] for name, column in joined.items()})


def _reductions(timeline: Timeline, seconds: Sequence[float]) -> Iterator[tuple[int, int, float, float]]:
    """(worker, stage, begin, end) of each stage's sum: after its last action, and after the worker's earlier sums."""
    if not any(seconds):
        return
    last: dict[tuple[int, int], float] = {}
    for worker, stage, end in zip(timeline.worker.tolist(), timeline.stage.tolist(), timeline.end.tolist()):
        last[worker, stage] = max(end, last.get((worker, stage), 0.0))
    free: dict[int, float] = {}
    for (worker, stage), end in sorted(last.items(), key=lambda item: (item[1], item[0])):
        if seconds[stage] > 0:
            begin = max(end, free.get(worker, 0.0))
            free[worker] = begin + seconds[stage]
            yield worker, stage, begin, free[worker]
