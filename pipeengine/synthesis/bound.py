"""Seconds that no order can beat."""
from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from pipeengine.schedules import Topology
from pipeengine.simulation import Costs
from pipeengine.synthesis.problem import SLACK, Problem, pose_problem


def lower_bound(
    topology: Topology,
    num_microbatches: int,
    costs: Costs,
    max_peak: float | Sequence[float] | None = None,
) -> float:
    """Seconds that no order on this topology can beat (makespan, activations under ``max_peak``).

    Each action gets a time before which it cannot start and a time that must follow its end, from the actions before
    and after it on its way, from memory, and from its worker's own work. Then each worker alone, allowed to interrupt
    its actions, needs so long (Jackson's preemptive schedule; Carlier, European Journal of Operational Research 1982).
    """
    task = pose_problem(topology, num_microbatches, costs, max_peak, "makespan")
    heads, tails = _earliest(task), _following(task)
    jobs: list[list[tuple[float, float, float]]] = [[] for _ in range(topology.num_workers)]
    for head, tail, seconds in zip(heads, tails, task.seconds):
        for stage, worker in enumerate(topology.worker_of):
            jobs[worker] += [(a, seconds[stage], b) for a, b in zip(head[stage], tail[stage])]
    return max(_alone(work) for work in jobs)


def _earliest(task: Problem) -> list[list[list[float]]]:
    """Per F, I, W, stage and k: when the k-th of them on that stage can start at the earliest."""
    m, stages, (f, i, w) = task.microbatches, task.num_stages, task.seconds
    heads = [[[0.0] * m for _ in range(stages)] for _ in range(3)]
    forward, inputs, weights = heads
    first = [sum(f[:s]) + sum(task.hop[:s + 1]) for s in range(stages)]
    for k in range(m):
        for s in range(stages):
            forward[s][k] = max(first[s] + k * f[s], _room(task, s, k, first[s] + k * f[s], inputs[s]),
                                forward[s - 1][k] + f[s - 1] + task.hop[s] if s else 0.0,
                                forward[s][k - 1] + f[s] if k else 0.0)
        for s in reversed(range(stages)):
            forced = _forced(task, s, k + 1, k)
            inputs[s][k] = max(first[s] + (k + 1) * f[s] + k * i[s] + forced * w[s], forward[s][k] + f[s],
                               inputs[s + 1][k] + i[s + 1] + task.hop[s + 1] if s + 1 < stages else 0.0,
                               inputs[s][k - 1] + i[s] if k else 0.0)
            weights[s][k] = inputs[s][k] + i[s]
    return heads


def _forced(task: Problem, s: int, forwards: int, inputs: int) -> int:
    """How many W must be done before so many F of stage ``s`` have started with so many I done, for want of memory."""
    worker = task.topology.worker_of[s]
    if len(task.topology.stages_of(worker)) > 1:
        return 0
    over = forwards * task.held[s] - inputs * (task.held[s] - task.kept[s]) - task.cap[worker] * (1 + SLACK)
    if over <= 0:
        return 0
    return math.ceil(over / task.kept[s] - SLACK) if task.kept[s] else forwards + 1


def _room(task: Problem, s: int, k: int, busy: float, inputs: Sequence[float]) -> float:
    """When there can be room for F number ``k`` of stage ``s``: the best mixture of I and W done before it.

    ``busy`` is when the forwards alone would be through; ``inputs`` holds the earliest starts of I so far.
    """
    if not _forced(task, s, k + 1, 0):
        return 0.0
    _, i, w = (row[s] for row in task.seconds)
    best = float("inf")
    for done in range(1, k + 1):
        # What comes later ends later; after many tries this is bound enough.
        if inputs[done - 1] + i >= best or done > 200:
            return min(best, inputs[done - 1] + i)
        forced = _forced(task, s, k + 1, done)
        if forced <= done:
            best = min(best, max(inputs[done - 1] + i, busy + done * i + forced * w,
                                 inputs[forced - 1] + i + w if forced else 0.0))
    return best


def _following(task: Problem) -> list[list[list[float]]]:
    """Per F, I, W, stage and k: the least time from the end of the k-th of them on that stage to the last end of
    all."""
    m, stages, (f, i, w) = task.microbatches, task.num_stages, task.seconds
    tails = [[[0.0] * m for _ in range(stages)] for _ in range(3)]
    forward, inputs, _ = tails
    for k in reversed(range(m)):
        for s in range(stages):
            inputs[s][k] = max((m - k) * w[s] + (m - 1 - k) * i[s],
                               inputs[s - 1][k] + i[s - 1] + task.hop[s] if s else 0.0,
                               inputs[s][k + 1] + i[s] if k + 1 < m else 0.0)
        for s in reversed(range(stages)):
            forward[s][k] = max((m - 1 - k) * f[s] + (m - k) * (i[s] + w[s]), inputs[s][k] + i[s],
                                forward[s + 1][k] + f[s + 1] + task.hop[s + 1] if s + 1 < stages else 0.0,
                                forward[s][k + 1] + f[s] if k + 1 < m else 0.0)
    return tails


def _alone(jobs: Sequence[tuple[float, float, float]]) -> float:
    """The least end of jobs (head, seconds, tail) on one worker that may interrupt: the longest tail goes first."""
    waiting = sorted(jobs, reverse=True)
    ready: list[tuple[float, float]] = []
    now, longest = 0.0, 0.0
    while waiting or ready:
        if not ready:
            now = max(now, waiting[-1][0])
        while waiting and waiting[-1][0] <= now:
            _, seconds, tail = waiting.pop()
            heapq.heappush(ready, (-tail, seconds))
        tail, seconds = heapq.heappop(ready)
        spent = min(seconds, waiting[-1][0] - now) if waiting else seconds
        now += spent
        if spent < seconds:
            heapq.heappush(ready, (tail, seconds - spent))
        else:
            longest = max(longest, now - tail)
    return longest
