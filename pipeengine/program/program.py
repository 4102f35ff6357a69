"""A schedule with its messages: what each worker computes, sends and posts receives for, in order."""
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from pipeengine.errors import ScheduleError
from pipeengine.schedules import NOT_ACTIONS, Edge, InLanes, Lane, Schedule, Topology
from pipeengine.simulation import OPS, RA, RG, SA, SG, R


class Action(NamedTuple):
    """One line of a program. ``peer`` is the other stage of a message, -1 for computation; the sum of a stage's
    gradients among replicas (``R``) has no micro-batch, -1."""
    op: str
    stage: int
    microbatch: int
    peer: int

    def __str__(self) -> str:
        return f"{self.stage}{self.op}" + (str(self.microbatch) if self.microbatch >= 0 else "") + (
            f"@{self.peer}" if self.peer >= 0 else "")


class ProgramLane(NamedTuple):
    """What one worker does, in order, as columns; ``op`` indexes ``timeline.OPS``."""
    op: np.ndarray
    stage: np.ndarray
    microbatch: np.ndarray
    peer: np.ndarray


@dataclass(frozen=True, eq=False)
class Program(InLanes[ProgramLane]):
    """A schedule with its messages: per worker, what to compute, send and post a receive for, in order.

    ``planned`` may hold a time per line that puts all messages in one order; ``check`` verifies that and is then
    faster.
    """
    name: str
    topology: Topology
    num_microbatches: int
    edges: tuple[Edge, ...]
    lanes: tuple[ProgramLane, ...]
    planned: tuple[np.ndarray, ...] | None = None

    def __repr__(self) -> str:
        return (f"<Program {self.name}: {sum(len(lane.op) for lane in self.lanes)} lines on {len(self.lanes)} workers, "
                f"{self.num_microbatches} micro-batches>")

    @cached_property
    def schedule(self) -> Schedule:
        """The computations alone."""
        kept = (np.flatnonzero(lane.op < SA) for lane in self.lanes)
        lanes = tuple(Lane(lane.op[keep], lane.stage[keep], lane.microbatch[keep])
                      for lane, keep in zip(self.lanes, kept))
        return Schedule(self.name, self.topology, self.num_microbatches, lanes)

    def actions(self, worker: int) -> list[Action]:
        """``worker``'s lines in order."""
        return [Action(OPS[op], *rest) for op, *rest in zip(*(column.tolist() for column in self.lanes[worker]))]

    def to_text(self) -> str:
        """One line per worker, as a schedule's text, with messages as ``stage op micro-batch @ other stage``."""
        return "".join(",".join(map(str, self.actions(worker))) + "\n" for worker in range(len(self.lanes)))


    @classmethod
    def from_text(cls, text: str, *, topology: Topology, edges: Sequence[Edge] | None = None, name: str = "custom",
                  num_microbatches: int | None = None) -> Program:
        """Read what ``to_text`` writes, or torch's lowered CSV (``0SEND_F1``, between neighbouring stages)."""
        rows = [[_cell(cell) for cell in re.split(r"[,;()]|OVERLAP_F_B", row)
                 if cell.strip() and not re.fullmatch(NOT_ACTIONS, cell.strip())] for row in text.strip().splitlines()]
        lanes = tuple(ProgramLane(*(np.array(column, kind) for column, kind in
                                    zip(zip(*row) if row else ((),) * 4, (np.uint8, *(np.int32,) * 3))))
                      for row in rows)
        if num_microbatches is None:
            num_microbatches = 1 + max(int(lane.microbatch.max(initial=-1)) for lane in lanes)
        return cls(name, topology, num_microbatches, tuple(topology.chain() if edges is None else edges), lanes)
_TORCH = {"SEND_F": (SA, 1), "RECV_F": (RA, -1), "SEND_B": (SG, -1), "RECV_B": (RG, 1)}


def _cell(cell: str) -> tuple[int, int, int, int]:
    if (whole := re.fullmatch(r"\s*(\d+)R\s*", cell)) is not None:
        return R, int(whole[1]), -1, -1
    match = re.fullmatch(r"\s*(\d+)(SA|RA|SG|RG|[FBIW]|SEND_[FB]|RECV_[FB])(\d+)(?:@(\d+))?\s*", cell)
    if match is None:
        raise ScheduleError(
            f"{cell.strip()!r} is no line of a program; one is a stage, an operation and a micro-batch, "
            "such as 0F3, with the other stage for a message, such as 0SA3@1"
        )
    stage, op, microbatch, peer = int(match[1]), match[2], int(match[3]), match[4]
    if op in _TORCH:
        code, step = _TORCH[op]
        return code, stage, microbatch, stage + step
    return OPS.index(op), stage, microbatch, -1 if peer is None else int(peer)

# Buffers do not grow with the number of micro-batches.
WINDOW = 2              # receives of one boundary that wait to be read
UNDERWAY = 4            # messages that a worker has sent and not yet asked after
