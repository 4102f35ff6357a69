"""Cuts near a cut: work is moved from the stages on the longest path to others, and each worker recomputes what its
memory asks for. Nothing is played through: all is priced on the paths that are known."""
from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from pipeengine.exploration.paths import fullest_moments
from pipeengine.exploration.relaxation import Relaxation
from pipeengine.exploration.ways import Cut
from pipeengine.exploration.windows import Windows
from pipeengine.schedules import Schedule

_SHARPNESS = 48             # of the norm in place of the largest path: long ones that are not the longest count too
_GAIN = 1e-6
Places = tuple[int, ...]


class Neighbours:
    """Descent from cut to cut on the paths of ``relaxed``, within ``memory`` bytes per worker.

    ``moved`` counts the cuts that were priced.
    """

    def __init__(self, relaxed: Relaxation, schedule: Schedule, memory: float | None, kept_factor: float) -> None:
        self.ways, self.paths, self.memory = relaxed.ways, relaxed.paths, memory or math.inf
        self.own = [schedule.topology.stages_of(worker) for worker in range(schedule.topology.num_workers)]
        self.worker_of, self.moved = schedule.topology.worker_of, 0
        self.whole = isinstance(self.ways, Windows)
        moments: list[list[np.ndarray]] = [[] for _ in self.own]
        for worker, moment in fullest_moments(schedule, kept_factor) if memory is not None else ():
            moments[worker].append(moment.counts[list(self.own[worker])])
        self.moments = [np.stack(each) if each else np.zeros((0, len(own), 7)) for each, own in zip(moments, self.own)]
        self.beside = np.zeros(len(self.own))

    def measure(self, cut: Cut, peaks: tuple[float, ...]) -> None:
        """Learn from a cut's real ``peaks`` what its workers hold beside what is counted here, and keep room for it."""
        held = self.ways.held(cut)
        known = [float(np.einsum("ksc,sc->k", each, held[list(own)]).max(initial=0.0))
                 for each, own in zip(self.moments, self.own)]
        self.beside = np.maximum(np.subtract(peaks, known), 0.0)
        self._fitted: dict[tuple, tuple[int, ...] | None] = {}

    def descend(self, cut: Cut) -> Cut:
        """The best cut that single moves lead to, one after the other."""
        counts = np.stack([path.counts for path in self.paths])
        fixed = np.array([path.fixed for path in self.paths])
        start = self._completed(cut[0])
        if start is None:
            return cut
        held = self.ways.held(start)
        lengths = np.einsum("psc,sc->p", counts, held) + fixed
        for _ in range(4 * len(held)):
            best, goal = None, (1.0 - _GAIN) * _norm(lengths, lengths.max())
            for places in self._moves(start[0], counts[lengths.argmax()]):
                near = self._completed(places)
                if near is None:
                    continue
                changed = [stage for stage in range(len(held)) if near[0][stage:stage + 2] != start[0][stage:stage + 2]
                           or near[1][stage] != start[1][stage]]
                more = self.ways.held(near) - held
                then = lengths + np.einsum("psc,sc->p", counts[:, changed], more[changed])
                value = _norm(then, lengths.max())
                if value < goal:
                    best, goal = (near, then), value
            if best is None:
                break
            start, lengths = best
            held = self.ways.held(start)
        return start

    def _moves(self, places: Places, counts: np.ndarray) -> Iterator[Places]:
        """From each stage that the path counts most, some places to every other stage, through those between."""
        often = counts[:, :3].max(axis=1)
        stages, last = len(often), self.ways.last_start
        steps: list[int] = []
        step = 1
        while step <= max(1, (len(last) - 1) // (2 * stages)):
            steps, step = [*steps, step], 4 * step
        for source in np.flatnonzero(often > 0.5 * often.max()).tolist():
            for target in (stage for stage in range(stages) if stage != source):
                low, high = sorted((source, target))
                for step in steps:
                    shift = -step if target > source else step
                    moved = (*places[:low + 1], *(place + shift for place in places[low + 1:high + 1]),
                             *places[high + 1:])
                    pairs = list(zip(moved[low:high + 1], moved[low + 1:high + 2]))
                    if all(a < b for a, b in pairs) and all(a <= last[b] for a, b in pairs):
                        yield moved

    def _completed(self, places: Places) -> Cut | None:
        """The places with what has to recompute; None where even that does not fit."""
        self.moved += 1
        until = list(places[:-1])
        for worker, own in enumerate(self.own):
            key = (worker, *(places[stage] for stage in own), *(places[stage + 1] for stage in own))
            if key not in self._fitted:
                self._fitted[key] = self._fit(worker, [places[stage] for stage in own],
                                              [places[stage + 1] for stage in own])
            fitted = self._fitted[key]
            if fitted is None:
                return None
            for stage, place in zip(own, fitted):
                until[stage] = place
        return places, tuple(until)

    def _fit(self, worker: int, starts: list[int], ends: list[int]) -> tuple[int, ...] | None:
        """The places up to which a worker's stages recompute: first those of which most micro-batches are held."""
        plain, until = self.ways.sums[0], list(starts)
        moments, room = self.moments[worker], self.memory - self.beside[worker]
        held = plain[:, ends] - plain[:, starts]
        needs = np.einsum("ksc,cs->k", moments, held)
        freed = moments @ (plain - self.ways.sums[-1])          # (moments, stages, places)
        while len(needs) and needs.max() > room:
            moment = int(needs.argmax())
            stage = max(range(len(until)), key=lambda each: (until[each] < ends[each], moments[moment, each, 4]))
            end = ends[stage]
            if until[stage] >= end:
                return None
            if not self.whole:
                enough = freed[moment, stage, until[stage]] + needs[moment] - room
                end = min(max(int(np.searchsorted(freed[moment, stage], enough)), until[stage] + 1), end)
            needs = needs - (freed[:, stage, end] - freed[:, stage, until[stage]])
            until[stage] = end
        return tuple(until)


def _norm(lengths: np.ndarray, scale: float) -> float:
    return float(((lengths / scale) ** _SHARPNESS).sum())
