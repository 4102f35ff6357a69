"""Recomputation as a choice per node: activations dropped and computed again where memory would not do otherwise."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from partitioners.coarse import merge_runs, promising_positions
from partitioners.errors import InfeasibleError
from partitioners.memory import with_memory
from partitioners.orders import candidate_orders
from partitioners.problem import Kind, Problem, reorder
from partitioners.search import Solution, runs, solve
from partitioners.segments import best_cuts, segment_loads, segment_memory

LONG, WINDOWS = 500, 400


def with_recomputation(problem: Problem, gap: float, time_limit: float | None,
                       progress: Callable[[str], None] | None) -> Solution:
    """Best cuts when each stage recomputes just enough; the bound is the optimum without memory limits."""
    loose = solve(with_memory(problem, None), 0.0, gap, time_limit, progress)
    best = None
    for order in candidate_orders(problem):
        ordered = reorder(problem, order)
        if len(ordered) > LONG:
            ordered = merge_runs(ordered, promising_positions(ordered, WINDOWS))
        tables = {kind: recomputing_loads(ordered, kind) for kind in dict.fromkeys(problem.levels)}
        cuts = best_cuts(ordered, tables)
        if cuts is not None and (best is None or cuts.bottleneck < best.bottleneck * (1 - 1e-12)):
            best = Solution(runs(ordered, cuts), cuts.levels, cuts.bottleneck, loose.lower_bound,
                            f"without memory limits: {loose.proof}")
    if best is None:
        raise InfeasibleError(f"no cut into {problem.num_stages} stages fits, not even when every activation is computed "
                              "again; try more stages, more memory per device or smaller micro-batches")
    return best


def recomputing_loads(problem: Problem, kind: Kind) -> np.ndarray:
    """Loads of all segments where those above the memory recompute their cheapest activations, byte for byte."""
    cap = kind.device.memory
    free = replace(kind, device=replace(kind.device, memory=None))
    loose = replace(problem, levels=(free,), times={free.device: problem.times[kind.device]},
                    counts=(problem.num_stages,))
    loads = segment_loads(loose, free)
    if cap is None or not problem.memory_may_bind():
        return loads
    excess = segment_memory(problem, kind) - cap * (1 + 1e-12)
    saved = kind.in_flight * problem.activation_bytes
    seconds = problem.forward[kind.device]
    extra = np.zeros_like(excess)
    for item in cheapest_first(seconds, saved):
        block = (slice(0, item + 1), slice(item + 1, None))
        short = excess[block] > 0
        extra[block] += np.where(short, seconds[item], 0.0)
        excess[block] -= np.where(short, saved[item], 0.0)
    extra[excess > 0] = np.inf
    return loads + extra


def cheapest_first(seconds: Sequence[float], saved: Sequence[float]) -> list[int]:
    """Indices with something to save, by seconds per byte."""
    useful = [index for index in range(len(saved)) if saved[index] > 0]
    return sorted(useful, key=lambda index: (seconds[index] / saved[index], index))


def choose_recomputed(data: Sequence[Mapping], seconds: Sequence[float], depth: int, excess: float) -> list[int]:
    """Which nodes of one stage to recompute so that ``excess`` bytes go: greedily by cost, then without the needless."""
    saved = [depth * each.get("activation_bytes", 0.0) for each in data]
    chosen: list[int] = []
    for index in cheapest_first(seconds, saved):
        if excess <= 0:
            break
        chosen.append(index)
        excess -= saved[index]
    for index in sorted(chosen, key=lambda index: -seconds[index]):
        if excess + saved[index] <= 0:
            chosen.remove(index)
            excess += saved[index]
    return sorted(chosen)
