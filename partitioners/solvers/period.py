"""The period of 1F1B when links have latency, and the cuts that make it shortest.

Stage ``i`` of ``p`` starts ``p - i`` micro-batches before it works off the first, so the round trip from stage ``i`` to
stage ``l`` and back, all work between included, must fit into ``l - i + 1`` periods:

    P = max over i <= l of (t_i + ... + t_l + 2 (c_i + ... + c_{l-1})) / (l - i + 1)

with ``t`` a stage's forward and backward and ``c`` the time of a cut's values over the link, one way.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from partitioners.errors import PartitionError
from partitioners.graph import Link
from partitioners.solvers.coarse import crossing_seconds, merge_runs, promising_positions
from partitioners.solvers.lattice import lattice
from partitioners.solvers.orders import candidate_orders
from partitioners.solvers.problem import Kind, Problem, reorder
from partitioners.solvers.search import Solution, loads_of, solve
from partitioners.solvers.segments import Cuts

LONG, WINDOWS = 500, 400
FEW = 500       # ideals of which all pairs are priced
CLOSE = 1e-10    # relative width at which the bisection stops


def period(times: Sequence[float], round_trips: Sequence[float]) -> float:
    """Seconds per micro-batch of 1F1B; ``round_trips[i]`` is ``2 c_i`` of the cut after stage ``i``."""
    longest = 0.0
    for first in range(len(times)):
        total = 0.0
        for last in range(first, len(times)):
            total += times[last] + (round_trips[last - 1] if last > first else 0.0)
            longest = max(longest, total / (last - first + 1))
    return longest


def shortest_period(problem: Problem, gap: float, time_limit: float | None,
                    progress: Callable[[str], None] | None) -> Solution:
    """Cuts with the shortest period over several orders; the bound is that of free links, proved as ever."""
    if len(problem.levels) > 1 and problem.counts is not None:
        raise PartitionError("the objective 1f1b knows equal or ordered devices, not several classes in any order; "
                             "give a Cluster with ordered=True")
    begin = time.monotonic()
    free = solve(replace(problem, nets=(), objective="sum"), 0.0, gap, time_limit, progress)
    best = None
    for order in candidate_orders(problem):
        ordered = reorder(problem, order)
        if len(ordered) > LONG:
            ordered = merge_runs(ordered, promising_positions(ordered, WINDOWS))
        trips = [round_trips(ordered, ordered.levels[level].link_out) for level in _levels(ordered)]
        found = _bisect(ordered, loads_of(replace(ordered, nets=(), objective="sum")), trips, free.bottleneck,
                        best.bottleneck if best else np.inf)
        if found is not None:
            positions = found.positions
            stages = tuple(sum(ordered.items[a:b], ()) for a, b in zip(positions, positions[1:]))
            best = replace(free, stages=stages, levels=found.levels, bottleneck=found.bottleneck)
        if best and (best.bottleneck <= free.lower_bound * (1 + 1e-9)
                     or (time_limit is not None and time.monotonic() - begin > time_limit)):
            break
    best = _of_all_ideals(problem, free, best) or best
    if best is None:
        raise PartitionError("no order of the graph could be cut for the objective 1f1b; try the objective sum")
    return best


def _of_all_ideals(problem: Problem, free: Solution, best: Solution | None) -> Solution | None:
    """The shortest period there is, if ideals are few."""
    few = lattice(replace(problem, nets=(), objective="sum"), FEW)
    if few is None or (best and best.bottleneck <= free.lower_bound * (1 + 1e-9)):
        return None
    trips = [np.array([_round_trip(problem, problem.levels[level].link_out, ideal) for ideal in few.items])
             for level in _levels(problem)]
    shortest = _bisect(problem, few.loads, trips, free.bottleneck, best.bottleneck if best else np.inf)
    stages = few.stages(problem, shortest.positions) if shortest else None
    better = Solution(stages, shortest.levels, shortest.bottleneck) if shortest else best
    return better and replace(better, lower_bound=max(free.lower_bound, better.bottleneck * (1 - 2 * CLOSE)),
                              proof="every chain of ideals was priced")


def _round_trip(problem: Problem, link: Link, held: frozenset[int]) -> float:
    """Seconds there and back of the values that ``held`` hands to the rest."""
    return sum(net.seconds(link) for net in problem.nets
               if net.source >= 0 and 0 < len(held.intersection(net.pins)) < len(net.pins))


def _bisect(ordered: Problem, tables: dict[Kind, np.ndarray], trips: list[np.ndarray], low: float,
            known: float) -> Cuts | None:
    """The shortest period of chains of places (positions of an order, or ideals), if it is below ``known``."""
    levels = _levels(ordered)
    steps = [(level, tables[ordered.levels[level]]) for level in levels]

    def attempt(limit: float) -> Cuts | None:
        return _within(steps, trips, limit, ordered.allow_empty)
    best = attempt(low * (1 + 1e-12)) or attempt(low * 4 if known == np.inf else known * (1 - CLOSE))
    while best is None and known == np.inf and low < 1e300:
        low *= 4
        best = attempt(low * 4)
        if low > 1e6 * max(sum(map(np.max, trips)) + ordered.times[ordered.levels[0].device].sum(), 1e-300):
            return None
    while best is not None and best.bottleneck - low > CLOSE * best.bottleneck:
        middle = 0.5 * (low + best.bottleneck)
        found = attempt(middle)
        if found is None or found.bottleneck >= best.bottleneck:
            low = middle
        else:
            best = found
    return best


def _levels(problem: Problem) -> list[int]:
    return list(range(len(problem.levels))) if problem.counts is None else [0] * problem.num_stages


def round_trips(problem: Problem, link: Link) -> np.ndarray:
    """Seconds there and back of the values that cross each position; ties are exchanged once per step, not here."""
    kind = replace(problem.levels[0], link_in=link)
    values = tuple(net for net in problem.nets if net.source >= 0)
    return crossing_seconds(replace(problem, nets=values, levels=(kind, *problem.levels[1:])))


def _within(steps: list[tuple[int, np.ndarray]], trips: list[np.ndarray], limit: float, any_end: bool) -> Cuts | None:
    """Cuts whose period is at most ``limit``, or None.

    Of all ways to a position the one whose latest stages are least above ``limit`` per stage is as good as any.
    """
    size = len(trips[0])
    excess = np.full(size, np.inf)
    excess[0] = -np.inf
    parents, reached = [], -1
    for stage, (_, table) in enumerate(steps):
        start = excess if stage == 0 else excess + trips[stage - 1]
        ways = np.maximum(start, 0.0)[:, None] + table - limit
        parents.append(ways.argmin(axis=0))
        excess = ways[parents[-1], np.arange(size)]
        excess[excess > limit * 1e-12] = np.inf
        if np.isfinite(excess[-1]):
            reached = stage
            if any_end:
                break
    if reached < 0 or (not any_end and reached != len(steps) - 1):
        return None
    places = [size - 1]
    for stage in range(reached, -1, -1):
        places.append(int(parents[stage][places[-1]]))
    places.reverse()
    times = [float(steps[stage][1][a, b]) for stage, (a, b) in enumerate(zip(places, places[1:]))]
    between = [float(trips[stage][place]) for stage, place in enumerate(places[1:-1])]
    return Cuts(tuple(places), tuple(level for level, _ in steps[:reached + 1]), period(times, between))
