"""What a schedule is: which worker holds which stage, and the order in which each worker runs its actions."""
from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from pipeengine.errors import ScheduleError

LETTERS = ("F", "B", "I", "W")
"""Forward, backward, and the two halves of backward: B = I (input gradient) + W (weight gradient)."""
F, B, I, W = range(4)  # noqa: E741 - the letters of the literature


AnyLane = TypeVar("AnyLane", bound=tuple[Any, ...])


@dataclass(frozen=True)
class Edge:
    """A boundary: stage ``source`` hands values to ``target`` for each micro-batch, and gets gradients back."""
    source: int
    target: int
    activation: bool = True
    gradient: bool = True


@dataclass(frozen=True)
class Topology:
    """``worker_of[stage]`` is the worker that holds a stage; a micro-batch runs the stages of one route in order.

    ``routes`` is empty for the usual single route over all stages. With R routes, micro-batch k of m takes
    route ``k * R // m``.
    """
    worker_of: tuple[int, ...]
    routes: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        workers = set(self.worker_of)
        if not workers or workers != set(range(len(workers))):
            raise ScheduleError(f"workers of the stages are {sorted(workers)}; "
                                f"they must be 0 to {max(len(workers) - 1, 0)}, each with at least one stage")

    @classmethod
    def linear(cls, num_workers: int) -> Topology:
        """One stage per worker::

            worker  0 1 2 3
            stage   0 1 2 3
        """
        return cls.looped(num_workers, 1)

    @classmethod
    def looped(cls, num_workers: int, stages_per_worker: int) -> Topology:
        """Round and round::

            worker  0 1 2 3
            stage   0 1 2 3
                    4 5 6 7
        """
        return cls(tuple(range(num_workers)) * stages_per_worker)

    @classmethod
    def v(cls, num_workers: int) -> Topology:
        """There and back, so that worker 0 holds the first and the last stage::

            worker  0 1 2 3
            stage   0 1 2 3
                    7 6 5 4
        """
        return cls.wave(num_workers, 2)

    @classmethod
    def wave(cls, num_workers: int, stages_per_worker: int) -> Topology:
        """There and back again, each turn on the worker that it ends on."""
        there = tuple(range(num_workers))
        return cls(sum((there[::-1] if turn % 2 else there for turn in range(stages_per_worker)), ()))

    @classmethod
    def bidirectional(cls, num_workers: int) -> Topology:
        """Two routes through two copies of the model; stage ``num_workers + s`` is the copy of stage ``s``::

            worker   0 1 2 3
            route 0  0 1 2 3
            route 1  7 6 5 4
        """
        there = tuple(range(num_workers))
        return cls(there + there[::-1], (there, tuple(range(num_workers, 2 * num_workers))))

    @property
    def num_stages(self) -> int:
        """Stages of one copy of the model."""
        return len(self.worker_of)

    @cached_property
    def num_workers(self) -> int:
        """Workers, idle ones included."""
        return max(self.worker_of) + 1

    def stages_of(self, worker: int) -> tuple[int, ...]:
        """The stages that ``worker`` holds, ascending."""
        return tuple(stage for stage, owner in enumerate(self.worker_of) if owner == worker)

    @property
    def num_routes(self) -> int:
        """Copies of the model that micro-batches go through: 2 where they go both ways."""
        return max(len(self.routes), 1)

    @cached_property
    def route_of(self) -> tuple[int, ...]:
        """The route of each stage."""
        route_of = [0] * self.num_stages
        for number, route in enumerate(self.routes):
            for stage in route:
                route_of[stage] = number
        return tuple(route_of)

    def chain(self) -> tuple[Edge, ...]:
        """The edges of a model in which each stage feeds only the next one of its route."""
        routes = self.routes or (tuple(range(self.num_stages)),)
        return tuple(Edge(source, target) for route in routes for source, target in zip(route, route[1:]))

    def visits(self, num_microbatches: int) -> np.ndarray:
        """Boolean (stage, micro-batch) table: which micro-batches run through which stage."""
        route = np.arange(num_microbatches) * self.num_routes // max(num_microbatches, 1)
        return np.asarray(self.route_of)[:, None] == route[None, :]

    def shares(self) -> np.ndarray:
        """The part of its worker's model that each stage is, stages of one worker and route taken as equal."""
        places = list(zip(self.worker_of, self.route_of))
        return np.array([1 / places.count(place) for place in places])


