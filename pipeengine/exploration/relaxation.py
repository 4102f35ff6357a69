"""Every way to cut a chain, at once: the cut that is cheapest for given prices, among those that memory allows.

The dynamic programme behind all bounds: prices are linear in what a stage holds, so a stage from place a to place b
costs ``C[b] - C[a]``, and the places where it may start, given where it ends, are a window.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pipeengine.exploration.chain import Chain
from pipeengine.exploration.paths import PER_STAGE, Path, fullest_moments
from pipeengine.exploration.prefixes import Prefixes
from pipeengine.exploration.ways import SLACK, Cut, holdings
from pipeengine.exploration.windows import Windows
from pipeengine.schedules import Schedule


@dataclass
class Relaxation:
    """The ways that are left to one point, with the rows that price them: paths in seconds, limits in shares of the
    memory."""

    ways: Windows | Prefixes
    limits: list[Path] = field(default_factory=list)
    limit_workers: list[int] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    least: list[float] = field(default_factory=list)
    scale: float = 1.0
    _leasts: dict[bytes, float] = field(default_factory=dict)
    _rows: tuple[np.ndarray, np.ndarray] | None = None

    @classmethod
    def of(cls, chain: Chain, schedule: Schedule, memory: float | None, kept_factor: float, recompute: str,
           shares: Sequence[float] | None = None) -> Relaxation:
        """The ways that ``memory`` bytes per worker leave; with ``shares``, of which each stage has so much alone."""
        topology = schedule.topology
        last = np.searchsorted(chain.must_hold, chain.must_hold) - 1
        table = Prefixes if recompute == "blocks" else Windows
        relaxed = cls(table.of(holdings(chain, recompute), topology.num_stages, last))
        if memory is None:
            return relaxed
        for worker, moment in fullest_moments(schedule, kept_factor):
            for stage in topology.stages_of(worker):
                room = memory * (1 + SLACK) * (shares[stage] if shares is not None else 1.0)
                relaxed.ways.narrow(stage, moment.counts[stage], room)
            if topology.num_stages > topology.num_workers:
                relaxed.limits.append(Path(moment.counts / memory, -1.0))
                relaxed.limit_workers.append(worker)
        return relaxed

    @property
    def num_stages(self) -> int:
        """Stages of a cut."""
        return self.ways.num_stages

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
        return replace(self, ways=self.ways.copy(), paths=list(self.paths), least=list(self.least),
                       _leasts=dict(self._leasts))

    def _least(self, path: Path) -> float:
        """Seconds that every cut has on this path, if each stage counted as the one that counts least."""
        even = path.counts.min(axis=0)
        if not even.any():
            return path.fixed
        key = even.tobytes()            # many paths go through every stage once, there and back
        if key not in self._leasts:
            self._leasts[key] = self.ways.cheapest(np.tile(even, (self.num_stages, 1)))[0]
        return self._leasts[key] + path.fixed

    def _exclude(self, number: int, cutoff: float) -> None:
        room = cutoff * (1 + SLACK) - self.least[number]
        if not np.isfinite(room):
            return
        counts = self.paths[number].counts
        often = counts[:, :3].max(axis=1)
        for stage in np.flatnonzero(often > 0.5 * often.max()).tolist():
            self.ways.narrow(stage, counts[stage] - counts.min(axis=0), max(room, -1.0))

    def most_even(self) -> Cut | None:
        """The cut whose longest stage (seconds of all actions of a micro-batch) is shortest; None if none is allowed.

        Of equals, the one with the least work in all.
        """
        seconds = np.array([1.0] * 3 + [0.0] * (len(PER_STAGE) - 3))
        within = self.ways.evenness(seconds)
        low, high = 0.0, float(seconds @ self.ways.sums[-1][:, -1])
        if not within(high * 2):
            return None
        while high - low > 1e-4 * high:
            middle = 0.5 * (low + high)
            low, high = (low, middle) if within(middle) else (middle, high)
        limited = self.ways.copy()
        for stage in range(self.num_stages):
            limited.narrow(stage, seconds, high * (1 + SLACK))
        return limited.cheapest(np.tile(seconds, (self.num_stages, 1)))[1]

    def cheapest(self, weights: np.ndarray) -> tuple[float, Cut | None]:
        """Seconds that no cut beats by the weighted rows, and a cut that has just these; (inf, None) if there is none.

        ``weights`` are of the paths, then of the limits. A limit's row is ``scale`` seconds, and as many more as its
        worker is above its memory: a cut that fits gains nothing from it.
        """
        counts, fixed = self.rows
        each = weights * self._scales()
        least, cut = self.ways.cheapest(np.tensordot(each, counts, 1))
        return (least + float(each @ fixed)) / max(float(weights[:len(self.paths)].sum()), 1e-9), cut

    def least_excess(self, weights: np.ndarray) -> tuple[float, Cut | None]:
        """How far the workers are above their memory on the weighted average, as a share, for the cut that is best at
        that: above 0, no cut fits. ``weights`` are of the limits, and add up to 1."""
        counts, fixed = (each[len(self.paths):] for each in self.rows)
        least, cut = self.ways.cheapest(np.tensordot(weights, counts, 1))
        return least + float(weights @ fixed), cut

    @property
    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """What paths, then limits, count, (rows, stages, 7), and what is fixed of each."""
        both = len(self.paths) + len(self.limits)
        if self._rows is None or len(self._rows[1]) != both:
            every = [*self.paths, *self.limits]
            counts = np.stack([row.counts for row in every]) if every else np.zeros((0, self.num_stages, 7))
            self._rows = counts, np.array([row.fixed for row in every])
        return self._rows

    def memory_prices(self, path_weights: np.ndarray) -> np.ndarray:
        """Weights of the limits at which to recompute costs the paths' seconds just what the bytes freed are worth.

        At these, memory that is short is paid with the least work that makes up for it.
        """
        plain, again = self.ways.sums
        slower, freed = (again - plain)[:3, -1], (plain - again)[4:, -1]
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

    def _scales(self) -> np.ndarray:
        return np.concatenate((np.ones(len(self.paths)), np.full(len(self.limits), self.scale)))

    def over(self, cut: Cut) -> np.ndarray:
        """The share by which every limit is passed for one cut; below 0 where it is kept."""
        return self._of(self.ways.held(cut))[len(self.paths):]

    def lengths(self, held: np.ndarray) -> np.ndarray:
        """Seconds of every path for stages that hold so much, then of every limit: ``scale`` where it is just kept,
        more where not."""
        base = np.concatenate((np.zeros(len(self.paths)), np.full(len(self.limits), self.scale)))
        return self._of(held) * self._scales() + base

    def _of(self, held: np.ndarray) -> np.ndarray:
        counts, fixed = self.rows
        return counts.reshape(len(fixed), -1) @ held.ravel() + fixed


def balance(lengths: np.ndarray, rounds: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the rows (paths) for which the cheapest column (cut) is as dear as can be, nearly; and those of the
    columns for which the longest row is as short as can be.

    Both sides match their regrets, in turns, late rounds counting most (Tammelin, Solving large imperfect information
    games using CFR+, arXiv 2014). Any weights give a true bound; these give a good one.
    """
    low, high = float(lengths.min()), float(lengths.max())
    rows, columns = (np.full(size, 1.0 / size) for size in lengths.shape)
    if high <= low:
        return rows, columns
    scaled, total, mixed = (lengths - low) / (high - low), np.zeros(len(rows)), np.zeros(len(columns))
    for_rows, for_columns = np.zeros(len(rows)), np.zeros(len(columns))
    for number in range(1, rounds + 1):
        gained = scaled @ columns
        for_rows, rows = _matched(for_rows + gained - rows @ gained, rows)
        lost = rows @ scaled
        for_columns, columns = _matched(for_columns + columns @ lost - lost, columns)
        total += number ** 2 * rows
        mixed += number ** 2 * columns
    return total / total.sum(), mixed / mixed.sum()


def _matched(regrets: np.ndarray, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The regrets that count, and weights in proportion to them; as before, where there are none."""
    regrets = np.maximum(regrets, 0.0)
    whole = regrets.sum()
    return regrets, regrets / whole if whole > 0 else before
