"""Which actions a worker runs for a batch: schedule and boundaries in, a list of actions out."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pipeengine.errors import ScheduleError
from pipeengine.program import WINDOW, lower
from pipeengine.schedules import Edge, I, Schedule, forward_schedule
from pipeengine.simulation import OPS, Costs, simulate
from pipeengine.synthesis import SCHEDULES, build, find


@dataclass(frozen=True)
class ProgramCache:
    """The orders of one pipeline: ``num_stages`` stages on ``num_workers`` processes, seen from process ``worker``.

    ``costs`` are the plan's, once there is one: schedules that are made for given times, and the places of messages, follow them.
    """

    schedule: str | Callable[..., Schedule] | Schedule
    num_stages: int
    num_microbatches: int
    num_workers: int
    worker: int
    costs: Costs | None = None
    _known: dict[tuple, object] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.schedule, str) and self.schedule not in SCHEDULES:
            object.__setattr__(self, "schedule", find(self.schedule))

    @property
    def name(self) -> str:
        return self.schedule if isinstance(self.schedule, str) else \
            getattr(self.schedule, "name", getattr(self.schedule, "__name__", "custom"))

    def build(self, num_microbatches: int | None = None) -> Schedule:
        """The schedule itself, made once. In one process every stage acts as a worker of its own, if the schedule can do that."""
        key = "built", num_microbatches or self.num_microbatches
        if key not in self._known:
            self._known[key] = self._build(key[1])
        return self._known[key]

    def _build(self, num_microbatches: int) -> Schedule:
        half = self.num_stages // 2
        choices = [self.num_workers] if self.num_workers > 1 else \
            [n for n in (self.num_stages, *range(half, 0, -1)) if self.num_stages % n == 0]
        problem: ScheduleError | None = None
        for workers in choices:
            try:
                made = build(self.schedule, num_workers=workers, num_microbatches=num_microbatches,
                             stages_per_worker=self.num_stages // workers, costs=self.costs)
            except ScheduleError as error:
                problem = problem or error
                continue
            if made.topology.num_routes > 1:
                raise ScheduleError(f"schedule {made.name} sends micro-batches both ways through two copies of the model; it can be "
                                    'simulated but not run: try "dualpipe-v"')
            if made.topology.num_stages == self.num_stages:
                return made
            problem = problem or ScheduleError(
                f"schedule {made.name} holds {made.topology.num_stages} stages on {workers} workers, {self.num_stages} were asked "
                f"for; try num_stages={made.topology.num_stages}")
        raise problem

    @property
    def worker_of(self) -> tuple[int, ...]:
        """The process that holds each stage."""
        return self.build().topology.worker_of if self.num_workers > 1 else (0,) * self.num_stages

    @property
    def splits_backward(self) -> bool:
        """Whether input and weight gradients are separate actions, at least for some micro-batches."""
        return any((lane.op == I).any() for lane in self.build().lanes)

    def split_backward_stages(self, num_microbatches: int) -> tuple[frozenset[int], ...]:
        """For each micro-batch of a batch of so many, the stages whose backward is two actions, I and W."""
        key = "split_backward_stages", num_microbatches
        if key not in self._known:
            op, stage, microbatch = self.order(num_microbatches).columns
            found: list[set[int]] = [set() for _ in range(num_microbatches)]
            for s, k in zip(stage[op == I].tolist(), microbatch[op == I].tolist()):
                found[k].add(s)
            self._known[key] = tuple(map(frozenset, found))
        return self._known[key]

    def actions(self, num_microbatches: int, edges: frozenset[Edge], *, training: bool) -> list[tuple]:
        """This process's actions for a batch of so many micro-batches, whose values cross ``edges``."""
        key = num_microbatches, edges, training
        if key not in self._known:
            order = self.order(num_microbatches) if training else self._forward(num_microbatches)
            self._known[key] = self._listed(order, _merged(edges, training))
        return self._known[key]

    def _forward(self, num_microbatches: int) -> Schedule:
        shape = self.build().topology
        return forward_schedule(shape.num_workers, num_microbatches, shape)

    def order(self, num_microbatches: int) -> Schedule:
        """The schedule that a batch of so many micro-batches runs, made once."""
        key = "order", num_microbatches
        if key not in self._known:
            self._known[key] = self._fitting(num_microbatches)
        return self._known[key]

    def _fitting(self, num_microbatches: int) -> Schedule:
        """A last batch may have fewer micro-batches than the schedule is made for."""
        shape = self.build().topology
        try:
            made = self.build(num_microbatches)
            if made.topology == shape:
                return made
        except ScheduleError:
            pass
        return self.build().keep(num_microbatches)

    def _listed(self, schedule: Schedule, edges: tuple[Edge, ...]) -> list[tuple]:
        if self.num_workers > 1:
            return [tuple(action) for action in lower(schedule, edges, self.costs, window=WINDOW).actions(self.worker)]
        timeline = simulate(schedule, None, edges)      # in one process any order that respects the schedule will do
        order = sorted(range(len(timeline.start)), key=lambda i: (timeline.start[i], timeline.stage[i]))
        return [(OPS[timeline.op[i]], int(timeline.stage[i]), int(timeline.microbatch[i]), -1) for i in order]


def _merged(edges: frozenset[Edge], training: bool) -> tuple[Edge, ...]:
    """One edge per pair of stages: with a message that way when any micro-batch has one, back only in training."""
    between: dict[tuple[int, int], list[Edge]] = {}
    for edge in edges:
        between.setdefault((edge.source, edge.target), []).append(edge)
    merged = (Edge(*pair, any(edge.activation for edge in alike), training and any(edge.gradient for edge in alike))
              for pair, alike in sorted(between.items()))
    return tuple(edge for edge in merged if edge.activation or training)
