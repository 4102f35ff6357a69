"""Exact stages by dynamic programming over ideals (sets of items closed towards the inputs).

Stages in pipeline order are differences of a chain of ideals (Tarnawski et al., NeurIPS 2020). Here the ideals are
sorted by work and pushed forward from the empty one; an ideal that no solution better than the known one can pass is
never expanded, so few are. Where all items before a point precede all after it, ideals are those of the blocks between
such points, and bits are kept per block only.
"""
from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

from partitioners.solvers.problem import Problem

MARGIN = 1e-10    # only solutions better than the known one by more than this are looked for
NARROW = 100               # first stages below which the other direction is not tried
REMEMBERED = 8_000_000    # stages whose loads are kept


class TooMany(Exception):
    """More ideals, or more time, than allowed."""


@dataclass(frozen=True)
class ItemSet:
    """A set of items as bit masks per block."""
    masks: tuple[tuple[int, np.ndarray], ...]


class Ideals:
    """All ideals of a problem's order, sorted by block and then by work on the first class of device."""

    def __init__(self, problem: Problem, limit: int) -> None:
        self.problem = problem
        starts = _series_cuts(problem)
        self.starts = starts
        self.block_of = np.searchsorted(starts, np.arange(len(problem)), side="right") - 1
        self.words = -(-int(np.diff([*starts, len(problem)]).max()) // 64)
        self.reference = reference_loads(problem)
        bits, work, blocks = [], [], []
        count, done = 0, 0.0
        for number, start in enumerate(starts):
            end = starts[number + 1] if number + 1 < len(starts) else len(problem)
            part, load = self._enumerate(start, end, limit - count)
            # The full block is the empty set of the next one.
            if end < len(problem):
                part, load = part[:-1], load[:-1]
            rank = np.argsort(load, kind="stable")
            bits.append(part[rank])
            work.append(load[rank] + done)
            blocks.append(np.full(len(part), number))
            done += float(self.reference[start:end].sum())
            count += len(part)
        self.bits, self.work = np.concatenate(bits), np.concatenate(work)
        self.block = np.concatenate(blocks)
        self.first = np.searchsorted(self.block, np.arange(len(starts) + 1))

    def __len__(self) -> int:
        return len(self.work)

    def _enumerate(self, start: int, end: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """Ideals of the items ``start .. end``, the full one last, and their work."""
        capacity, used = 64, 1
        bits = np.zeros((capacity, self.words), np.uint64)
        work = np.zeros(capacity)
        for item in range(start, end):
            need = np.zeros(self.words, np.uint64)
            for other in self.problem.predecessors[item]:
                if other >= start:
                    need[(other - start) // 64] |= np.uint64(1 << (other - start) % 64)
            ready = np.flatnonzero(_contains(bits[:used], need))
            if used + len(ready) > limit:
                raise TooMany(f"more than {limit:,} ideals")
            while used + len(ready) > capacity:
                capacity *= 2
                bits, work = np.resize(bits, (capacity, self.words)), np.resize(work, capacity)
            new = slice(used, used + len(ready))
            bits[new] = bits[ready]
            bits[new, (item - start) // 64] |= np.uint64(1 << (item - start) % 64)
            work[new] = work[ready] + self.reference[item]
            used += len(ready)
        return bits[:used], work[:used]

    def set_of(self, items) -> ItemSet:
        """``items`` as an ``ItemSet``."""
        masks: dict[int, np.ndarray] = {}
        for item in items:
            block = int(self.block_of[item])
            bit = item - int(self.starts[block])
            mask = masks.setdefault(block, np.zeros(self.words, np.uint64))
            mask[bit // 64] |= np.uint64(1 << bit % 64)
        return ItemSet(tuple(sorted(masks.items(), key=lambda pair: pair[0])))

    def without(self, items: ItemSet, ideal: int) -> ItemSet:
        """The first and the last of ``items`` that the ideal does not hold; enough for ``any_all`` of its supersets."""
        block = int(self.block[ideal])
        masks = items.masks
        place = bisect_left(masks, block, key=itemgetter(0))
        if place < len(masks) and masks[place][0] == block:
            mask = masks[place][1] & ~self.bits[ideal]
            if not mask.any():
                place += 1
            elif place + 1 == len(masks):
                return ItemSet(((block, mask),))
            else:
                return ItemSet(((block, mask), masks[-1]))
        return ItemSet((masks[place], masks[-1]) if place + 1 < len(masks) else masks[place:])

    def any_all(self, items: ItemSet, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
        """For the ideals ``low .. high``: whether they hold any, and all, of ``items`` (not empty)."""
        some = np.zeros(high - low, bool)
        every = np.zeros(high - low, bool)
        block, mask = items.masks[0]
        a, b = self._range(block, low, high)
        some[a - low:b - low] = _overlaps(self.bits[a:b], mask)
        some[b - low:] = True
        block, mask = items.masks[-1]
        a, b = self._range(block, low, high)
        every[a - low:b - low] = _contains(self.bits[a:b], mask)
        every[b - low:] = True
        return some, every

    def _range(self, block: int, low: int, high: int) -> tuple[int, int]:
        a = min(max(int(self.first[block]), low), high)
        return a, min(max(int(self.first[block + 1]), a), high)

    def supersets(self, ideal: int, low: int, high: int) -> np.ndarray:
        """Which of the ideals ``low .. high`` hold all of ``ideal``, whose block is not after theirs."""
        a, b = self._range(int(self.block[ideal]), low, high)
        found = np.ones(high - low, bool)
        found[:a - low] = False
        found[a - low:b - low] = _contains(self.bits[a:b], self.bits[ideal])
        return found

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum of ``values`` over the items of each ideal."""
        totals = np.zeros(len(self))
        before = np.concatenate(([0.0], np.cumsum(values)))
        for number, start in enumerate(self.starts):
            a, b = int(self.first[number]), int(self.first[number + 1])
            end = self.starts[number + 1] if number + 1 < len(self.starts) else len(values)
            totals[a:b] = before[start]
            for item in range(start, end):
                if values[item]:
                    bit = item - start
                    held = self.bits[a:b, bit // 64] >> np.uint64(bit % 64) & np.uint64(1)
                    totals[a:b] += values[item] * held
        return totals

    def items(self, ideal: int) -> list[int]:
        """The items of one ideal."""
        start = int(self.starts[self.block[ideal]])
        mask = sum(int(word) << 64 * place for place, word in enumerate(self.bits[ideal]))
        return [*range(start), *(start + bit for bit in range(mask.bit_length()) if mask >> bit & 1)]


def _contains(bits: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Rows that hold every bit of ``mask``."""
    if bits.shape[1] == 1:
        return bits[:, 0] & mask[0] == mask[0]
    words = np.flatnonzero(mask)
    found = np.ones(len(bits), bool)
    for word in words:
        found &= bits[:, word] & mask[word] == mask[word]
    return found


def _overlaps(bits: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Rows that hold some bit of ``mask``."""
    if bits.shape[1] == 1:
        return bits[:, 0] & mask[0] != 0
    found = np.zeros(len(bits), bool)
    for word in np.flatnonzero(mask):
        found |= bits[:, word] & mask[word] != 0
    return found


def _series_cuts(problem: Problem) -> list[int]:
    """Starts of the blocks: positions where everything before precedes everything after."""
    size = len(problem)
    before = [0] * size
    for item in range(size):
        for other in problem.predecessors[item]:
            before[item] |= before[other] | 1 << other
    starts, common = [], (1 << size) - 1
    for position in reversed(range(size)):
        common &= before[position]
        prefix = (1 << position) - 1
        if common & prefix == prefix:
            starts.append(position)
    return starts[::-1] if starts and starts[-1] == 0 else [0, *starts[::-1]]


def reference_loads(problem: Problem) -> np.ndarray:
    """Seconds on the first class; 0 where an item may not run there."""
    times = problem.times[problem.levels[0].device]
    return np.where(np.isfinite(times), times, 0.0)
