"""Several stages per worker: the largest sum of a worker's stages as small as possible."""
from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from partitioners.errors import InfeasibleError, PartitionError
from partitioners.solvers.bounds import simple_bound
from partitioners.solvers.coarse import crossing_tensors, merge_runs, promising_positions
from partitioners.solvers.lattice import Lattice, lattice
from partitioners.solvers.memory import item_bytes
from partitioners.solvers.orders import candidate_orders, through
from partitioners.solvers.problem import Problem, reorder
from partitioners.solvers.search import Solution
from partitioners.solvers.segments import best_cuts, segment_loads, segment_memory
from partitioners.units import format_seconds

LONG, WINDOWS, RESTARTS, ROUNDS = 800, 600, 60, 60
FEW = 1000      # ways to cut an order that are simply all priced
FEW_IDEALS, MOST_WAYS = 150, 2000       # up to which all chains of ideals are
Way = tuple[tuple[tuple[float, float], ...], tuple[int, ...]]       # load and memory of each worker, the ideals so far
Ways = dict[int, list[Way]]                 # by the last ideal
Found = tuple[float, Problem, np.ndarray]    # largest load of a worker, the order, the cuts


def interleave(problem: Problem, worker_of: Sequence[int], prefer_single_tensor: float, time_limit: float | None,
               progress: Callable[[str], None] | None) -> Solution:
    """Stage ``s`` lives on ``worker_of[s]``. Every chain of ideals where they are few; else hill climbing over the cuts
    of several orders, from many starts, and the bound is all work shared out perfectly, or the heaviest item.
    Of cuts within ``prefer_single_tensor`` of the best
    found, those whose boundaries carry the fewest tensors.
    """
    if len(problem.levels) > 1:
        raise PartitionError("several stages per worker need equal devices; give num_stages and no classes")
    bound, proof = simple_bound(problem)
    work = float(problem.times[problem.levels[0].device].sum()) / (max(worker_of) + 1)
    bound, proof = (work, "all work shared out perfectly") if work > bound else (bound, proof)
    deadline = time.monotonic() + (30.0 if time_limit is None else time_limit)
    best = _climb_all(list(_orders(problem, None)), worker_of, bound, deadline)
    better, is_all = _of_all_ideals(problem, worker_of, best[0] if best else np.inf)
    best = better or best
    if best is not None and is_all:
        bound, proof = best[0], "every chain of ideals was priced"
    if best is None:
        raise InfeasibleError(f"no cut into {problem.num_stages} stages on {max(worker_of) + 1} workers fits; "
                              "try more memory per worker or fewer stages")
    if progress:
        progress(f"bottleneck {format_seconds(best[0])}, bound {format_seconds(bound)}")
    limit = best[0] * (1 + prefer_single_tensor)
    if prefer_single_tensor > 0:
        best = _fewest(problem, worker_of, bound, limit, deadline) or best
    best = _even_out(best, worker_of, limit, deadline, keep_tensors=prefer_single_tensor > 0)
    if prefer_single_tensor > 0:
        best = _fewer(best, worker_of, limit)
    load, ordered, cuts = best
    stages = tuple(sum(ordered.items[a:b], ()) for a, b in zip(cuts, cuts[1:]))
    return Solution(stages, (0,) * problem.num_stages, load, bound, proof)


def _of_all_ideals(problem: Problem, worker_of: Sequence[int], known: float) -> tuple[Found | None, bool]:
    """The best chain of ideals below ``known``, and whether all were priced. Ways that are worse for every worker
    end."""
    few = lattice(problem, FEW_IDEALS)
    if few is None:
        return None, False
    table, workers = _Table.of(problem, few), max(worker_of) + 1
    ways = {0: [(((0.0, 0.0),) * workers, (0,))]}
    for stage, worker in enumerate(worker_of):
        ways = table.extend(ways, worker, known, is_last=stage == len(worker_of) - 1)
        if sum(map(len, ways.values())) > MOST_WAYS:
            return None, False
    if not ways:
        return None, True
    needs, chain = min(ways[len(few.items) - 1], key=lambda way: max(load for load, _ in way[0]))
    ideals = [few.items[place] for place in chain[1:]]
    load = max(load for load, _ in needs)
    return (load, reorder(problem, through(problem, ideals)), np.array([0, *map(len, ideals)])), True


