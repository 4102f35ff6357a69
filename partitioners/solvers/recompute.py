"""Recomputation as a choice per node: activations dropped and computed again where memory would not do otherwise."""
from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from partitioners.errors import InfeasibleError
from partitioners.solvers.coarse import merge_runs, promising_positions
from partitioners.solvers.lattice import lattice
from partitioners.solvers.memory import stage_bytes, with_memory
from partitioners.solvers.orders import candidate_orders
from partitioners.solvers.problem import Kind, Problem, reorder
from partitioners.solvers.search import Solution, runs, solve, why_infeasible
from partitioners.solvers.segments import best_cuts, segment_loads, segment_memory

LONG, WINDOWS = 500, 400
FEW_NODES = 14  # of which every choice is looked at
FEW = 60        # ideals of which every pair's choice is looked at


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
    best = _of_all_ideals(problem, best) or best
    if best is None:
        bare = replace(problem, activation_bytes=np.zeros(len(problem)))
        raise InfeasibleError(f"{why_infeasible(bare, time.monotonic() + 10.0)} (every activation computed again)")
    return best


def _of_all_ideals(problem: Problem, best: Solution | None) -> Solution | None:
    """The best chain of ideals, each stage with the cheapest choice, if there are few of both."""
    loose = with_memory(problem, None)
    few = lattice(loose, FEW)
    if few is None or np.count_nonzero(problem.activation_bytes) > FEW_NODES or any(map(_many, problem.items)):
        return None
    tables = {
        kind: few.loads[free] + _extra(problem, kind, few.items) for kind, free in zip(problem.levels, loose.levels)
    }
    cuts = best_cuts(problem, tables)
    if cuts is None:
        return None
    return Solution(few.stages(problem, cuts.positions), cuts.levels, cuts.bottleneck, cuts.bottleneck,
                    "every chain of ideals was priced, with every choice of what to recompute")


def _many(nodes: tuple) -> bool:
    return len(nodes) > 1


def _extra(problem: Problem, kind: Kind, ideals: Sequence[frozenset[int]]) -> np.ndarray:
    """Seconds of computing again in the stages between any two ideals; inf where not even that helps."""
    seconds, cap = problem.forward[kind.device], kind.device.memory
    extra = np.zeros((len(ideals),) * 2)
    for a, b in product(range(len(ideals)), repeat=2) if cap is not None else ():
        items = sorted(ideals[b] - ideals[a])
        if not items or not ideals[a] < ideals[b]:
            continue
        excess = stage_bytes(problem, (problem.items[item][0] for item in items), kind.in_flight) - cap * (1 + 1e-12)
        data = [{"activation_bytes": problem.activation_bytes[item]} for item in items]
        chosen = choose_recomputed(data, seconds[items], kind.in_flight, excess)
        saved = kind.in_flight * sum(data[index]["activation_bytes"] for index in chosen)
        extra[a, b] = seconds[items][chosen].sum() if saved >= excess else np.inf
    return extra


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
    """Which nodes of one stage to recompute so that ``excess`` bytes go, at the least cost where nodes are few.

    Else greedily by cost, then without the needless.
    """
    saved = [depth * each.get("activation_bytes", 0.0) for each in data]
    useful = cheapest_first(seconds, saved)
    if 0 < excess and len(useful) <= FEW_NODES:
        return _least_cover(useful, seconds, saved, excess)
    chosen: list[int] = []
    for index in useful:
        if excess <= 0:
            break
        chosen.append(index)
        excess -= saved[index]
    for index in sorted(chosen, key=lambda index: -seconds[index]):
        if excess + saved[index] <= 0:
            chosen.remove(index)
            excess += saved[index]
    return sorted(chosen)


def _least_cover(useful: list[int], seconds: Sequence[float], saved: Sequence[float], excess: float) -> list[int]:
    """The cheapest of all choices that save ``excess`` bytes or more; everything where none does."""
    choices: list[tuple[float, float, tuple[int, ...]]] = [(0.0, 0.0, ())]
    for index in useful:
        more = [(cost + seconds[index], freed + saved[index], (*chosen, index)) for cost, freed, chosen in choices
                if freed < excess]
        ranked = sorted([*choices, *more], key=lambda choice: (choice[0], -choice[1]))
        # Dearer ones must save more than all before.
        best = np.maximum.accumulate([-1.0, *(freed for _, freed, _ in ranked)])
        choices = [choice for choice, most in zip(ranked, best) if choice[1] > most]
    return sorted(next((chosen for _, freed, chosen in choices if freed >= excess), useful))
