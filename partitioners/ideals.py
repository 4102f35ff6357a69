"""Exact stages by dynamic programming over ideals (sets of items closed towards the inputs).

Stages in pipeline order are differences of a chain of ideals (Tarnawski et al., NeurIPS 2020). Here the ideals are
sorted by work and pushed forward from the empty one; an ideal that no solution better than the known one can pass is
never expanded, so few are. Where all items before a point precede all after it, ideals are those of the blocks between
such points, and bits are kept per block only.
"""
from __future__ import annotations

import time
from bisect import bisect_left
from dataclasses import dataclass, replace
from operator import itemgetter

import numpy as np

from partitioners.graph import Node
from partitioners.problem import Kind, Problem, reorder
from partitioners.segments import states

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
        self.reference = _reference(problem)
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


def _reference(problem: Problem) -> np.ndarray:
    """Seconds on the first class; 0 where an item may not run there."""
    times = problem.times[problem.levels[0].device]
    return np.where(np.isfinite(times), times, 0.0)


class _Pricer:
    """Loads of stages ``[ideal, other)`` of one kind, for one ideal and a range of others."""

    def __init__(self, ideals: Ideals, kind: Kind) -> None:
        problem = self.problem = ideals.problem
        self.ideals, self.kind = ideals, kind
        times = problem.times[kind.device]
        self.work = ideals.sums(np.where(np.isfinite(times), times, 0.0))
        self.forbidden = None if np.isfinite(times).all() else ideals.sums((~np.isfinite(times)).astype(float))
        self.pays = kind.device.pays_link and any(net.seconds(kind.link_in) or net.seconds(kind.link_out)
                                                  for net in problem.nets)
        self.symmetric = problem.objective == "sum" and kind.symmetric
        self.memory = None
        if kind.device.memory is not None and problem.memory_may_bind():
            self.memory = ideals.sums(problem.fixed_bytes + kind.in_flight * problem.activation_bytes)
            self.shared = [(ideals.set_of(pins), size) for pins, size in problem.shared]
            self.workspace = [(ideals.set_of(np.flatnonzero(problem.workspace_bytes == size)), float(size))
                              for size in np.unique(problem.workspace_bytes)[::-1] if size]
        if self.pays:
            self._prepare_nets()

    def _prepare_nets(self) -> None:
        """Sets, prices and open ranges of the nets, and what each ideal's own cut costs."""
        ideals, merged = self.ideals, {}
        for net in self.problem.nets:
            price_in, price_out = net.seconds(self.kind.link_in), net.seconds(self.kind.link_out)
            key = (-1 if self.symmetric else net.source, net.pins)
            entry = merged.setdefault(key, [0.0, 0.0])
            both = price_in + price_out if net.source < 0 else price_in
            entry[0] += both if self.symmetric else price_in
            entry[1] += price_out
        self.nets = []
        self.cut_in, self.cut_out = np.zeros(len(ideals)), np.zeros(len(ideals))
        for (source, pins), (price_in, price_out) in merged.items():
            group, head = ideals.set_of(pins), ideals.set_of([source]) if source >= 0 else None
            tail = group if source < 0 else ideals.set_of([pin for pin in pins if pin != source])
            low = int(ideals.first[group.masks[0][0]])
            high = min(int(ideals.first[group.masks[-1][0] + 1]) + 1, len(ideals))
            some, every = ideals.any_all(group, low, high)
            self.nets.append((group, head, tail, price_in, price_out, low, high, some & ~every))
            if head is None:
                crossing = some & ~every
                self.cut_in[low:high] += price_in * crossing
                self.cut_out[low:high] += price_out * crossing
            else:
                made, _ = ideals.any_all(head, low, high)
                read, _ = ideals.any_all(tail, low, high)
                self.cut_out[low:high] += price_out * (made & ~every)
                self.cut_in[low:high] += price_in * (read & ~made)
        self.lows = np.array([net[5] for net in self.nets])
        self.highs = np.array([net[6] for net in self.nets])

    def open_nets(self, ideal: int) -> list[tuple]:
        """Nets of which ``ideal`` holds some but not all."""
        near = np.flatnonzero((self.lows <= ideal) & (ideal < self.highs))
        return [self.nets[net] for net in near if self.nets[net][7][ideal - self.lows[net]]]

    def loads(self, ideal: int, low: int, high: int) -> np.ndarray:
        """Seconds of the stages from ``ideal`` to each of the ideals ``low .. high``; inf where that is no stage."""
        work = self.work[low:high] - self.work[ideal]
        if self.pays:
            work = self._add_links(work, ideal, low, high)
        bad = ~self.ideals.supersets(ideal, low, high)
        if self.forbidden is not None:
            bad |= self.forbidden[low:high] > self.forbidden[ideal]
        if self.memory is not None:
            bad |= self._memory(ideal, low, high) > self.kind.device.memory * (1 + 1e-12)
        work[bad] = np.inf
        return work

    def _add_links(self, work: np.ndarray, ideal: int, low: int, high: int) -> np.ndarray:
        ideals, opened = self.ideals, self.open_nets(ideal)
        if self.symmetric:
            total = self.cut_in[low:high].copy()
            for group, _, _, price, _, *_ in opened:
                some, every = ideals.any_all(ideals.without(group, ideal), low, high)
                # Open behind and ahead, the net is in ``total`` once, whether this stage touches it or not.
                total += price * (some.astype(float) - ~every)
            return work + np.maximum(total, 0.0)
        into, out = self.cut_in[low:high].copy(), self.cut_out[low:high].copy()
        for group, head, tail, price_in, price_out, *_ in opened:
            some, every = ideals.any_all(ideals.without(group, ideal), low, high)
            if head is None:
                into += price_in * (some.astype(float) - ~every)
                out += price_out * (some.astype(float) - ~every)
                continue
            made, _ = ideals.any_all(head, low, high)
            read, _ = ideals.any_all(tail, low, high)
            out -= price_out * (made & ~every)
            into -= price_in * (read & ~made)
            rest = ideals.without(tail, ideal)
            new = ideals.any_all(rest, low, high)[0] if rest.masks else np.zeros(high - low, bool)
            if ideals.without(head, ideal).masks:
                out += price_out * made
                into += price_in * (new & ~made)
            else:
                into += price_in * new
        if self.problem.objective == "sum":
            return work + np.maximum(into, 0.0) + np.maximum(out, 0.0)
        return np.maximum(work, np.maximum(into, out))

    def _memory(self, ideal: int, low: int, high: int) -> np.ndarray:
        need = self.memory[low:high] - self.memory[ideal]
        for group, size in self.shared:
            rest = self.ideals.without(group, ideal)
            if rest.masks:
                need += size * self.ideals.any_all(rest, low, high)[0]
        left = np.ones(high - low, bool)
        for group, size in self.workspace:
            rest = self.ideals.without(group, ideal)
            if rest.masks:
                held = self.ideals.any_all(rest, low, high)[0] & left
                need += size * held
                left &= ~held
        return need


