"""The best chain of ideals: exact dynamic programming over antichains."""
from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from partitioners.solvers.ideal_pricing import IdealPricer
from partitioners.solvers.ideals import MARGIN, NARROW, REMEMBERED, Ideals, TooMany, reference_loads
from partitioners.solvers.problem import Kind, Problem, reorder
from partitioners.solvers.segments import states


@dataclass(frozen=True)
class Chain:
    """A chain of ideals as stages: items per stage, the level of each, the largest load."""
    stages: tuple[tuple[int, ...], ...]
    levels: tuple[int, ...]
    bottleneck: float


def best_chain(problem: Problem, known: float, *, limit: int, deadline: float) -> Chain | None:
    """The best stages, or None if nothing beats ``known``. Raises ``TooMany`` beyond ``limit`` ideals or ``deadline``.

    Either answer is exact: a chain is optimal, None proves that no solution is below ``known``.
    """
    search = ChainSearch(Ideals(problem, limit), known * (1 - MARGIN), deadline)
    ahead = search.width()
    if ahead > NARROW:
        # A bottleneck near the outputs shows at once from there, and only at the very end from the inputs.
        back = ChainSearch(Ideals(backwards(problem), limit), known * (1 - MARGIN), deadline)
        if back.width() < ahead:
            chain = back.run()
            last = len(problem) - 1
            return chain and Chain(
                tuple(tuple(last - item for item in reversed(stage)) for stage in chain.stages[::-1]),
                tuple(
                    len(problem.levels) - 1 - level if problem.counts is None else level for level in chain.levels[::-1]
                ),
                chain.bottleneck,
            )
    return search.run()


def backwards(problem: Problem) -> Problem:
    """The mirror image: items, edges and ordered levels turned round."""
    turned = reorder(problem, list(range(len(problem)))[::-1])
    return replace(turned, edges=tuple((v, u) for u, v in turned.edges),
                   levels=problem.levels if problem.counts is not None else problem.levels[::-1])


