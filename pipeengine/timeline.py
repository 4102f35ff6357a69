"""When everything happens: costs in, a timeline out. Simulated and measured runs have the same type.

Seconds and bytes throughout (or any unit of time, and any unit of memory, used alike).
"""
from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Iterable, Mapping, Sequence

import numpy as np

from pipeengine.critical_path import Stuck, Wait, solve
from pipeengine.errors import ScheduleError
from pipeengine.schedules.form import LETTERS, Edge, Schedule, Topology

OPS = LETTERS + ("SA", "RA", "SG", "RG", "X", "U")
"""All letters of a timeline: actions, messages (send and receive, activation and gradient), and the end of a
step: X exchanges the gradients of shared parameters, U updates the parameters."""
SA, RA, SG, RG, X, U = range(4, 10)


def _per_stage(name: str, value: float | Sequence[float], num_stages: int) -> tuple[float, ...]:
    values = tuple(float(x) for x in (value if isinstance(value, (Sequence, np.ndarray)) else [value] * num_stages))
    if len(values) != num_stages:
        raise ScheduleError(f"{name} has {len(values)} entries for {num_stages} stages; give one per stage")
    if not all(0 <= x < float("inf") for x in values):
        raise ScheduleError(f"{name} is {min(values):g} to {max(values):g}; times and sizes are finite and not negative")
    return values


@dataclass(frozen=True)
class Costs:
    """What actions and messages take: one entry per stage, or one number for all (then with ``num_stages``).

    ``backward`` is the fused one, ``input_grad + weight_grad`` unless given; given alone it is halved between them.
    A message takes ``hop`` seconds, plus ``edge_bytes[source, target] / bandwidth`` where both are given.
    ``activation`` is what a stage keeps per micro-batch from F to its backward; ``weight_activation`` what of it stays
    between I and W (all of it unless given); ``transient`` what backward needs on top while it runs. After its last
    action a worker spends ``exchange`` (shared gradients, by the stages that take part, who wait for each other), then
    ``optimizer``.
    """
    forward: tuple[float, ...]
    input_grad: tuple[float, ...] | None = None
    weight_grad: tuple[float, ...] | None = None
    backward: tuple[float, ...] | None = None
    hop: float = 0.0
    bandwidth: float | None = None
    edge_bytes: Mapping[tuple[int, int], float] = field(default_factory=dict)
    activation: tuple[float, ...] | None = None
    weight_activation: tuple[float, ...] | None = None
    transient: tuple[float, ...] | None = None
    exchange: tuple[float, ...] | None = None
    optimizer: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: float | Sequence[float]) -> None:
            object.__setattr__(self, name, _per_stage(name, value, count))
        count = len(self.forward) if isinstance(self.forward, (Sequence, np.ndarray)) else 1
        put("forward", self.forward)
        if self.input_grad is None and self.weight_grad is None:
            whole = _per_stage("backward", 0.0 if self.backward is None else self.backward, count)
            halves = [tuple(x / 2 for x in whole)] * 2
        else:
            halves = [self.input_grad or 0.0, self.weight_grad or 0.0]
        put("input_grad", halves[0])
        put("weight_grad", halves[1])
        if self.backward is None:
            put("backward", [i + w for i, w in zip(self.input_grad, self.weight_grad)])
        else:
            put("backward", self.backward)
        for name in ("activation", "weight_activation", "transient", "exchange", "optimizer"):
            if getattr(self, name) is not None:
                put(name, getattr(self, name))
        _per_stage("edge_bytes", list(self.edge_bytes.values()), len(self.edge_bytes))
        if not 0 <= self.hop < float("inf") or (self.bandwidth is not None and not self.bandwidth > 0):
            raise ScheduleError(f"hop is {self.hop} seconds and bandwidth {self.bandwidth} bytes per second; a hop takes 0 or "
                                "more, a bandwidth is over 0 or left out")

    @classmethod
    def uniform(cls, topology: Topology, *, forward: float = 1.0, input_grad: float = 1.0, weight_grad: float = 1.0,
                hop: float = 0.0, weight_activation: float = 1.0) -> Costs:
        """Equal workers: times are those of one micro-batch on one worker, shared by its stages.

        Activations are in micro-batches of a whole worker, ``weight_activation`` of which stays between I and W.
        """
        share = topology.shares()
        return cls(tuple(forward * share), tuple(input_grad * share), tuple(weight_grad * share), hop=hop,
                   activation=tuple(share), weight_activation=tuple(weight_activation * share))

    def duration(self, op: np.ndarray, stage: np.ndarray) -> np.ndarray:
        """Seconds of each action."""
        return np.array([self.forward, self.backward, self.input_grad, self.weight_grad])[op, stage]

    def latency(self, edge: Edge) -> float:
        """Seconds that one message of ``edge`` takes, either way."""
        size = self.edge_bytes.get((edge.source, edge.target), 0.0)
        return self.hop + (size / self.bandwidth if self.bandwidth else 0.0)

    def recomputing(self, stages: Iterable[int], kept: float = 0.0) -> Costs:
        """These costs when ``stages`` keep only ``kept`` bytes per micro-batch and run forward again in backward."""
        again = np.isin(np.arange(len(self.forward)), list(stages))
        extra = np.where(again, self.forward, 0.0)
        held = np.array(self.activation or (1.0,) * len(self.forward))
        transient = np.where(again, np.maximum(held - kept, 0.0), self.transient or (0.0,))
        return replace(self, input_grad=tuple(self.input_grad + extra), backward=tuple(self.backward + extra),
                       activation=tuple(np.where(again, np.minimum(kept, held), held)), transient=tuple(transient))


