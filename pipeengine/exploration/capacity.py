"""How much work each worker can take within so many seconds and its memory, wherever it lies in the model.

Where all workers together take less than there is, no cut is as fast. Unlike prices this knows that a worker
recomputes, and holds, a whole number of pieces.
"""
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pipeengine.exploration.judge import Scene
from pipeengine.exploration.paths import fullest_moments
from pipeengine.exploration.prefixes import Prefixes
from pipeengine.exploration.relaxation import Relaxation
from pipeengine.exploration.ways import SLACK
from pipeengine.schedules import Schedule

_FINE, _TIMES = 60, 400     # kinds of stages by their work, per mean stage; step times that are tried
_MOST_KINDS = 1_500         # that are paired
_MOST_STAGES = 2            # of a worker


class _Pieces(NamedTuple):
    """Stages by kind: what they hold, (stages, 7), where each kind begins, and the most work of a kind, seconds of a
    micro-batch without recomputation."""

    held: np.ndarray
    runs: np.ndarray
    work: np.ndarray


def capacity_bound(relaxed: Relaxation, schedule: Schedule, scene: Scene, lowest: float, highest: float) -> float:
    """Seconds from ``lowest`` to ``highest`` that no cut beats."""
    if not lowest < highest < np.inf or scene.point.stages_per_worker > _MOST_STAGES:
        return lowest
    topology, memory, times = schedule.topology, scene.hardware.memory, np.linspace(lowest, highest, _TIMES)
    total = float(relaxed.ways.sums[0][:3, -1].sum())
    counts, least = relaxed.rows[0][:len(relaxed.paths), :, :3], np.array(relaxed.least)
    extra = counts - counts.min(axis=1, keepdims=True)
    taken, pieces = np.zeros(_TIMES), _pieces(relaxed, schedule, extra, least, highest)
    if pieces is None:
        return lowest
    known = fullest_moments(schedule, scene.state_factor)
    for worker in range(topology.num_workers):
        own = list(topology.stages_of(worker))
        room = highest - least
        number = int((extra[:, own].sum(axis=(1, 2)) / np.maximum(room, 1e-9 * highest)).argmax())
        full = [moment.counts[own] / memory for of, moment in known if of == worker] if memory is not None else []
        moments = np.stack(full) if full else np.zeros((0, len(own), 7))
        taken += _taken(pieces, extra[number][own], moments, times - float(least[number]))
    short = np.flatnonzero(taken < total * (1 - SLACK))
    return float(times[short[-1]]) if len(short) else lowest


def _taken(pieces: _Pieces, often: np.ndarray, moments: np.ndarray, rooms: np.ndarray) -> np.ndarray:
    """The most work that one worker can take within each of ``rooms`` seconds, as its stages count ``often``."""
    loads = [np.minimum.reduceat(pieces.held[:, :3] @ each, pieces.runs) for each in often]
    needs = [[np.minimum.reduceat(pieces.held @ each, pieces.runs) for each in moment] for moment in moments]
    load, work = loads[0], pieces.work
    fits = np.ones(load.shape, bool)
    if len(often) == 2:
        load, work = loads[0][:, None] + loads[1], pieces.work[:, None] + pieces.work
        fits = load <= rooms[-1] * (1 + SLACK)
    for need in needs:
        fits &= (need[0] if len(need) == 1 else need[0][:, None] + need[1]) <= 1 + SLACK
    most = np.zeros(len(rooms) + 1)
    first = np.searchsorted(rooms * (1 + SLACK), load[fits])
    np.maximum.at(most, first, work[fits])
    return np.maximum.accumulate(most[:-1])


def _pieces(relaxed: Relaxation, schedule: Schedule, extra: np.ndarray, least: np.ndarray,
            highest: float) -> _Pieces | None:
    """All stages that no path makes too long, by kind: their work, and how much of it is done again."""
    ways = relaxed.ways
    work = ways.sums[0][:3].sum(axis=0)
    owned = max(float(((highest - least) / np.maximum(extra[:, list(own)].min(axis=2).max(axis=1), 1e-9)).min())
                for own in map(schedule.topology.stages_of, range(schedule.topology.num_workers)))
    ends, starts = np.nonzero((np.arange(len(work)) <= ways.last_start[:, None])
                              & (work[:, None] - work <= owned * (1 + SLACK)) & (work[:, None] > work))
    plain, again = ways.sums[0], ways.sums[-1]
    if isinstance(ways, Prefixes):
        many = ends - starts + 1
        until = np.repeat(starts, many) + np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many)
        starts, ends = np.repeat(starts, many), np.repeat(ends, many)
        held = again[:, until] - again[:, starts] + plain[:, ends] - plain[:, until]
    else:
        held = np.concatenate([each[:, ends] - each[:, starts] for each in ways.sums], axis=1)
        starts, ends = np.tile(starts, len(ways.sums)), np.tile(ends, len(ways.sums))
    if not len(starts):
        return None
    step = float(work[-1]) / schedule.topology.num_stages / _FINE
    amount = work[ends] - work[starts]
    kind = np.round(amount / step).astype(np.int64) * 100_000 + np.round((held[:3].sum(axis=0) - amount) / step).astype(
        np.int64)
    order = np.argsort(kind, kind="stable")
    runs = np.flatnonzero(np.diff(kind[order], prepend=-1))
    if len(runs) > _MOST_KINDS:
        return None
    return _Pieces(np.ascontiguousarray(held.T)[order], runs, np.maximum.reduceat(amount[order], runs))