@dataclass(frozen=True)
class _Table:
    """Between ideals: load and memory of a stage. ``left`` is the work after each, ``room`` the memory of a worker."""
    loads: np.ndarray
    memory: np.ndarray
    left: np.ndarray
    room: float

    @classmethod
    def of(cls, problem: Problem, few: Lattice) -> _Table:
        kind, size = problem.levels[0], len(few.items)
        loads, times = few.loads[kind], problem.times[kind.device]
        memory = np.zeros((size, size))
        if problem.memory_may_bind():
            for start, end in zip(*np.nonzero(np.isfinite(loads))):
                memory[start, end] = item_bytes(problem, sorted(few.items[end] - few.items[start]), kind.in_flight)
        left = np.array([times.sum() - times[sorted(held)].sum() for held in few.items])
        return cls(loads, memory, left, np.inf if kind.device.memory is None else kind.device.memory * (1 + 1e-12))

    def extend(self, ways: Ways, worker: int, known: float, *, is_last: bool) -> Ways:
        """One stage more for every way, where what is left can still be shared out below ``known``."""
        longer: Ways = {}
        for start, own in ways.items():
            ends = np.flatnonzero(self.loads[start] < known)
            for end in ends[(ends == len(self.left) - 1) == is_last].tolist():
                for needs, chain in own:
                    load, size = (
                        needs[worker][0] + float(self.loads[start, end]),
                        needs[worker][1] + float(self.memory[start, end]),
                    )
                    loaded = (*needs[:worker], (load, size), *needs[worker + 1:])
                    spare = sum(known - each for each, _ in loaded) if known < np.inf else np.inf
                    if load < known * (1 - 1e-12) and size <= self.room and spare >= self.left[end] * (1 - 1e-12):
                        longer.setdefault(end, []).append((loaded, (*chain, end)))
        return {end: _undominated(own) for end, own in longer.items()}


def _undominated(ways: list[Way]) -> list[Way]:
    """Those for which no other is as good for every worker; of equals, the first."""
    ways = sorted(ways)
    needs = np.array([own for own, _ in ways])
    return [way for place, way in enumerate(ways) if not (needs[:place] <= needs[place]).all(axis=(1, 2)).any()]


def _even_out(found: Found, worker_of: Sequence[int], limit: float, deadline: float, *, keep_tensors: bool) -> Found:
    """Cuts of the same order whose heaviest stage is lighter while no worker has more than ``limit``, with no more
    tensors over all boundaries if those are to be kept.

    A step fills and drains in single stages: of two cuts with equal workers, the one with more equal stages is faster.
    """
    load, ordered, cuts = found
    climber, count = _Climber(ordered, worker_of), crossing_tensors(ordered) * keep_tensors
    high, low, most = climber.heaviest(cuts), limit / max(map(list(worker_of).count, worker_of)), count[cuts].sum()
    while high - low > 0.02 * high and time.monotonic() < deadline:
        middle = 0.5 * (low + high)
        better = next(((each, made) for each, made in map(climber.below(middle).climb, climber.starts(cuts))
                       if each <= limit and count[made].sum() <= most), None)
        if better is None:
            low = middle
        else:
            (load, cuts), high = better, climber.heaviest(better[1])
    return load, ordered, cuts


def _fewest(problem: Problem, worker_of: Sequence[int], bound: float, limit: float, deadline: float) -> Found | None:
    """Cuts within ``limit`` where as few tensors cross as possible, if there are any."""
    for most in sorted(set(crossing_tensors(problem)[1:-1].tolist())):
        best = _climb_all(
            [each for each in _orders(problem, most) if len(each) >= problem.num_stages], worker_of, bound, deadline
        )
        if best is not None and best[0] <= limit:
            return _fewer(best, worker_of, limit)
    return None