class ChainSearch:
    """One push pass over all states of devices used."""

    def __init__(self, ideals: Ideals, target: float, deadline: float) -> None:
        problem = self.problem = ideals.problem
        self.ideals, self.target, self.deadline = ideals, target, deadline
        self.pricers = {kind: IdealPricer(ideals, kind) for kind in dict.fromkeys(problem.levels)}
        self.order, self.ways = states(problem)
        self.must = None
        if problem.must_hold is not None:
            self.must = ideals.sums(problem.must_hold.astype(float))
        self.rates = [_rate(problem, kind) for kind in problem.levels]
        self.total = float(ideals.work[-1])
        self.alike = self._alike_windows()
        self.reach: dict = {self.order[0]: np.full(len(ideals), np.inf)}
        self.reach[self.order[0]][0] = 0.0
        self.parent: dict = {}
        self.cheapest: dict = {}
        self.known: dict = {}
        self.room = REMEMBERED if len(self.order) > 3 else 0

    def capacity(self, state: tuple[int, ...], rest: bool) -> float:
        """Reference work, in seconds of the reference device, that the devices used in ``state`` (or the ``rest``) can
        do below the target."""
        total = 0.0
        if not np.isfinite(self.target):
            return np.inf
        for level in range(len(self.problem.levels)):
            if self.problem.counts is None:
                used = int(level < state[0])
                number = 1 - used if rest else used
            else:
                number = self.problem.counts[level] - state[level] if rest else state[level]
            if number:
                total += number * self.rates[level]
        return total * self.target

    def window(self, state: tuple[int, ...]) -> np.ndarray:
        """Ideals that a better solution may pass with the devices of ``state`` used."""
        if self.alike is not None:
            return self.alike[sum(state)]
        work = self.ideals.work
        spent, left = self.capacity(state, rest=False), self.capacity(state, rest=True)
        slack = 1e-12 * self.total
        return (work <= spent + slack) & (self.total - work <= left + slack)

    def _alike_windows(self) -> list[np.ndarray] | None:
        """Windows by number of stages, where all pay the same prices for the same work.

        The first j stages together pay at least their work, the cut of the last ideal, and twice that of each before;
        the i-th of those is itself in the i-th window. So do the stages to come.
        """
        kinds = list(self.pricers)
        pricer = self.pricers[kinds[0]]
        links = {(kind.link_in, kind.link_out) for kind in kinds}
        if (len(links) > 1 or not pricer.symmetric or not all(kind.device.pays_link for kind in kinds)
                or any(rate != 1.0 for rate in self.rates) or not np.isfinite(self.target)
                or (self.problem.counts is None and self.problem.allow_empty)):
            return None
        work, stages = self.ideals.work, self.problem.num_stages
        cut = pricer.cut_in if pricer.pays else np.zeros(len(work))
        spent, left = work + cut, self.total - work + cut
        slack, smallest = 1e-12 * self.total, np.zeros(stages + 1)
        proper = (np.arange(len(work)) > 0) & (np.arange(len(work)) < len(work) - 1)
        windows: list[np.ndarray] = []
        for _ in range(2):
            paid = np.concatenate(([0.0, 0.0], 2 * np.cumsum(smallest[1:stages])))
            windows = []
            for used in range(stages + 1):
                # Not every device need be used, so the roomiest number of stages counts.
                room = np.arange(stages + 1) * self.target - paid
                rest = max((more * self.target - 2 * smallest[used + 1:used + more].sum()
                            for more in range(stages - used + 1)), default=0.0)
                windows.append((spent <= room[used] + slack) & (left <= rest + slack))
            smallest = np.array([cut[window & proper].min(initial=np.inf) for window in windows])
            smallest[~np.isfinite(smallest)] = 0.0
        return windows

    def width(self) -> int:
        """How many ideals one stage from the empty one reaches."""
        count = 0
        for after in self.order:
            for before, level in self.ways[after]:
                if before == self.order[0]:
                    window = self.window(after)
                    others, _ = self._stages_from(0, level, *_bounds(window))
                    count += int(window[others].sum())
        return count

    def run(self) -> Chain | None:
        """The best chain below the target, or None, which proves that there is none. Raises ``TooMany``."""
        ends = self.order if self.problem.allow_empty else [self.order[-1]]
        coming: dict = {}
        for state in self.order:
            for before, level in self.ways[state]:
                coming.setdefault(before, []).append((state, level))
        best, best_end = np.inf, None
        for state in self.order:
            reach = self.reach.get(state)
            if reach is None:
                continue
            if state in ends and reach[-1] < min(best, self.target):
                best, best_end = float(reach[-1]), state
                self.target = best
            self._push_all(state, coming.get(state, ()))
        return None if best_end is None else self._walk_back(best_end, best)

    def _push_all(self, state: tuple[int, ...], coming) -> None:
        if not coming:
            return
        reach = self.reach[state]
        for after, _ in coming:
            self.reach.setdefault(after, np.full(len(reach), np.inf))
            self.parent.setdefault(after, np.full(len(reach), -1, np.int64))
        alive = reach < self.target
        if self.problem.allow_empty:
            alive &= self._undominated(state, reach, coming)
        windows = {after: self.window(after) for after, _ in coming}
        bounds = {after: _bounds(window) for after, window in windows.items()}
        for count, ideal in enumerate(np.flatnonzero(alive).tolist()):
            if count % 64 == 63 and time.monotonic() > self.deadline:
                raise TooMany("the time is up")
            for after, level in coming:
                self._push(ideal, float(reach[ideal]), after, level, *bounds[after], windows[after])

    def _undominated(self, state: tuple[int, ...], reach: np.ndarray, coming) -> np.ndarray:
        """Ideals that no state with fewer devices reaches as cheaply; an ordered device may also stay idle."""
        if self.problem.counts is None:
            for after, _ in coming:
                better = reach < self.reach[after]
                self.reach[after][better] = reach[better]
                self.parent[after][better] = -2
            return np.ones(len(reach), bool)
        fewer = [self.cheapest[before] for before, _ in self.ways[state] if before in self.cheapest]
        best = np.min(fewer, axis=0) if fewer else np.full(len(reach), np.inf)
        self.cheapest[state] = np.minimum(best, reach)
        return reach < best

    def _push(self, ideal: int, value: float, after: tuple[int, ...], level: int, low: int, high: int,
              window: np.ndarray) -> None:
        others, loads = self._stages_from(ideal, level, low, high)
        reach = self.reach[after]
        loads = np.maximum(loads, value)
        better = (loads < reach[others]) & window[others]
        others = others[better]
        reach[others] = loads[better]
        self.parent[after][others] = ideal * len(self.problem.levels) + level

    def _stages_from(self, ideal: int, level: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        """Ideals in ``low .. high`` that one stage of ``level`` leads to below the target, and its loads.

        Kept for the next state while memory allows, for then the stage from an ideal is always the same.
        """
        ideals, kind = self.ideals, self.problem.levels[level]
        known = self.known.get((kind, ideal))
        if known is not None and known[2] <= low and high <= known[3]:
            return known[:2]
        if self.room > 0:
            high = len(ideals)
        start, rate = low, self.rates[level]
        low = max(low, ideal + 1)
        stop = high
        if np.isfinite(rate):
            reachable = ideals.work[ideal] + self.target * rate + 1e-12 * self.total
            stop = min(high, int(np.searchsorted(ideals.work, reachable, side="right")))
        if low >= stop:
            return np.zeros(0, int), np.zeros(0)
        loads = self.pricers[kind].loads(ideal, low, stop)
        good = loads < self.target
        if self.must is not None:
            good &= self.must[low:stop] > self.must[ideal]
        good = np.flatnonzero(good)
        answer = good + low, loads[good]
        if self.room > 0:
            self.room -= len(good) + 64
            self.known[kind, ideal] = (*answer, start, high)
        return answer

    def _walk_back(self, state: tuple[int, ...], bottleneck: float) -> Chain:
        stages, levels, ideal = [], [], len(self.ideals) - 1
        while self.ways[state]:
            code = int(self.parent[state][ideal])
            if code == -2:
                state = self.ways[state][0][0]
                continue
            if code == -1:
                break
            before, level = divmod(code, len(self.problem.levels))
            held = set(self.ideals.items(before))
            stages.append(tuple(item for item in self.ideals.items(ideal) if item not in held))
            levels.append(level)
            state = next(previous for previous, used in self.ways[state] if used == level)
            ideal = before
        return Chain(tuple(reversed(stages)), tuple(reversed(levels)), bottleneck)


def _bounds(window: np.ndarray) -> tuple[int, int]:
    inside = np.flatnonzero(window)
    return (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)


def _rate(problem: Problem, kind: Kind) -> float:
    """Most reference work that one second of ``kind`` can do."""
    mine, reference = problem.times[kind.device], reference_loads(problem)
    done = np.isfinite(mine) & (reference > 0)
    if not done.any():
        return 0.0
    if (mine[done] == 0).any():
        return np.inf
    return float((reference[done] / mine[done]).max())