@dataclass(frozen=True, eq=False)
class Timeline:
    """Who did what from when to when: one entry per action, in each worker's order, simulated or measured.

    ``op`` indexes ``OPS``. ``num_workers`` counts idle ones too. ``peak_bytes`` and ``sent_bytes`` are per worker,
    where known.
    """
    name: str
    num_workers: int
    num_microbatches: int
    worker: np.ndarray
    op: np.ndarray
    stage: np.ndarray
    microbatch: np.ndarray
    start: np.ndarray
    end: np.ndarray
    peak_bytes: tuple[float, ...] | None = None
    sent_bytes: tuple[float, ...] | None = None

    @classmethod
    def from_columns(cls, worker: Sequence[int], op: Sequence[str] | Sequence[int], stage: Sequence[int],
                     microbatch: Sequence[int], start: Sequence[float], end: Sequence[float], *, name: str = "run",
                     num_workers: int | None = None, num_microbatches: int | None = None,
                     peak_bytes: Sequence[float] | None = None, sent_bytes: Sequence[float] | None = None) -> Timeline:
        """A timeline from lists or arrays; ``op`` as letters or codes; the counts are the largest seen unless given."""
        codes = [OPS.index(x) if isinstance(x, str) else x for x in op] if not isinstance(op, np.ndarray) else op
        worker, microbatch = np.asarray(worker, np.int32), np.asarray(microbatch, np.int32)
        columns = (worker, np.asarray(codes, np.uint8), np.asarray(stage, np.int32), microbatch,
                   np.asarray(start, np.float64), np.asarray(end, np.float64))
        if len({len(column) for column in columns}) > 1:
            raise ScheduleError(f"columns of {[len(column) for column in columns]} entries; give all the same number")
        return cls(name, num_workers or int(worker.max(initial=-1)) + 1,
                   num_microbatches or int(microbatch.max(initial=-1)) + 1, *columns,
                   None if peak_bytes is None else tuple(peak_bytes), None if sent_bytes is None else tuple(sent_bytes))

    @cached_property
    def computes(self) -> np.ndarray:
        """Boolean mask of the entries that keep a worker busy (no messages)."""
        return (self.op < SA) | (self.op > RG)

    @property
    def makespan(self) -> float:
        """Seconds from the first start to the last end: what a synchronised step pays."""
        return float(self.end.max() - self.start.min()) if len(self.end) else 0.0

    @cached_property
    def first(self) -> np.ndarray:
        """Each worker's first start, seconds."""
        return self._extreme(self.start, np.minimum, np.inf)

    @cached_property
    def last(self) -> np.ndarray:
        """Each worker's last end, seconds."""
        return self._extreme(self.end, np.maximum, -np.inf)

    def _extreme(self, times: np.ndarray, better: np.ufunc, worst: float) -> np.ndarray:
        found = np.full(self.num_workers, worst)
        better.at(found, self.worker[self.computes], times[self.computes])
        return np.where(np.isfinite(found), found, 0.0)

    @property
    def span(self) -> float:
        """The longest time, in seconds, that one worker takes from its own first start to its own last end."""
        return float((self.last - self.first).max(initial=0.0))

    @cached_property
    def busy(self) -> np.ndarray:
        """Seconds each worker computes."""
        mask = self.computes
        return np.bincount(self.worker[mask], (self.end - self.start)[mask], self.num_workers)

    @property
    def idle_share(self) -> np.ndarray:
        """The part of the makespan in which each worker does not compute."""
        return 1 - self.busy / self.makespan if self.makespan else np.zeros(self.num_workers)

    def to_dict(self) -> dict[str, object]:
        """JSON types only."""
        columns = {name: getattr(self, name).tolist() for name in _COLUMNS}
        columns["op"] = [OPS[code] for code in columns["op"]]
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _COLUMNS}
        return rest | {name: list(value) for name, value in rest.items() if isinstance(value, tuple)} | columns

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Timeline:
        known = {f.name for f in fields(cls)}
        missing = set(_COLUMNS) - set(data)
        if missing:
            raise ScheduleError(f"this is no timeline: {', '.join(sorted(missing))} missing of {len(_COLUMNS)} columns; "
                                "give what Timeline.to_dict wrote")
        return cls.from_columns(**{name: value for name, value in data.items() if name in known})

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Timeline:
        return cls.from_dict(json.loads(text))


