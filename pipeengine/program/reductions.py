"""Where a program sums the gradients of a stage among the replicas."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipeengine.errors import ScheduleError
from pipeengine.program.program import Program, ProgramLane
from pipeengine.simulation import SA, SG, R


def with_reductions(program: Program) -> Program:
    """``program`` with an R for each stage, after its last action and the messages that this makes.

    A worker starts the sum there and goes on: it hides behind what later-finishing stages still have to do. Programs
    that only run forward stay as they are.
    """
    if program.schedule.forward_only:
        return program
    planned = program.planned or (None,) * len(program.lanes)
    lanes, times = zip(*(_placed(lane, time) for lane, time in zip(program.lanes, planned)))
    return replace(program, lanes=lanes, planned=None if program.planned is None else times)


def _placed(lane: ProgramLane, planned: np.ndarray | None) -> tuple[ProgramLane, np.ndarray | None]:
    computes = lane.op < SA
    at = []
    for stage in np.unique(lane.stage[computes]).tolist():
        line = int(np.flatnonzero(computes & (lane.stage == stage))[-1]) + 1
        while line < len(lane.op) and lane.op[line] in (SA, SG) and lane.stage[line] == stage:
            line += 1                               # others wait for these: they go first
        at.append((line, stage))
    lines, stages = zip(*sorted(at)) if at else ((), ())
    columns = [np.insert(column, lines, values).astype(column.dtype) for column, values in
               zip(lane, ((R,) * len(lines), stages, (-1,) * len(lines), (-1,) * len(lines)))]
    if planned is not None and len(planned):
        planned = np.insert(planned, lines, [planned[line - 1] for line in lines])
    return ProgramLane(*columns), planned


def check_reductions(program: Program, owner: Sequence[int]) -> None:
    """Raise ``ScheduleError`` unless no stage has an R, or each has one, on its worker, after its last action."""
    lines = [(worker, int(i)) for worker, lane in enumerate(program.lanes) for i in np.flatnonzero(lane.op == R)]
    if not lines:
        return
    stages = sorted(int(program.lanes[worker].stage[i]) for worker, i in lines)
    if stages != list(range(program.topology.num_stages)):
        raise ScheduleError(f"{len(lines)} reductions, of stages {stages}, for {program.topology.num_stages} stages; "
                            "give each stage one R, or none")
    for worker, i in lines:
        lane = program.lanes[worker]
        stage = int(lane.stage[i])
        if owner[stage] != worker:
            raise ScheduleError(f"worker {worker} has {stage}R, stage {stage} belongs to worker {owner[stage]}; "
                                "move it there")
        late = np.flatnonzero((lane.op < SA) & (lane.stage == stage) & (np.arange(len(lane.op)) > i))
        if len(late):
            raise ScheduleError(f"worker {worker}, line {i + 1}: {stage}R comes before line {int(late[0]) + 1}, which "
                                f"still runs stage {stage}; move it after the stage's last action")
