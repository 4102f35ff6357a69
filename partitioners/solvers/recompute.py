"""Recomputation as a choice per block: activations dropped and computed again where memory would not do otherwise."""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from partitioners.errors import InfeasibleError
from partitioners.solvers.coarse import merge_runs, promising_positions
from partitioners.solvers.lattice import lattice
from partitioners.solvers.memory import held_bytes, with_memory
from partitioners.solvers.orders import candidate_orders
from partitioners.solvers.problem import Kind, Problem, reorder
from partitioners.solvers.search import Solution, runs, solve, why_infeasible
from partitioners.solvers.segments import best_cuts, segment_loads, segment_memory, segment_workspace

LONG, WINDOWS = 500, 400
FEW_PIECES = 14     # of which every choice is looked at
FEW = 60            # ideals of which every pair's choice is looked at
FITS = 1e-12        # of a memory, that rounding may be over it


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
        reason = why_infeasible(_everything_again(problem), time.monotonic() + 10.0)
        raise InfeasibleError(f"{reason} (everything computed again)")
    return best


def _everything_again(problem: Problem) -> Problem:
    """The problem if every piece were computed again: what memory is needed at least."""
    activations, scratch = problem.activation_bytes.copy(), problem.workspace_bytes.copy()
    for piece in problem.pieces:
        pins = list(piece.pins)
        share = activations[pins]
        if piece.saved_bytes and share.sum():
            activations[pins] = np.maximum(0.0, share - piece.saved_bytes * share / share.sum())
            scratch[pins] = np.maximum(scratch[pins], piece.workspace_bytes)
    return replace(problem, activation_bytes=activations, workspace_bytes=scratch)


def _of_all_ideals(problem: Problem, best: Solution | None) -> Solution | None:
    """The best chain of ideals, each stage with the cheapest choice, if there are few of both."""
    loose = with_memory(problem, None)
    few = lattice(loose, FEW)
    if few is None or sum(piece.saved_bytes > 0 for piece in problem.pieces) > FEW_PIECES:
        return None
    tables = {
        kind: few.loads[free] + _extra(problem, kind, few.items) for kind, free in zip(problem.levels, loose.levels)
    }
    cuts = best_cuts(problem, tables)
    if cuts is None:
        return None
    return Solution(few.stages(problem, cuts.positions), cuts.levels, cuts.bottleneck, cuts.bottleneck,
                    "every chain of ideals was priced, with every choice of what to recompute")


def _extra(problem: Problem, kind: Kind, ideals: Sequence[frozenset[int]]) -> np.ndarray:
    """Seconds of computing again in the stages between any two ideals; inf where not even that helps."""
    seconds, room = problem.again[kind.device], kind.device.memory
    extra = np.zeros((len(ideals),) * 2)
    for a, b in product(range(len(ideals)), repeat=2) if room is not None else ():
        items = ideals[b] - ideals[a]
        if not items or not ideals[a] < ideals[b]:
            continue
        inside = [number for number, piece in enumerate(problem.pieces) if items.issuperset(piece.pins)]
        listed = sorted(items)
        chosen = choose_recomputed(
            [Choice(seconds[number], kind.in_flight * problem.pieces[number].saved_bytes,
                    problem.pieces[number].workspace_bytes) for number in inside],
            held_bytes(problem, listed, kind.in_flight), problem.workspace_bytes[listed].max(initial=0.0), room)
        extra[a, b] = np.inf if chosen is None else seconds[[inside[index] for index in chosen]].sum()
    return extra


def recomputing_loads(problem: Problem, kind: Kind) -> np.ndarray:
    """Loads of all segments where those above the memory recompute their cheapest pieces, byte for byte."""
    room = kind.device.memory
    free = replace(kind, device=replace(kind.device, memory=None))
    loose = replace(problem, levels=(free,), times={free.device: problem.times[kind.device]},
                    counts=(problem.num_stages,))
    loads = segment_loads(loose, free)
    if room is None or not problem.memory_may_bind():
        return loads
    scratch = segment_workspace(problem)
    held = segment_memory(problem, kind) - scratch
    seconds = problem.again[kind.device]
    saved = [kind.in_flight * piece.saved_bytes for piece in problem.pieces]
    extra = np.zeros_like(held)
    for number in cheapest_first(seconds, saved):
        piece = problem.pieces[number]
        block = (slice(0, min(piece.pins) + 1), slice(max(piece.pins) + 1, None))
        short = held[block] + scratch[block] > room * (1 + FITS)
        extra[block] += np.where(short, seconds[number], 0.0)
        held[block] -= np.where(short, saved[number], 0.0)
        scratch[block] = np.where(short, np.maximum(scratch[block], piece.workspace_bytes), scratch[block])
    extra[held + scratch > room * (1 + FITS)] = np.inf
    return loads + extra


def cheapest_first(seconds: Sequence[float], saved: Sequence[float]) -> list[int]:
    """Indices with something to save, by seconds per byte."""
    useful = [index for index in range(len(saved)) if saved[index] > 0]
    return sorted(useful, key=lambda index: (seconds[index] / saved[index], index))


@dataclass(frozen=True)
class Choice:
    """What a stage may compute again: the seconds that takes, the bytes it saves, the scratch it needs."""

    seconds: float
    saved: float
    scratch: float


def choose_recomputed(choices: Sequence[Choice], held: float, scratch: float, room: float) -> list[int] | None:
    """Which choices a stage takes so that ``held + scratch`` bytes come down to ``room``, by index.

    The cheapest set where there are few, else greedily by cost and then without the needless. None where not even all
    of them would do. ``scratch`` grows to that of what is chosen, so every limit on it is tried.
    """
    room *= 1 + FITS
    if held + scratch <= room:
        return []
    best: tuple[float, list[int]] | None = None
    for limit in sorted({scratch, *(choice.scratch for choice in choices if choice.scratch > scratch)}):
        within = [index for index, choice in enumerate(choices) if choice.scratch <= limit]
        chosen = _cover([choices[index] for index in within], held + limit - room)
        if chosen is not None:
            cost = sum(choices[within[index]].seconds for index in chosen)
            if best is None or cost < best[0]:
                best = cost, [within[index] for index in chosen]
    return None if best is None else best[1]


def _cover(choices: Sequence[Choice], excess: float) -> list[int] | None:
    """Choices that save ``excess`` bytes or more at little cost, by index; None where all of them do not."""
    seconds, saved = [choice.seconds for choice in choices], [choice.saved for choice in choices]
    useful = cheapest_first(seconds, saved)
    if sum(saved[index] for index in useful) < excess:
        return None
    if len(useful) <= FEW_PIECES:
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
    """The cheapest of all choices that save ``excess`` bytes or more; there is one."""
    choices: list[tuple[float, float, tuple[int, ...]]] = [(0.0, 0.0, ())]
    for index in useful:
        more = [(cost + seconds[index], freed + saved[index], (*chosen, index)) for cost, freed, chosen in choices
                if freed < excess]
        ranked = sorted([*choices, *more], key=lambda choice: (choice[0], -choice[1]))
        # Dearer ones must save more than all before.
        best = np.maximum.accumulate([-1.0, *(freed for _, freed, _ in ranked)])
        choices = [choice for choice, most in zip(ranked, best) if choice[1] > most]
    return sorted(next((chosen for _, freed, chosen in choices if freed >= excess), useful))
