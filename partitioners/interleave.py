"""Several stages per worker, dealt out in turns: the largest sum of a worker's stages as small as possible."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np

from partitioners.bounds import simple_bound
from partitioners.coarse import crossing_tensors, merge_runs, promising_positions
from partitioners.errors import InfeasibleError, PartitionError
from partitioners.orders import candidate_orders
from partitioners.plan import format_seconds
from partitioners.problem import Problem, reorder
from partitioners.search import Solution
from partitioners.segments import best_cuts, segment_loads, segment_memory

LONG, WINDOWS, RESTARTS, ROUNDS = 800, 600, 60, 60
Found = tuple[float, Problem, np.ndarray]    # largest load of a worker, the order, the cuts


def interleave(problem: Problem, workers: int, prefer_single_tensor: float, time_limit: float | None,
               progress: Callable[[str], None] | None) -> Solution:
    """Stage ``s`` goes to worker ``s mod workers``. Hill climbing over the cuts of several orders, from many starts.

    The bound is all work shared out perfectly, or the heaviest item. Of cuts within ``prefer_single_tensor`` of the best
    found, those whose boundaries carry the fewest tensors.
    """
    if len(problem.levels) > 1:
        raise PartitionError("several stages per worker need equal devices; give num_stages and no classes")
    bound, proof = simple_bound(problem)
    work = float(problem.times[problem.levels[0].device].sum()) / workers
    bound, proof = (work, "all work shared out perfectly") if work > bound else (bound, proof)
    deadline = time.monotonic() + (30.0 if time_limit is None else time_limit)
    best = _climb_all(list(_orders(problem, None)), workers, bound, deadline)
    if best is None:
        raise InfeasibleError(f"no cut into {problem.num_stages} stages on {workers} workers fits; "
                              "try more memory per worker or fewer stages")
    if progress:
        progress(f"bottleneck {format_seconds(best[0])}, bound {format_seconds(bound)}")
    if prefer_single_tensor > 0:
        best = _fewest(problem, workers, bound, best[0] * (1 + prefer_single_tensor), deadline) or best
    load, ordered, cuts = best
    stages = tuple(sum(ordered.items[a:b], ()) for a, b in zip(cuts, cuts[1:]))
    return Solution(stages, (0,) * problem.num_stages, load, bound, proof)


def _fewest(problem: Problem, workers: int, bound: float, limit: float, deadline: float) -> Found | None:
    """Cuts within ``limit`` where as few tensors cross as possible, if there are any."""
    for most in sorted(set(crossing_tensors(problem)[1:-1].tolist())):
        best = _climb_all([each for each in _orders(problem, most) if len(each) >= problem.num_stages], workers, bound,
                          deadline)
        if best is not None and best[0] <= limit:
            return best
    return None


def _climb_all(orders: list[Problem], workers: int, bound: float, deadline: float) -> Found | None:
    """The best cuts over all orders and starts."""
    best: Found | None = None
    for ordered in orders:
        climber = _Climber(ordered, workers)
        for cuts in climber.starts():
            load, found = climber.climb(cuts)
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

    def __init__(self, ordered: Problem, workers: int) -> None:
        kind = ordered.levels[0]
        self.ordered, self.workers, self.stages = ordered, workers, ordered.num_stages
        loads = segment_loads(ordered, kind)
        possible = np.isfinite(loads)
        # So dear that climbing first removes what is not allowed, yet comparable.
        self.forbidden = 10.0 * float(loads[possible].max(initial=1e-300)) * self.stages
        self.table = np.where(possible, loads, self.forbidden)
        self.table[np.tril_indices(len(loads), -1)] = np.inf        # an end before its start is no stage at any price
        self.memory = segment_memory(ordered, kind) if kind.device.memory is not None else None
        self.room = np.inf if kind.device.memory is None else kind.device.memory * (1 + 1e-12)
        self.chance = np.random.default_rng(0)

    def starts(self) -> Iterator[np.ndarray]:
        """The best cuts for one stage per worker, then random ones near shares of equal work."""
        cuts = best_cuts(self.ordered, {self.ordered.levels[0]: np.where(self.table < self.forbidden, self.table, np.inf)})
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

    def climb(self, cuts: np.ndarray) -> tuple[float, np.ndarray]:
        """Cuts that no single move improves, and the largest load of a worker."""
        cuts = cuts.copy()
        for _ in range(ROUNDS):
            moved = False
            for cut in self.chance.permutation(np.arange(1, self.stages)):
                moved |= self._move(cuts, int(cut))
            if not moved and not any([self._move_two(cuts, cut) for cut in range(1, self.stages - 1)]):
                break
        loads = self.loads(cuts, self.table)
        fits = self.memory is None or self.loads(cuts, self.memory).max() <= self.room
        return (float(loads.max()) if fits and loads.max() < self.forbidden else np.inf), cuts

    def loads(self, cuts: np.ndarray, table: np.ndarray) -> np.ndarray:
        """Sums per worker."""
        return np.bincount(np.arange(self.stages) % self.workers, table[cuts[:-1], cuts[1:]], self.workers)

    def _move(self, cuts: np.ndarray, cut: int) -> bool:
        before, place, after = cuts[cut - 1], cuts[cut], cuts[cut + 1]
        here, there = (cut - 1) % self.workers, cut % self.workers
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

    def _move_two(self, cuts: np.ndarray, cut: int) -> bool:
        """Move this cut and the next together; three stages change."""
        before, after = int(cuts[cut - 1]), int(cuts[cut + 2])
        stages = np.arange(cut - 1, cut + 2)
        loads = self.loads(cuts, self.table)
        np.subtract.at(loads, stages % self.workers, self.table[cuts[stages], cuts[stages + 1]])
        span = slice(before, after + 1)
        parts = (self.table[before, span][:, None], self.table[span, span], self.table[span, after][None, :])
        sums: dict[int, np.ndarray] = {}
        for stage, part in zip(stages, parts):
            worker = int(stage % self.workers)
            sums[worker] = sums.get(worker, loads[worker]) + part
        worst = None
        for each in sums.values():
            worst = each if worst is None else np.maximum(worst, each)
        worst = np.broadcast_to(worst, (after + 1 - before,) * 2)
        now = worst[cuts[cut] - before, cuts[cut + 1] - before]
        first, second = np.unravel_index(int(worst.argmin()), worst.shape)
        if worst[first, second] >= now * (1 - 1e-12):
            return False
        cuts[cut], cuts[cut + 1] = before + first, before + second
        return True