@dataclass(frozen=True)
class Lattice:
    """All ideals of a small problem, like the positions of an order: what a stage from one to another costs.

    ``loads`` per kind, inf where no stage leads; ``items`` are those of each ideal, the empty one first, the full one last.
    """
    loads: dict[Kind, np.ndarray]
    items: tuple[frozenset[int], ...]

    def stages(self, problem: Problem, places: tuple[int, ...]) -> tuple[tuple[Node, ...], ...]:
        """Nodes of the stages between these ideals."""
        return tuple(tuple(node for item in sorted(self.items[b] - self.items[a]) for node in problem.items[item])
                     for a, b in zip(places, places[1:]))


def lattice(problem: Problem, limit: int) -> Lattice | None:
    """The lattice of a problem with at most ``limit`` ideals."""
    try:
        ideals = Ideals(problem, limit)
    except TooMany:
        return None
    tables = {}
    must = None if problem.must_hold is None else ideals.sums(problem.must_hold.astype(float))
    for kind in dict.fromkeys(problem.levels):
        pricer = _Pricer(ideals, kind)
        table = np.array([pricer.loads(ideal, 0, len(ideals)) for ideal in range(len(ideals))])
        if must is None:
            np.fill_diagonal(table, 0.0)
        else:
            table[must[None, :] <= must[:, None]] = np.inf
        tables[kind] = table
    return Lattice(tables, tuple(frozenset(ideals.items(ideal)) for ideal in range(len(ideals))))


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
    search = _Search(Ideals(problem, limit), known * (1 - MARGIN), deadline)
    ahead = search.width()
    if ahead > NARROW:
        # A bottleneck near the outputs shows at once from there, and only at the very end from the inputs.
        back = _Search(Ideals(backwards(problem), limit), known * (1 - MARGIN), deadline)
        if back.width() < ahead:
            chain = back.run()
            last = len(problem) - 1
            return chain and Chain(tuple(tuple(last - item for item in reversed(stage)) for stage in chain.stages[::-1]),
                                   tuple(len(problem.levels) - 1 - level if problem.counts is None else level
                                         for level in chain.levels[::-1]), chain.bottleneck)
    return search.run()


def backwards(problem: Problem) -> Problem:
    """The mirror image: items, edges and ordered levels turned round."""
    turned = reorder(problem, list(range(len(problem)))[::-1])
    return replace(turned, edges=tuple((v, u) for u, v in turned.edges),
                   levels=problem.levels if problem.counts is not None else problem.levels[::-1])


class _Search:
    """One push pass over all states of devices used."""

    def __init__(self, ideals: Ideals, target: float, deadline: float) -> None:
        problem = self.problem = ideals.problem
        self.ideals, self.target, self.deadline = ideals, target, deadline
        self.pricers = {kind: _Pricer(ideals, kind) for kind in dict.fromkeys(problem.levels)}
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
        """Reference work that the devices used in ``state`` (or the ``rest``) can do below the target."""
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
    mine, reference = problem.times[kind.device], _reference(problem)
    done = np.isfinite(mine) & (reference > 0)
    if not done.any():
        return 0.0
    if (mine[done] == 0).any():
        return np.inf
    return float((reference[done] / mine[done]).max())
