"""Paths through a step: sums of stages' seconds that no order, or no run of a given order, can be shorter than.

A path is linear in what the stages hold, so it bounds every cut at once.
"""
from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pipeengine.schedules import B, F, I, Schedule, Topology, W
from pipeengine.simulation import Costs, Timeline, Wait, waits

PER_STAGE = ("forward", "input_grad", "weight_grad", "param_bytes", "activation_bytes", "kept_bytes", "whole_bytes")
"""What a stage holds, as a path counts it: seconds of F, I and W of one micro-batch, bytes of parameters, of what F
keeps, of what stays between I and W, and of the micro-batch whose backward runs, computed again or not."""


class Path(NamedTuple):
    """Seconds (or bytes): ``counts[s] @ (what stage s holds)``, plus ``fixed``. ``counts`` is (stages, 7)."""

    counts: np.ndarray
    fixed: float


def any_order(topology: Topology, num_microbatches: int, hops: np.ndarray, end_seconds: np.ndarray,
              end_latency: np.ndarray, whole_backward: bool) -> list[Path]:
    """Paths of every order on this topology: for each worker, the way in to it, all its work, and the way out.

    ``hops[s]`` are the least seconds of a message from stage s to s + 1, either way; ``end_seconds[w]`` what a byte of
    worker w's parameters costs after its last action, ``end_latency[w]`` what that costs anyway. ``whole_backward``: no
    backward is in halves.
    """
    paths, m, stages = [], num_microbatches, topology.num_stages
    for worker in range(topology.num_workers):
        own, first = list(topology.stages_of(worker)), min(topology.stages_of(worker))
        way = float(hops[:first].sum())
        busy = np.zeros((stages, len(PER_STAGE)))
        busy[:first, 0] = 1
        busy[own, :3] += m
        ended = busy.copy()
        ended[own, 3] = end_seconds[worker]
        paths.append(Path(ended, way + float(end_latency[worker])))
        out = busy.copy()
        if not whole_backward:
            out[own, 2] -= m
        out[:first, 1] += 1
        out[:first, 2] += whole_backward
        out[0, 2] += not whole_backward
        home = topology.worker_of[0]
        out[list(topology.stages_of(home)), 3] += end_seconds[home]
        paths.append(Path(out, 2 * way + float(end_latency[home])))
    return paths


class Walk(NamedTuple):
    """The longest path of a simulated step: how often it runs F, I and W of each stage, (stages, 3), how often it
    crosses each boundary, and the worker on which it ends."""

    counts: np.ndarray
    crossed: np.ndarray
    own: tuple[int, ...]
    worker: int

    def path(self, hops: np.ndarray, end_seconds: np.ndarray, end_latency: np.ndarray) -> Path:
        """It as a bound of every cut. Messages count with the least that they could take at any."""
        counts = np.zeros((len(self.counts), len(PER_STAGE)))
        counts[:, :3] = self.counts
        counts[list(self.own), 3] = end_seconds[self.worker]
        return Path(counts, float(end_latency[self.worker]) + float(self.crossed @ hops))


def longest(schedule: Schedule, costs: Costs, timeline: Timeline, edges: tuple) -> Walk:
    """The longest path of a simulated step."""
    actions = timeline.op < 4
    end = timeline.end[actions]
    return walked(schedule, timeline.start[actions], end, waits(schedule, edges, costs),
                  _last_worker(schedule, costs, end))


def walked(schedule: Schedule, start: np.ndarray, end: np.ndarray, columns: tuple[Wait, ...], worker: int) -> Walk:
    """The longest path back from the end of ``worker``'s lane, given when every action starts and ends."""
    lanes, (op, stage, _) = schedule.starts, schedule.columns
    counts, crossed = (np.zeros(shape) for shape in ((schedule.topology.num_stages, 3),
                                                     schedule.topology.num_stages - 1))
    at, is_first = int(lanes[worker + 1]) - 1, set(lanes[:-1].tolist())
    while at >= 0:
        counts[stage[at]] += _COUNTED[op[at]]
        before = at - 1 if at not in is_first else -1
        if before < 0 or end[before] < start[at] * (1 - 1e-12):
            reached, before = (end[before] if before >= 0 else 0.0), before
            for on, latency in columns:
                if on[at] >= 0 and end[on[at]] + latency[at] > reached + 1e-15 * abs(reached):
                    reached, before = end[on[at]] + latency[at], int(on[at])
            if before >= 0 and before != at - 1:
                low, high = sorted((int(stage[before]), int(stage[at])))
                if high - low == 1:
                    crossed[low] += 1
        at = before
    return Walk(counts, crossed, schedule.topology.stages_of(worker), worker)


_COUNTED = np.zeros((4, 3))
_COUNTED[F, 0] = _COUNTED[B, 1] = _COUNTED[B, 2] = _COUNTED[I, 1] = _COUNTED[W, 2] = 1


def _last_worker(schedule: Schedule, costs: Costs, end: np.ndarray) -> int:
    """The worker that ends last, its update included."""
    update = np.bincount(schedule.topology.worker_of, costs.optimizer, schedule.topology.num_workers)
    return int((end[schedule.starts[1:] - 1] + update).argmax())


class _Same:
    """A schedule as the key of a cache, equal to itself alone."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def __hash__(self) -> int:
        return id(self.schedule)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.schedule is self.schedule


def fullest_moments(schedule: Schedule, kept_factor: float) -> tuple[tuple[int, Path], ...]:
    """Per worker, what it holds at the least, in bytes, at the moments of its lane when it holds most.

    Whole micro-batches from F to B or I, halves from I to W, and gradients once there has been a B or W. The last
    backward of each stage is such a moment: then even what recomputes is whole. ``kept_factor`` is what stays all the
    time per byte of parameters.
    """
    return _fullest_moments(_Same(schedule), kept_factor)


@lru_cache(maxsize=64)
def _fullest_moments(same: _Same, kept_factor: float) -> tuple[tuple[int, Path], ...]:
    schedule = same.schedule
    paths, stages = [], schedule.topology.num_stages
    for worker, (op, stage, _) in enumerate(schedule.lanes):
        own = list(schedule.topology.stages_of(worker))
        step = np.zeros((2, len(op), len(own)))
        column = np.searchsorted(own, stage)
        step[0, np.arange(len(op)), column] = np.array([1, -1, -1, 0])[op]
        step[1, np.arange(len(op)), column] = np.array([0, 0, 1, -1])[op]
        whole, half = np.cumsum(step, axis=1)
        grown = np.zeros((len(op), len(own)), bool)
        grown[np.arange(len(op)), column] = (op == B) | (op == W)
        grown = np.maximum.accumulate(grown)
        moments = {int(each.argmax()) for each in (whole.sum(1), (whole + half).sum(1),
                                                   np.where(grown.all(1), (whole + half).sum(1), -1.0))} | {len(op) - 1}
        for moment in sorted(moments):
            counts = np.zeros((stages, len(PER_STAGE)))
            counts[own, 3] = kept_factor + grown[moment]
            counts[own, 4], counts[own, 5] = whole[moment], half[moment]
            paths.append((worker, Path(counts, 0.0)))
        for number in own:
            moment = int(np.flatnonzero((stage == number) & ((op == B) | (op == I)))[-1]) - 1
            counts = np.zeros((stages, len(PER_STAGE)))
            counts[own, 3] = kept_factor + grown[moment]
            counts[own, 4], counts[own, 5] = whole[moment], half[moment]
            counts[number, 4] -= 1.0
            counts[number, 6] = 1.0
            paths.append((worker, Path(counts, 0.0)))
    return tuple(paths)