def _fewer(found: Found, worker_of: Sequence[int], limit: float) -> Found:
    """One cut after the other, the widest first, moved to where fewer tensors cross, until none can be within
    ``limit``."""
    load, ordered, cuts = found
    climber, count = _Climber(ordered, worker_of), crossing_tensors(ordered)
    tries = sorted((cut for cut in cuts[1:-1].tolist() if count[cut] > 1), key=lambda cut: -count[cut])
    while tries:
        cut = tries.pop(0)
        rest = cuts[cuts != cut]
        places = np.setdiff1d(np.flatnonzero(count < count[cut]), rest)
        priced = [(int(count[place]), *climber.priced(np.sort(np.append(rest, place)))) for place in places]
        fits = [each for each in priced if each[1] <= limit]
        if fits:
            _, load, cuts = min(fits, key=lambda each: each[:2])
            tries = sorted((cut for cut in cuts[1:-1].tolist() if count[cut] > 1), key=lambda cut: -count[cut])
    return load, ordered, cuts


def _climb_all(orders: list[Problem], worker_of: Sequence[int], bound: float, deadline: float) -> Found | None:
    """The best cuts over all orders and starts."""
    best: Found | None = None
    for ordered in orders:
        climber = _Climber(ordered, worker_of)
        for cuts in climber.starts() if climber.num_choices > FEW else climber.choices():
            load, found = climber.climb(cuts) if climber.num_choices > FEW else climber.priced(cuts)
            if np.isfinite(load) and (best is None or load < best[0] * (1 - 1e-12)):
                best = load, ordered, found
            if time.monotonic() > deadline or (best and best[0] <= bound * (1 + 1e-9)):
                return best
    return best


def _orders(problem: Problem, most: int | None) -> Iterator[Problem]:
    """Several orders, cuttable where at most ``most`` tensors cross, made short where they are long."""
    for order in candidate_orders(problem):
        ordered = reorder(problem, order)
        if most is not None:
            ordered = merge_runs(ordered, np.flatnonzero(crossing_tensors(ordered)[1:-1] <= most) + 1)
        if len(ordered) > LONG:
            ordered = merge_runs(ordered, promising_positions(ordered, WINDOWS))
        yield ordered


