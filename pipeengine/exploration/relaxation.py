"""Every way to cut a chain, at once: the cut that is cheapest for given prices, among those that memory allows.

The dynamic programme behind all bounds: prices are linear in what a stage holds, so a stage from place a to place b
costs ``C[b] - C[a]``, and the places where it may start, given where it ends, are a window.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pipeengine.exploration.chain import Chain, Figures
from pipeengine.exploration.paths import PER_STAGE, Path, fullest_moments
from pipeengine.schedules import Schedule

_SLACK = 1e-9
Cut = tuple[tuple[int, ...], tuple[bool, ...]]
"""Places of the cuts, both ends included; and which stages recompute."""


def holdings(chain: Chain, recompute: str) -> tuple[np.ndarray, ...]:
    """Sums up to every place of what paths count, plain and recomputing: (7, places) each.

    A whole stage that recomputes keeps what it receives, which is left out: it depends on where the stage starts.
    """
    has_halves = chain.plain.weight_grad.any()

    def rows(figures: Figures, keeps: bool = True) -> np.ndarray:
        weight = figures.weight_grad if has_halves else figures.backward / 2
        whole = chain.sums(figures.activation_bytes)
        return np.stack([chain.sums(figures.forward), chain.sums(figures.backward - weight), chain.sums(weight),
                         chain.own_parameters, whole * keeps, chain.sums(figures.kept_bytes), whole])
    whole = replace(chain.plain, backward=chain.plain.backward + chain.plain.forward)
    again = {"stages": lambda: (rows(whole, False),), "blocks": lambda: (rows(chain.again),), "none": lambda: ()}
    return rows(chain.plain), *again[recompute]()


@dataclass
class Relaxation:
    """Windows and sums for one point. ``starts[o][s][b]``: the first place where stage s may start that ends at b,
    plain (o = 0) or recomputing (o = 1)."""

    num_stages: int
    sums: Sequence[np.ndarray]
    last_start: np.ndarray
    starts: list[np.ndarray]
    limits: list[Path] = field(default_factory=list)
    limit_workers: list[int] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    least: list[float] = field(default_factory=list)
    scale: float = 1.0

    @classmethod
    def of(cls, chain: Chain, schedule: Schedule, memory: float | None, kept_factor: float,
           recompute: str) -> Relaxation:
        """The windows that ``memory`` bytes per worker leave."""
        size, topology = len(chain) + 1, schedule.topology
        last = np.searchsorted(chain.must_hold, chain.must_hold) - 1
        sums = holdings(chain, recompute)
        relaxed = cls(topology.num_stages, sums, last, [np.zeros((topology.num_stages, size), np.int64) for _ in sums])
        if memory is None:
            return relaxed
        room = memory * (1 + _SLACK)
        for worker, moment in fullest_moments(schedule, kept_factor):
            for option, held in enumerate(sums):
                for stage in topology.stages_of(worker):
                    relaxed._narrow(option, stage, moment.counts[stage] @ held, room)
            if topology.num_stages > topology.num_workers:
                relaxed.limits.append(Path(moment.counts / memory, -1.0))
                relaxed.limit_workers.append(worker)
        return relaxed

    def _narrow(self, option: int, stage: int, need: np.ndarray, room: float) -> None:
        starts = self.starts[option][stage]
        np.maximum(starts, np.searchsorted(need, need - room), out=starts)

    def add(self, path: Path, cutoff: float) -> None:
        """Keep a path; stages that make it longer than ``cutoff`` seconds by themselves are out."""
        self.paths.append(path)
        self.least.append(self._least(path) if self.num_stages > 1 else -np.inf)
        self._exclude(len(self.paths) - 1, cutoff)

    def narrow(self, cutoff: float) -> None:
        """Put out the stages that make any path so far longer than ``cutoff`` seconds."""
        for number in range(len(self.paths)):
            self._exclude(number, cutoff)

    def copy(self) -> Relaxation:
        """The same, to narrow without changing this one."""
        return replace(self, starts=[each.copy() for each in self.starts], paths=list(self.paths),
                       least=list(self.least))

    def _least(self, path: Path) -> float:
        """Seconds that every cut has on this path, if each stage counted as the one that counts least."""
        even = Path(np.tile(path.counts.min(axis=0), (self.num_stages, 1)), path.fixed)
        alone = replace(self, paths=[even], limits=[])
        return alone.cheapest(np.ones(1))[0] if even.counts.any() else path.fixed

    def _exclude(self, number: int, cutoff: float) -> None:
        room = cutoff * (1 + _SLACK) - self.least[number]
        if not np.isfinite(room):
            return
        counts = self.paths[number].counts
        often = counts[:, :3].max(axis=1)
        for option, sums in enumerate(self.sums):
            need = (counts - counts.min(axis=0)) @ sums
            for stage in np.flatnonzero(often > 0.5 * often.max()).tolist():
                self._narrow(option, stage, need[stage], max(room, -1.0))

    def most_even(self) -> Cut | None:
        """The cut whose longest stage (seconds of all actions of a micro-batch) is shortest; None if none is allowed.

        Of equals, the one with the least work in all.
        """
        loads = [sums[:3].sum(axis=0) for sums in self.sums]
        low, high = 0.0, float(loads[-1][-1])
        if not self._within(loads, high * 2):
            return None
        while high - low > 1e-4 * high:
            middle = 0.5 * (low + high)
            low, high = (low, middle) if self._within(loads, middle) else (middle, high)
        limited = Relaxation(self.num_stages, self.sums, self.last_start, [each.copy() for each in self.starts])
        for option, load in enumerate(loads):
            for stage in range(self.num_stages):
                limited._narrow(option, stage, load, high)
        ones = np.zeros((self.num_stages, len(PER_STAGE)))
        ones[:, :3] = 1.0
        limited.paths.append(Path(ones, 0.0))
        return limited.cheapest(np.ones(1))[1]

    def _within(self, loads: list[np.ndarray], most: float) -> bool:
        """Whether some cut has no stage above ``most`` seconds."""
        reached = np.zeros(len(self.last_start), bool)
        reached[0] = True
        after = self.last_start + 1
        for stage in range(self.num_stages):
            counts, now = np.concatenate(([0], np.cumsum(reached))), np.zeros(len(reached), bool)
            for load, starts in zip(loads, self.starts):
                first = np.maximum(starts[stage], np.searchsorted(load, load - most * (1 + _SLACK)))
                now |= counts[np.maximum(after, first)] > counts[first]
            reached = now
        return bool(reached[-1])

    def cheapest(self, weights: np.ndarray) -> tuple[float, Cut | None]:
        """Seconds that no cut beats by the weighted rows, and a cut that has just these; (inf, None) if there is none.

        ``weights`` are of the paths, then of the limits. A limit's row is ``scale`` seconds, and as many more as its
        worker is above its memory: a cut that fits gains nothing from it.
        """
        least, cut = self._least_sum([*self.paths, *self.limits], weights * self._scales())
        return least / max(float(weights[:len(self.paths)].sum()), 1e-9), cut

    def least_excess(self, weights: np.ndarray) -> tuple[float, Cut | None]:
        """How far the workers are above their memory on the weighted average, as a share, for the cut that is best at
        that: above 0, no cut fits. ``weights`` are of the limits, and add up to 1."""
        return self._least_sum(self.limits, weights)

    def _least_sum(self, rows: list[Path], weights: np.ndarray) -> tuple[float, Cut | None]:
        """The least weighted sum of ``rows`` of all cuts, and the cut that has it."""
        counts = np.tensordot(weights, np.stack([row.counts for row in rows]), 1)
        prices = [counts @ sums for sums in self.sums]
        size = len(self.last_start)
        value = np.full(size, np.inf)
        value[0] = 0.0
        values = [value]
        for stage in range(self.num_stages):
            best = np.full(size, np.inf)
            for price, starts in zip(prices, self.starts):
                least = _window_minima(values[-1] - price[stage], starts[stage], self.last_start)
                np.minimum(best, least + price[stage], out=best)
            values.append(best)
        if not np.isfinite(values[-1][-1]):
            return np.inf, None
        fixed = float(weights @ np.array([row.fixed for row in rows]))
        return float(values[-1][-1]) + fixed, self._walk_back(values, prices)

    def memory_prices(self, path_weights: np.ndarray) -> np.ndarray:
        """Weights of the limits at which to recompute costs the paths' seconds just what the bytes freed are worth.

        At these, memory that is short is paid with the least work that makes up for it.
        """
        slower, freed = (self.sums[-1] - self.sums[0])[:3, -1], (self.sums[0] - self.sums[-1])[4:, -1]
        dear = np.tensordot(path_weights, np.stack([path.counts for path in self.paths]), 1)[:, :3] @ slower
        bytes_of = np.stack([limit.counts[:, 4:] @ freed for limit in self.limits])
        own = np.stack([limit.counts[:, 3] > 0 for limit in self.limits])
        gained, cost = bytes_of.sum(axis=1), np.where(own, dear, 0.0).sum(axis=1)
        best = np.zeros(len(self.limits))
        for worker in set(self.limit_workers):
            rows = np.flatnonzero(np.array(self.limit_workers) == worker)
            row = rows[gained[rows].argmax()]
            if gained[row] > 0:
                best[row] = cost[row] / (gained[row] * self.scale)
        return best

    def forced(self, flags: Sequence[bool]) -> Relaxation:
        """The same where it is settled which stages recompute."""
        made, never = self.copy(), len(self.last_start)
        for stage, flag in enumerate(flags):
            made.starts[not flag][stage] = never
        return made

    def _scales(self) -> np.ndarray:
        return np.concatenate((np.ones(len(self.paths)), np.full(len(self.limits), self.scale)))

    def _walk_back(self, values: list[np.ndarray], prices: list[np.ndarray]) -> Cut:
        place, cuts, flags = len(self.last_start) - 1, [len(self.last_start) - 1], []
        for stage in reversed(range(self.num_stages)):
            choices = []
            for option, (price, starts) in enumerate(zip(prices, self.starts)):
                low, high = int(starts[stage][place]), int(self.last_start[place]) + 1
                if low < high:
                    sums = values[stage][low:high] - price[stage][low:high]
                    choices.append((float(sums.min() + price[stage][place]), option, low + int(sums.argmin())))
            _, option, place = min(choices)
            cuts.append(place)
            flags.append(bool(option))
        return tuple(reversed(cuts)), tuple(reversed(flags))

    def over(self, cut: Cut) -> np.ndarray:
        """The share by which every limit is passed for one cut; below 0 where it is kept."""
        return self._of(cut, self.limits)

    def lengths(self, cut: Cut) -> np.ndarray:
        """Seconds of every path for one cut, then of every limit: ``scale`` where it is just kept, more where not."""
        base = np.concatenate((np.zeros(len(self.paths)), np.full(len(self.limits), self.scale)))
        return self._of(cut, [*self.paths, *self.limits]) * self._scales() + base

    def _of(self, cut: Cut, rows: list[Path]) -> np.ndarray:
        places, flags = cut
        held = np.stack([self.sums[int(flag)][:, b] - self.sums[int(flag)][:, a]
                         for a, b, flag in zip(places, places[1:], flags)])
        return np.array([float((row.counts * held).sum()) + row.fixed for row in rows])


def _window_minima(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """``min(values[starts[i]: ends[i] + 1])`` for every i; inf where that is empty."""
    length = ends - starts + 1
    longest = int(length.max(initial=0))
    result = np.full(len(values), np.inf)
    if longest <= 0:
        return result
    tables, span = [values], 1
    while 2 * span <= longest:
        before = tables[-1]
        tables.append(np.minimum(before, np.append(before[span:], np.full(span, np.inf))))
        span *= 2
    some = np.flatnonzero(length > 0)
    level = np.frexp(length[some])[1] - 1
    stacked = np.stack(tables)
    low = stacked[level, starts[some]]
    high = stacked[level, ends[some] + 1 - (1 << level)]
    result[some] = np.minimum(low, high)
    return result


def balance(lengths: np.ndarray, rounds: int = 400) -> np.ndarray:
    """Weights of the rows (paths) for which the cheapest column (cut) is as dear as can be, nearly.

    Both sides match their regrets, in turns, late rounds counting most (Tammelin, Solving large imperfect information
    games using CFR+, arXiv 2014). Any weights give a true bound; these give a good one.
    """
    low, high = float(lengths.min()), float(lengths.max())
    rows, columns = (np.full(size, 1.0 / size) for size in lengths.shape)
    if high <= low:
        return rows
    scaled, total = (lengths - low) / (high - low), np.zeros(len(rows))
    for_rows, for_columns = np.zeros(len(rows)), np.zeros(len(columns))
    for number in range(1, rounds + 1):
        gained = scaled @ columns
        for_rows, rows = _matched(for_rows + gained - rows @ gained, rows)
        lost = rows @ scaled
        for_columns, columns = _matched(for_columns + columns @ lost - lost, columns)
        total += number ** 2 * rows
    return total / total.sum()


def _matched(regrets: np.ndarray, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The regrets that count, and weights in proportion to them; as before, where there are none."""
    regrets = np.maximum(regrets, 0.0)
    whole = regrets.sum()
    return regrets, regrets / whole if whole > 0 else before
