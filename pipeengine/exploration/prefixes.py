"""Ways to cut into stages that recompute some of their blocks, the first ones: all pairs of places, in tables.

The first blocks and not the last: a backward comes to them when what the others kept is gone already.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from pipeengine.exploration.ways import SLACK, Cut, range_minima


class _Left(NamedTuple):
    """Ways of a stage by their ends: its start, its end, and from where to where it may recompute; ``runs`` is where
    each end begins."""

    starts: np.ndarray
    ends: np.ndarray
    runs: np.ndarray
    first: np.ndarray
    last: np.ndarray


@dataclass
class Prefixes:
    """Stages that recompute their first blocks, up to a place that lies from ``first[s][a, b]`` to ``last[s][a, b]``
    for a stage s from place a to place b. For chains of few places: all pairs are in the tables."""

    sums: Sequence[np.ndarray]
    last_start: np.ndarray
    first: np.ndarray
    last: np.ndarray
    left: list[_Left] | None = None

    @classmethod
    def of(cls, sums: Sequence[np.ndarray], num_stages: int, last_start: np.ndarray) -> Prefixes:
        """Every place of every stage."""
        size = len(last_start)
        place = np.arange(size, dtype=np.int16)
        first = np.where(place[:, None] <= last_start, place[:, None], size).astype(np.int16)
        return cls(sums, last_start, np.repeat(first[None], num_stages, 0),
                   np.repeat(np.broadcast_to(place, (1, size, size)), num_stages, 0))

    @property
    def num_stages(self) -> int:
        """Stages of a cut."""
        return len(self.first)

    def copy(self) -> Prefixes:
        """The same, to narrow without changing this one."""
        return replace(self, first=self.first.copy(), last=self.last.copy())

    def narrow(self, stage: int, counts: np.ndarray, room: float) -> None:
        """Put out the ways of ``stage`` that hold more than ``room``, as ``counts`` weigh it."""
        plain, again = (counts @ each for each in self.sums)
        more, self.left = again - plain, None
        left = room - plain + again[:, None] + 1e-12 * np.abs(plain).max()
        # Where it is not monotone, the hull of what is left: never too little.
        falling, rising = np.minimum.accumulate(more), np.minimum.accumulate(more[::-1])[::-1]
        low = np.searchsorted(-falling, -(left)).astype(np.int16)
        high = (np.searchsorted(rising, left, side="right") - 1).astype(np.int16)
        np.maximum(self.first[stage], low, out=self.first[stage])
        np.minimum(self.last[stage], high, out=self.last[stage])

    def evenness(self, seconds: np.ndarray) -> Callable[[float], bool]:
        """Whether some cut has no stage above so many seconds, as ``seconds`` weigh what a stage holds."""
        loads = [self._load(stage, seconds) for stage in range(self.num_stages)]

        def within(most: float) -> bool:
            reached = np.zeros(len(self.last_start), bool)
            reached[0] = True
            for left, load in zip(self._left, loads):
                now = np.zeros(len(reached), bool)
                now[left.ends[reached[left.starts] & (load <= most * (1 + SLACK))]] = True
                reached = now
            return bool(reached[-1])
        return within

    @property
    def _left(self) -> list[_Left]:
        """What is left of each stage, listed once after each change."""
        if self.left is None:
            self.left = []
            size, stages = len(self.last_start), self.num_stages
            for stage, (first, last) in enumerate(zip(self.first, self.last)):
                low, high = stage, size - stages + stage + 1       # every other stage has a place of its own
                ends, starts = np.nonzero((first <= last)[low:high, low:high].T)
                starts, ends = starts + low, ends + low
                self.left.append(_Left(starts, ends, np.flatnonzero(np.diff(ends, prepend=-1)), first[starts, ends],
                                       last[starts, ends]))
        return self.left

    def _load(self, stage: int, counts: np.ndarray) -> np.ndarray:
        """The least that each way left of a stage holds."""
        left, (plain, again) = self._left[stage], self.sums
        plain, again = counts @ plain, counts @ again
        return _minima(again - plain, left.first, left.last) - again[left.starts] + plain[left.ends]

    def cheapest(self, counts: np.ndarray) -> tuple[float, Cut | None]:
        """The cut that holds least, as ``counts`` of each stage weigh it; (inf, None) if none is left."""
        value = np.full(len(self.last_start), np.inf)
        value[0] = 0.0
        totals, values = [], [value]
        for stage, left in enumerate(self._left):
            totals.append(value[left.starts] + self._load(stage, counts[stage]))
            value = np.full(len(value), np.inf)
            if len(left.runs):
                value[left.ends[left.runs]] = np.minimum.reduceat(totals[-1], left.runs)
            values.append(value)
        if not np.isfinite(value[-1]):
            return math.inf, None
        places, until = [len(value) - 1], []
        for stage in reversed(range(self.num_stages)):
            left = self._left[stage]
            low, high = np.searchsorted(left.ends, (places[-1], places[-1] + 1))
            way = int(low + totals[stage][low:high].argmin())
            first, last = int(left.first[way]), int(left.last[way])
            more = counts[stage] @ (self.sums[1] - self.sums[0])[:, first:last + 1]
            until.append(first + int(more.argmin()))
            places.append(int(left.starts[way]))
        return float(value[-1]), (tuple(reversed(places)), tuple(reversed(until)))

    def held(self, cut: Cut) -> np.ndarray:
        """What each stage of a cut holds: (stages, 7)."""
        places, until, (plain, again) = np.array(cut[0]), np.array(cut[1]), self.sums
        held = again[:, until] - again[:, places[:-1]] + plain[:, places[1:]] - plain[:, until]
        return np.ascontiguousarray(held.T)

    def choices(self) -> float:
        """Ways to recompute, at most, for any places of the cuts."""
        return (1 + (len(self.last_start) - 1) / self.num_stages) ** self.num_stages

    def untils(self, stage: int, start: int, end: int) -> Iterator[int]:
        """Places up to which a stage between two places may recompute, each with blocks of its own."""
        before, more = None, self.sums[1] - self.sums[0]
        for place in range(int(self.first[stage, start, end]), int(self.last[stage, start, end]) + 1):
            if before is None or (more[:, place] != more[:, before]).any():
                yield place
            before = place


def _minima(values: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """``range_minima``, faster where ``values`` go one way, as they do but for prices of both seconds and bytes."""
    rises = np.diff(values)
    if (rises >= 0).all() or (rises <= 0).all():
        place = first if (rises >= 0).all() else last
        return np.where(first <= last, values.take(place, mode="clip"), np.inf)
    return range_minima(values, first, last)