class Lane(NamedTuple):
    """The actions of one worker in order, as columns."""
    op: np.ndarray
    stage: np.ndarray
    microbatch: np.ndarray

    @classmethod
    def of(cls, op: Iterable[int], stage: Iterable[int], microbatch: Iterable[int]) -> Lane:
        """A lane from any sequences of the three columns."""
        return cls(np.asarray(op, np.uint8), np.asarray(stage, np.int32), np.asarray(microbatch, np.int32))


class InLanes(Generic[AnyLane]):
    """What has a lane per worker, read as one table. Columns of a lane are as long as each other, ``op`` first."""
    lanes: tuple[AnyLane, ...]

    @property
    def num_actions(self) -> int:
        """Actions of all workers."""
        return sum(len(lane[0]) for lane in self.lanes)

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each lane begins in ``columns``, and their length last."""
        return np.concatenate([[0], np.cumsum([len(lane[0]) for lane in self.lanes])]).astype(np.int64)

    @cached_property
    def columns(self) -> AnyLane:
        """All lanes one after another."""
        return type(self.lanes[0])(*(np.concatenate(column) for column in zip(*self.lanes)))


@dataclass(frozen=True, eq=False)
class Schedule(InLanes[Lane]):
    """Per worker, the order of its actions; nothing about time, messages or devices.

    ``pairs`` is empty, or says per worker which actions form one block with the next one: a block starts when both
    can, and hands over both results at its end (DualPipe's F beside B).
    """
    name: str
    topology: Topology
    num_microbatches: int
    lanes: tuple[Lane, ...]
    pairs: tuple[np.ndarray, ...] = ()

    def __post_init__(self) -> None:
        if len(self.lanes) != self.topology.num_workers:
            raise ScheduleError(f"schedule {self.name} has lanes for {len(self.lanes)} workers, "
                                f"its topology has {self.topology.num_workers}; give every worker one lane")

    def __repr__(self) -> str:
        return (f"<Schedule {self.name}: {self.topology.num_stages} stages on {self.topology.num_workers} workers, "
                f"{self.num_microbatches} micro-batches>")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Schedule):
            return NotImplemented
        return (self.topology, self.num_microbatches) == (other.topology, other.num_microbatches) and all(
            np.array_equal(a, b) for mine, theirs in zip(self.lanes, other.lanes)
            for a, b in zip(mine, theirs)) and np.array_equal(self.visible, other.visible)

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def visible(self) -> np.ndarray:
        """For each entry of ``columns`` the one at whose end its result is there: itself, or the end of its block."""
        own = np.arange(self.num_actions)
        return own + np.concatenate(self.pairs) if self.pairs else own

    @cached_property
    def tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where each (stage, micro-batch) has its F, its B or I, and its W: indices into ``columns``, -1 for none."""
        op, stage, microbatch = self.columns
        shape, tables = (self.topology.num_stages, self.num_microbatches), []
        for which in (op == F, (op == B) | (op == I), op == W):
            table, where = np.full(shape, -1, np.int64), np.flatnonzero(which)
            table[stage[where], microbatch[where]] = where
            tables.append(table)
        return tuple(tables)

    @cached_property
    def forward_only(self) -> bool:
        """Whether there is no backward at all, as in evaluation."""
        return all(not lane.op.any() for lane in self.lanes)

    def actions(self, worker: int) -> list[tuple[str, int, int]]:
        """``worker``'s (letter, stage, micro-batch), in order."""
        op, stage, microbatch = self.lanes[worker]
        return [(LETTERS[o], s, m) for o, s, m in zip(op.tolist(), stage.tolist(), microbatch.tolist())]

    def to_text(self) -> str:
        """One line per worker, ``stage letter micro-batch`` with commas: ``0F0,0F1,0B0,0B1`` (torch's CSV).

        A block is written as torch does, ``(0F4;7B0)OVERLAP_F_B``.
        """
        return "".join(",".join(self._cells(worker)) + "\n" for worker in range(len(self.lanes)))

    def _cells(self, worker: int) -> list[str]:
        cells = [f"{s}{o}{m}" for o, s, m in self.actions(worker)]
        if self.pairs:
            for i in np.flatnonzero(self.pairs[worker])[::-1].tolist():
                cells[i:i + 2] = [f"({cells[i]};{cells[i + 1]}){_BLOCK}"]
        return cells

    @classmethod
    def from_text(cls, text: str, *, name: str = "custom", topology: Topology | None = None,
                  num_microbatches: int | None = None) -> Schedule:
        """Read what ``to_text`` or torch's ``_dump_csv`` writes; empty cells and those about parameters are skipped.

        Without ``topology``, a stage belongs to the first line that runs it.
        """
        rows = [[action for column, cell in enumerate(row.split(",")) if cell.strip()
                 for action in _cell(cell.strip(), line, column)] for line, row in enumerate(text.strip().splitlines())]
        lanes = tuple(Lane.of(*list(zip(*row))[:3]) if row else Lane.of((), (), ()) for row in rows)
        pairs = tuple(np.array([pair for *_, pair in row], bool) for row in rows)
        if topology is None:
            topology = _owners(lanes)
        if num_microbatches is None:
            num_microbatches = 1 + max((int(lane.microbatch.max()) for lane in lanes if len(lane.op)), default=-1)
        return cls(name, topology, num_microbatches, lanes, pairs if any(pair.any() for pair in pairs) else ())

    def keep(self, num_microbatches: int) -> Schedule:
        """The same order without the micro-batches from ``num_microbatches`` on: complete whenever this one is.

        For a last, smaller batch, where a schedule is not made for so few.
        """
        if num_microbatches > self.num_microbatches or self.topology.num_routes > 1:
            raise ScheduleError(f"schedule {self.name} has {self.num_microbatches} micro-batches on "
                                f"{self.topology.num_routes} routes; keep at most these, of one route, not "
                                f"{num_microbatches}")
        kept = [lane.microbatch < num_microbatches for lane in self.lanes]
        lanes = tuple(Lane(*(column[keep] for column in lane)) for lane, keep in zip(self.lanes, kept))
        both = [pair & keep & np.append(keep[1:], False) for pair, keep in zip(self.pairs, kept)]
        return Schedule(self.name, self.topology, num_microbatches, lanes,
                        tuple(pair[keep] for pair, keep in zip(both, kept)))
_BLOCK = "OVERLAP_F_B"
NOT_ACTIONS = r"\d+(UNSHARD|RESHARD|REDUCE_GRAD)"
"""Cells of torch's tables that are about parameters, not about the order of micro-batches."""


def _cell(cell: str, line: int, column: int) -> list[tuple[int, int, int, bool]]:
    """The actions of a cell: (op, stage, micro-batch, is one block with the next)."""
    if re.fullmatch(NOT_ACTIONS, cell):
        return []
    block = re.fullmatch(rf"\((\S+);(\S+)\){_BLOCK}", cell)
    if block is not None:
        first, second = (_cell(part, line, column)[0] for part in block.groups())
        return [(*first[:3], True), second]
    match = re.fullmatch(r"(\d+)([FBIW])(\d+)", cell)
    if match is None:
        raise ScheduleError(f"line {line + 1}, cell {column + 1} is {cell!r}; "
                            "an action is a stage, one of F B I W, and a micro-batch, such as 0F3")
    return [(LETTERS.index(match[2]), int(match[1]), int(match[3]), False)]


def _owners(lanes: Sequence[Lane]) -> Topology:
    owner: dict[int, int] = {}
    for worker, lane in enumerate(lanes):
        for stage in np.unique(lane.stage).tolist():
            owner.setdefault(stage, worker)
    missing = set(range(max(owner, default=-1) + 1)) - set(owner)
    if missing or not owner:
        raise ScheduleError(f"no line runs stage {min(missing, default=0)}; "
                            f"every stage from 0 to {max(owner, default=0)} must appear")
    return Topology(tuple(owner[stage] for stage in range(len(owner))))


def from_keys(name: str, topology: Topology, num_microbatches: int,
              lanes: Iterable[Sequence[tuple[int, np.ndarray, np.ndarray, np.ndarray]]]) -> Schedule:
    """A schedule from sort keys: each lane is groups of (op, stages, micro-batches, keys), run in order of key."""
    return Schedule(name, topology, num_microbatches, tuple(_by_key(groups) for groups in lanes))


def _by_key(groups: Sequence[tuple[int, np.ndarray, np.ndarray, np.ndarray]]) -> Lane:
    order = np.argsort(np.concatenate([key for *_, key in groups]), kind="stable")
    return Lane(np.repeat(np.array([op for op, *_ in groups], np.uint8), [len(key) for *_, key in groups])[order],
                np.concatenate([stage for _, stage, *_ in groups]).astype(np.int32)[order],
                np.concatenate([microbatch for *_, microbatch, _ in groups]).astype(np.int32)[order])
