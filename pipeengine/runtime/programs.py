"""Which actions a worker runs for a batch: schedule and boundaries in, a list of actions out."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pipeengine.errors import ScheduleError
from pipeengine.program import WINDOW, Message, lower, receipts, with_reductions
from pipeengine.schedules import Edge, I, Schedule, forward_schedule
from pipeengine.simulation import OPS, Costs, simulate
from pipeengine.synthesis import SCHEDULES, build, find


@dataclass(frozen=True)
class ScheduleChoice:
    """A schedule as it was asked for: ``num_stages`` stages on ``num_workers`` processes."""

    schedule: str | Callable[..., Schedule] | Schedule
    num_stages: int
    num_microbatches: int
    num_workers: int

    @property
    def name(self) -> str:
        """What the schedule is called; for one that is no name of the table, what it calls itself."""
        meant = self.schedule
        if isinstance(meant, str) and meant not in SCHEDULES:
            meant = find(meant)
        return meant if isinstance(meant, str) else getattr(meant, "name", getattr(meant, "__name__", "custom"))

    def build(self, costs: Costs | None = None, num_microbatches: int | None = None) -> Schedule:
        """The schedule, made for ``costs`` where it is one that follows them.

        In one process every stage acts as a worker of its own, if the schedule can do that. Raises ``ScheduleError``
        when it cannot hold these stages.
        """
        half = self.num_stages // 2
        choices = [self.num_workers] if self.num_workers > 1 else \
            [n for n in (self.num_stages, *range(half, 0, -1)) if self.num_stages % n == 0]
        problem: ScheduleError | None = None
        for workers in choices:
            try:
                schedule = build(self.schedule, num_workers=workers, costs=costs,
                             num_microbatches=num_microbatches or self.num_microbatches,
                             stages_per_worker=self.num_stages // workers)
            except ScheduleError as error:
                problem = problem or error
                continue
            if schedule.topology.num_routes > 1:
                raise ScheduleError(
                    f"schedule {schedule.name} sends micro-batches both ways through two copies of the model; "
                    'it can be simulated but not run: try "dualpipe-v"'
                )
            if schedule.topology.num_stages == self.num_stages:
                return schedule
            problem = problem or ScheduleError(
                f"schedule {schedule.name} holds {schedule.topology.num_stages} stages on {workers} workers, "
                f"{self.num_stages} were asked for; try num_stages={schedule.topology.num_stages}")
        raise problem

    def worker_of(self, schedule: Schedule) -> tuple[int, ...]:
        """The process that holds each stage."""
        return schedule.topology.worker_of if self.num_workers > 1 else (0,) * self.num_stages


@dataclass(frozen=True)
class Share:
    """One process's part of a program: its actions in order, and what each message to it proves (``receipts``)."""

    actions: list[tuple]
    receipts: dict[Message, tuple[Message, ...]] = field(default_factory=dict)


class ProgramCache:
    """The programs of process ``worker``, each made once: for a number of micro-batches and a set of boundaries.

    ``costs`` are the plan's: schedules that are made for given times, and the places of messages, follow them. With
    ``reduces`` each stage's gradients are summed among replicas when its last backward is done.
    """

    def __init__(self, choice: ScheduleChoice, worker: int, costs: Costs, *, reduces: bool = False):
        self._choice, self._worker, self._costs, self._reduces = choice, worker, costs, reduces
        self._built = choice.build(costs)
        self._schedules: dict[int, Schedule] = {}
        self._split: dict[int, tuple[frozenset[int], ...]] = {}
        self._shares: dict[tuple[int, frozenset[Edge], bool], Share] = {}

    @property
    def name(self) -> str:
        """The schedule's name."""
        return self._choice.name

    @property
    def splits_backward(self) -> bool:
        """Whether input and weight gradients are separate actions, at least for some micro-batches."""
        return splits_backward(self._built)

    def schedule(self, num_microbatches: int) -> Schedule:
        """The schedule that a batch of so many micro-batches runs."""
        if num_microbatches not in self._schedules:
            self._schedules[num_microbatches] = self._fitting(num_microbatches)
        return self._schedules[num_microbatches]

    def _fitting(self, num_microbatches: int) -> Schedule:
        """A last batch may have fewer micro-batches than the schedule is made for."""
        try:
            made = self._choice.build(self._costs, num_microbatches)
            if made.topology == self._built.topology:
                return made
        except ScheduleError:
            pass
        return self._built.keep(num_microbatches)

    def split_backward_stages(self, num_microbatches: int) -> tuple[frozenset[int], ...]:
        """For each micro-batch of a batch of so many, the stages whose backward is two actions, I and W."""
        if num_microbatches not in self._split:
            op, stage, microbatch = self.schedule(num_microbatches).columns
            stages: list[set[int]] = [set() for _ in range(num_microbatches)]
            for s, k in zip(stage[op == I].tolist(), microbatch[op == I].tolist()):
                stages[k].add(s)
            self._split[num_microbatches] = tuple(map(frozenset, stages))
        return self._split[num_microbatches]

    def share(self, num_microbatches: int, edges: frozenset[Edge], *, training: bool) -> Share:
        """This process's part in a batch of so many micro-batches, whose values cross ``edges``."""
        key = num_microbatches, edges, training
        if key not in self._shares:
            schedule = self.schedule(num_microbatches) if training else self._forward(num_microbatches)
            self._shares[key] = self._made(schedule, _merged(edges, training))
        return self._shares[key]

    def _forward(self, num_microbatches: int) -> Schedule:
        shape = self._built.topology
        return forward_schedule(shape.num_workers, num_microbatches, shape)

    def _made(self, schedule: Schedule, edges: tuple[Edge, ...]) -> Share:
        if self._choice.num_workers > 1:
            program = lower(schedule, edges, self._costs, window=WINDOW)
            actions = (with_reductions(program) if self._reduces else program).actions(self._worker)
            return Share([tuple(action) for action in actions], receipts(program, self._worker))
        timeline = simulate(schedule, None, edges)      # in one process any order that respects the schedule will do
        order = sorted(range(len(timeline.start)), key=lambda i: (timeline.start[i], timeline.stage[i]))
        return Share([(OPS[timeline.op[i]], int(timeline.stage[i]), int(timeline.microbatch[i]), -1) for i in order])


def splits_backward(schedule: Schedule) -> bool:
    """Whether a schedule has input and weight gradients as separate actions."""
    return any((lane.op == I).any() for lane in schedule.lanes)


def _merged(edges: frozenset[Edge], training: bool) -> tuple[Edge, ...]:
    """One edge per pair of stages: with a message that way when any micro-batch has one, back only in training."""
    between: dict[tuple[int, int], list[Edge]] = {}
    for edge in edges:
        between.setdefault((edge.source, edge.target), []).append(edge)
    merged = (Edge(*pair, any(edge.activation for edge in alike), training and any(edge.gradient for edge in alike))
              for pair, alike in sorted(between.items()))
    return tuple(edge for edge in merged if edge.activation or training)