class _Climber:
    """Moves one cut at a time to where the two workers beside it are best off."""

    def __init__(self, ordered: Problem, worker_of: Sequence[int]) -> None:
        kind = ordered.levels[0]
        self.ordered, self.worker, self.stages = ordered, np.array(worker_of), ordered.num_stages
        loads = segment_loads(ordered, kind)
        possible = np.isfinite(loads)
        # So dear that climbing first removes what is not allowed, yet comparable.
        self.forbidden = 10.0 * float(loads[possible].max(initial=1e-300)) * self.stages
        self.table = np.where(possible, loads, self.forbidden)
        self.table[np.tril_indices(len(loads), -1)] = np.inf        # an end before its start is no stage at any price
        self.memory = segment_memory(ordered, kind) if kind.device.memory is not None else None
        self.room = np.inf if kind.device.memory is None else kind.device.memory * (1 + 1e-12)
        self.chance = np.random.default_rng(0)

    def below(self, most: float) -> _Climber:
        """One that takes no stage heavier than ``most``."""
        other = copy.copy(self)
        other.table = np.where(self.table > most, np.maximum(self.table, self.forbidden), self.table)
        return other

    def heaviest(self, cuts: np.ndarray) -> float:
        """Load of the heaviest stage."""
        return float(self.table[cuts[:-1], cuts[1:]].max())

    def starts(self, *first: np.ndarray) -> Iterator[np.ndarray]:
        """Those given, the best cuts for one stage per worker, then random ones near shares of equal work."""
        yield from first
        cuts = best_cuts(
            self.ordered, {self.ordered.levels[0]: np.where(self.table < self.forbidden, self.table, np.inf)}
        )
        size = len(self.ordered)
        if cuts is not None and len(cuts.positions) == self.stages + 1:
            yield np.array(cuts.positions)
        work = np.concatenate(([0.0], np.cumsum(self.ordered.times[self.ordered.levels[0].device])))
        for _ in range(RESTARTS):
            shares = np.cumsum(self.chance.dirichlet(np.full(self.stages, 8.0)))[:-1]
            inner = np.searchsorted(work, shares * work[-1])
            steps = np.arange(1, self.stages)
            inner = np.maximum.accumulate(np.maximum(inner, steps) - steps) + steps
            yield np.concatenate(([0], np.minimum(inner, size - self.stages + steps), [size]))

    @property
    def num_choices(self) -> int:
        return math.comb(len(self.ordered) - 1, self.stages - 1)

    def choices(self) -> Iterator[np.ndarray]:
        """Every way to cut the order."""
        for inner in itertools.combinations(range(1, len(self.ordered)), self.stages - 1):
            yield np.array((0, *inner, len(self.ordered)))

    def climb(self, cuts: np.ndarray) -> tuple[float, np.ndarray]:
        """Cuts that no single move improves, and the largest load of a worker."""
        cuts = cuts.copy()
        for _ in range(ROUNDS):
            moved = False
            for cut in self.chance.permutation(np.arange(1, self.stages)):
                moved |= self._move(cuts, int(cut))
            if not moved and not any(self._move_two(cuts, *pair) for pair in self._pairs(cuts)):
                break
        return self.priced(cuts)

    def priced(self, cuts: np.ndarray) -> tuple[float, np.ndarray]:
        """Largest load of a worker, infinite where something does not fit."""
        loads = self.loads(cuts, self.table)
        fits = self.memory is None or self.loads(cuts, self.memory).max() <= self.room
        return (float(loads.max()) if fits and loads.max() < self.forbidden else np.inf), cuts

    def loads(self, cuts: np.ndarray, table: np.ndarray) -> np.ndarray:
        """Sums per worker."""
        return np.bincount(self.worker, table[cuts[:-1], cuts[1:]])

    def _move(self, cuts: np.ndarray, cut: int) -> bool:
        before, place, after = cuts[cut - 1], cuts[cut], cuts[cut + 1]
        here, there = self.worker[cut - 1], self.worker[cut]
        loads, change = self.loads(cuts, self.table), slice(before, after + 1)
        left, right = self.table[before, change], self.table[change, after]
        if here == there:
            first = second = loads[here] - self.table[before, place] - self.table[place, after] + left + right
        else:
            first = loads[here] - self.table[before, place] + left
            second = loads[there] - self.table[place, after] + right
        worst = np.maximum(first, second)
        target, now = int(worst.argmin()), place - before
        if worst[target] >= worst[now] * (1 - 1e-12):
            return False
        cuts[cut] = before + target
        return True

    def _move_two(self, cuts: np.ndarray, one: int, two: int) -> bool:
        """Move two cuts together; three stages change where they are neighbours, else four."""
        together = two == one + 1
        first = np.arange(cuts[one - 1], cuts[two + 1 if together else one + 1] + 1)
        second = np.arange(cuts[one - 1 if together else two - 1], cuts[two + 1] + 1)
        parts = {one - 1: self.table[cuts[one - 1], first][:, None], two: self.table[second, cuts[two + 1]][None, :]}
        if together:
            parts[one] = self.table[np.ix_(first, second)]
        else:
            parts |= {
                one: self.table[first, cuts[one + 1]][:, None],
                two - 1: self.table[cuts[two - 1], second][None, :],
            }
        worst = self._worst(cuts, parts)
        now = worst[cuts[one] - first[0], cuts[two] - second[0]]
        best = np.unravel_index(int(worst.argmin()), worst.shape)
        if worst[best] >= now * (1 - 1e-12):
            return False
        cuts[one], cuts[two] = first[best[0]], second[best[1]]
        return True

    def _worst(self, cuts: np.ndarray, parts: dict[int, np.ndarray]) -> np.ndarray:
        """Largest load of the workers whose stages get the loads ``parts``."""
        stages = np.array(list(parts))
        loads = self.loads(cuts, self.table)
        np.subtract.at(loads, self.worker[stages], self.table[cuts[stages], cuts[stages + 1]])
        sums: dict[int, np.ndarray] = {}
        for stage, part in parts.items():
            worker = int(self.worker[stage])
            sums[worker] = sums.get(worker, loads[worker]) + part
        return np.maximum.reduce(np.broadcast_arrays(*sums.values()))

    def _pairs(self, cuts: np.ndarray) -> list[tuple[int, int]]:
        """Cuts beside a stage of the fullest worker, each with every other one: nothing else can help."""
        fullest = np.flatnonzero(self.worker == self.loads(cuts, self.table).argmax())
        beside = {int(cut) for stage in fullest for cut in (stage, stage + 1)} - {0, self.stages}
        return [
            (one, two) for one in range(1, self.stages) for two in range(one + 1, self.stages) if {one, two} & beside
        ]
