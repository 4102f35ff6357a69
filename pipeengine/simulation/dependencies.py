"""What each action of a schedule waits for, as columns."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeengine.schedules import Edge, Schedule
from pipeengine.simulation.costs import Costs
from pipeengine.simulation.critical_path import Wait


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