_COLUMNS = ("worker", "op", "stage", "microbatch", "start", "end")


def waits(schedule: Schedule, edges: Sequence[Edge], costs: Costs | None = None, *,
          local: bool = False) -> tuple[Wait, ...]:
    """What each action waits for on other workers (``local``: on its own worker instead), as columns."""
    forward, backward, _ = schedule.tables
    worker_of = schedule.topology.worker_of
    columns: list[Wait] = []
    used: dict[tuple[str, int], int] = {}

    def add(kind: str, stage: int, waiter: np.ndarray, on: np.ndarray, latency: float) -> None:
        number = used[kind, stage] = used.get((kind, stage), -1) + 1
        if number == len(columns):
            columns.append(Wait(np.full(schedule.num_actions, -1, np.int64), np.zeros(schedule.num_actions)))
        there = (waiter >= 0) & (on >= 0)
        columns[number].on[waiter[there]] = on[there]
        columns[number].latency[waiter[there]] = latency

    for edge in edges:
        if (worker_of[edge.source] == worker_of[edge.target]) == local:
            latency = 0.0 if costs is None or local else costs.latency(edge)
            if edge.activation:
                add("activation", edge.target, forward[edge.target], forward[edge.source], latency)
            if edge.gradient:
                add("gradient", edge.source, backward[edge.source], backward[edge.target], latency)
    return _as_blocks(schedule, columns) if schedule.pairs and not local else tuple(columns)


def _as_blocks(schedule: Schedule, columns: Sequence[Wait]) -> tuple[Wait, ...]:
    """The first action of a block also waits for what the second one needs; both results are there at its end."""
    second = np.flatnonzero(schedule.visible > np.arange(schedule.num_actions)) + 1
    blocks = []
    for on, latency in columns:
        on = np.where(on >= 0, schedule.visible[on], -1)
        first_on, first_latency = np.full_like(on, -1), np.zeros_like(latency)
        first_on[second - 1], first_latency[second - 1] = on[second], latency[second]
        blocks += [Wait(on, latency), Wait(first_on, first_latency)]
    return tuple(blocks)


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
        raise ScheduleError(f"schedule {schedule.name} stops after {int((stuck.position - schedule.starts[:-1]).sum())} "
                            f"of {schedule.num_actions} actions; check() shows the cycle") from None
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
    whole = simulate(order, replace(costs, exchange=None, optimizer=None), edges).makespan
    return Breakdown(ideal, even - ideal, uneven - even, whole - uneven)


def _finish(timeline: Timeline, topology: Topology, costs: Costs) -> Timeline:
    """``timeline`` with the end of the step: shared gradients exchanged together, then each worker's update."""
    if costs.exchange is None and costs.optimizer is None:
        return timeline
    owner = np.array(topology.worker_of)
    exchange = np.bincount(owner, costs.exchange or [0.0] * len(owner), topology.num_workers)
    update = np.bincount(owner, costs.optimizer or [0.0] * len(owner), topology.num_workers)
    ready = timeline.last.copy()
    together = exchange > 0
    ready[together] = ready[together].max(initial=0.0)
    workers, extra = np.arange(topology.num_workers), []
    for code, begin, seconds in ((X, ready, exchange), (U, ready + exchange, update)):
        extra += [(w, code, -1, -1, begin[w], begin[w] + seconds[w]) for w in workers[seconds > 0]]
    added = list(zip(*extra)) or [()] * len(_COLUMNS)
    joined = {name: np.concatenate([getattr(timeline, name), np.array(more, getattr(timeline, name).dtype)])
              for name, more in zip(_COLUMNS, added)}
    order = np.argsort(joined["worker"], kind="stable")
    return replace(timeline, **{name: column[order] for name, column in joined.items()})


def peak_activations(schedule: Schedule, costs: Costs | None = None) -> np.ndarray:
    """The most that each worker keeps at once for backward.

    In ``costs.activation``'s unit; without it in micro-batches of a whole worker: a stage counts its share.
    """
    held, kept, transient = _memory(schedule.topology, costs)
    zero = np.zeros_like(held)
    change = np.array([held, -held, kept - held, -kept])
    during = np.array([held, transient, transient, zero])
    peaks = []
    for op, stage, _ in schedule.lanes:
        before = np.cumsum(change[op, stage]) - change[op, stage]
        peaks.append(float((before + during[op, stage]).max(initial=0.0)))
    # Shares such as 1/3 do not add up exactly.
    return np.round(peaks, 9)


def _memory(topology: Topology, costs: Costs | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    zero = np.zeros(topology.num_stages)
    if costs is None or costs.activation is None:
        share = topology.shares()
        return share, share, zero
    held = np.array(costs.activation)
    kept = held if costs.weight_activation is None else np.array(costs.weight_activation)
    return held, kept, zero if costs.transient is None else np.array(costs.transient)
