"""The search for stages: orders from above, ideals and sweeps from below, and what to say when nothing fits."""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from partitioners.errors import InfeasibleError
from partitioners.graph import Node
from partitioners.plan import gap_above
from partitioners.solvers.bounds import simple_bound
from partitioners.solvers.chain_search import Chain, best_chain
from partitioners.solvers.coarse import crossing_tensors, merge_runs, promising_positions
from partitioners.solvers.ideals import TooMany
from partitioners.solvers.memory import fewest_stages, hopeless, memory_problem, stage_bytes, with_memory
from partitioners.solvers.orders import candidate_orders, through
from partitioners.solvers.problem import Kind, Problem, reorder
from partitioners.solvers.reduction import can_reduce, reduce_around_memory, reduce_problem
from partitioners.solvers.segments import Cuts, best_cuts, fewest_cuts, segment_loads
from partitioners.solvers.sweeps import Bracket, NoSolver, can_sweep, narrow
from partitioners.units import format_bytes, format_seconds, format_share

SAME = 1 + 1e-12
FEW_IDEALS = 30_000         # tried before anything that is not exact, where memory binds
MOST_STATES = 6_000_000      # ideals times stages whose loads are kept at once
MOST_SWEPT = 1500   # items beyond which integer programmes are too slow to help
PATIENCE = 3.0     # seconds of search where no time limit is given and a few per cent do not matter
LAST = 1.5          # seconds for a bound when the time is up
EFFORT = 55.0       # seconds that sweeps may take where no time limit is given
MANY_ORDERS, FEW_ORDERS = 4, 2    # of short and of long problems
HUGE = 20_000       # items beyond which only orders are cut, and the gap told
LONG = 2000      # items of which all n^2 segments are still cheap
WINDOWS = 1200   # cuttable positions kept of a longer order


@dataclass(frozen=True)
class Solution:
    """Nodes per stage, the level of each stage, its largest load, and what is proved."""
    stages: tuple[tuple[Node, ...], ...]
    levels: tuple[int, ...]
    bottleneck: float
    lower_bound: float = 0.0
    proof: str = ""


def solve(problem: Problem, prefer_single_tensor: float, gap: float, time_limit: float | None,
           progress: Callable[[str], None] | None) -> Solution:
    """The best solution found, with the best bound; then the one nearby that carries the fewest tensors."""
    if time_limit is None:
        time_limit = PATIENCE if prefer_single_tensor > 0 else np.inf
    deadline = time.monotonic() + time_limit
    solution = _relaxed(problem, gap, deadline, progress) or optimise(problem, gap, deadline, progress)
    if solution is None:
        raise InfeasibleError(why_infeasible(problem, deadline))
    if prefer_single_tensor > 0:
        limit = solution.bottleneck * (1 + prefer_single_tensor)
        fewest = _fewest_tensors(list(tables(problem)), limit)
        if fewest is not None:
            ordered, cuts = fewest
            return replace(solution, stages=runs(ordered, cuts), levels=cuts.levels, bottleneck=cuts.bottleneck)
    return solution


def _relaxed(problem: Problem, gap: float, deadline: float,
             progress: Callable[[str], None] | None) -> Solution | None:
    """The optimum if stages might be empty, where it happens to fill them all; it is easier to find."""
    if problem.allow_empty:
        return None
    solution = optimise(replace(problem, allow_empty=True), gap, deadline, progress)
    if solution is None:
        return None
    must = {node for index in np.flatnonzero(problem.must_hold) for node in problem.items[index]}
    full = sum(1 for stage in solution.stages if must.intersection(stage))
    return solution if full == problem.num_stages else None


def tables(problem: Problem) -> Iterator[tuple[Problem, dict[Kind, np.ndarray]]]:
    """The problem in several orders, each with the loads of its segments."""
    for order in islice(candidate_orders(problem), MANY_ORDERS if len(problem) <= 600 else FEW_ORDERS):
        ordered = reorder(problem, order)
        if len(ordered) > LONG:
            ordered = _focus(ordered)
        yield ordered, loads_of(ordered)


def loads_of(problem: Problem) -> dict[Kind, np.ndarray]:
    """Seconds of each stage of a solution."""
    return {kind: segment_loads(problem, kind) for kind in dict.fromkeys(problem.levels)}


def _focus(ordered: Problem) -> Problem:
    """A long order made short: cuttable where a rough solution cuts and near by, and at the promising positions."""
    rough = promising_positions(ordered, WINDOWS)
    merged = merge_runs(ordered, rough)
    cuts = best_cuts(merged, loads_of(merged))
    if cuts is None:
        return merged
    ends = np.append(rough, len(ordered))
    places = {int(ends[cut - 1]) for cut in cuts.positions if cut > 0}
    reach = max(2, WINDOWS // (2 * len(places)))
    near = np.unique([np.clip(place + np.arange(-reach, reach + 1), 1, len(ordered)) for place in places])
    return merge_runs(ordered, np.unique(np.concatenate((near, rough[::2]))))


def runs(ordered: Problem, cuts: Cuts) -> tuple[tuple[Node, ...], ...]:
    """The nodes of each stage of an order that is cut at these positions."""
    return tuple(sum(ordered.items[a:b], ()) for a, b in zip(cuts.positions, cuts.positions[1:]))


def optimise(problem: Problem, gap: float, deadline: float,
              progress: Callable[[str], None] | None) -> Solution | None:
    """Orders from above, bounds and ideals from below; None if nothing fits."""
    bound, proof = simple_bound(problem)
    reduced = reduce_problem(problem) if len(problem) <= HUGE else problem
    best = None
    for ordered, loads in tables(reduced):
        cuts = best_cuts(ordered, loads)
        if cuts is not None and (best is None or cuts.bottleneck * SAME < best.bottleneck):
            best = Solution(runs(ordered, cuts), cuts.levels, cuts.bottleneck, bound, proof)
        if best is not None and best.bottleneck <= bound * (1 + gap) * SAME:
            return best
    if len(reduced) > HUGE:
        return best
    if best is None and reduced.memory_may_bind():
        best, possible = _fit(reduced, bound, proof, deadline)
        if not possible:
            return None
    return _by_ideals(reduced, problem, best, gap, deadline, progress)


def _fit(problem: Problem, bound: float, proof: str, deadline: float) -> tuple[Solution | None, bool]:
    """A solution that fits, from the one that uses memory most evenly; and whether there can be one at all."""
    even = optimise(memory_problem(problem), 0.0, deadline, None)
    if even is None or even.lower_bound > 1 + 1e-9:
        return None, False
    place = {node: number for number, stage in enumerate(even.stages) for node in stage}
    order = sorted(range(len(problem)), key=lambda item: place[problem.items[item][0]])
    ordered = reorder(problem, order)
    cuts = best_cuts(ordered, loads_of(ordered))
    return cuts and Solution(runs(ordered, cuts), cuts.levels, cuts.bottleneck, bound, proof), True


def why_infeasible(problem: Problem, deadline: float) -> str:
    """What does not fit, and what would."""
    text = f"no cut into {problem.num_stages} stages is possible"
    if not problem.memory_may_bind():
        return (f"{text}: order, co-location, allowed classes and the parameters that each stage needs leave none; "
                "try fewer stages or allow_empty=True")
    least, alone = _least_memory(problem, deadline), hopeless(problem)
    advice = [f"memory of {least}"] if least else []
    if not alone and len(problem) <= LONG:
        orders = (reorder(problem, order) for order in islice(candidate_orders(problem), FEW_ORDERS))
        counts = [count for count in map(fewest_stages, orders) if count]
        advice += [f"{min(counts)} stages"] if counts and min(counts) > problem.num_stages else []
    total = problem.fixed_bytes.sum() + problem.levels[0].in_flight * problem.activation_bytes.sum()
    room = min(kind.device.memory for kind in problem.levels if kind.device.memory is not None)
    reason = alone or (f"the model needs {format_bytes(total)} in all, {format_bytes(total / problem.num_stages)} a "
                       f"stage if that could be shared out evenly, and a device has {format_bytes(room)}")
    return f"{text}: {reason}; try {' or '.join(advice or ['more memory per device or smaller micro-batches'])}"


def _least_memory(problem: Problem, deadline: float) -> str | None:
    """Bytes per device that would do, where all devices with a limit have the same; "at most" where not proved."""
    if len({kind.device.memory for kind in problem.levels} - {None}) != 1:
        return None
    even = optimise(memory_problem(with_memory(problem, 1.0)), 0.0, deadline, None)
    if even is None:
        return None
    limited = [(stage, problem.levels[level]) for stage, level in zip(even.stages, even.levels)
               if problem.levels[level].device.memory is not None]
    need = max((stage_bytes(problem, stage, kind.in_flight) for stage, kind in limited), default=0.0)
    return f"{math.ceil(need * (1 - 1e-12)):,} bytes per device" + (
        " at most" if need > even.lower_bound * (1 + 1e-9) else ""
    )


def _by_ideals(problem: Problem, whole: Problem, best: Solution | None, gap: float, deadline: float,
               progress: Callable[[str], None] | None) -> Solution | None:
    """Improve ``best`` to the proven optimum if the ideals can be counted, else narrow the gap by sweeps."""
    try:
        chain = None
        if problem.memory_may_bind():
            chain, best, done = _few_ideals(problem, whole, best, deadline)
            if done:
                return best
        if chain is None:
            chain = best_chain(problem, best.bottleneck if best else np.inf, limit=_most_ideals(problem),
                               deadline=deadline)
    except TooMany as reason:
        if best is not None and problem.nets and time.monotonic() > deadline:
            best = _with_free_links(problem, best, gap)
        if best is None or not can_sweep(problem) or len(problem) > MOST_SWEPT or _gap(best) <= gap:
            return best
        if progress:
            progress(f"{reason}; sweeping with integer programmes, gap {format_share(_gap(best), 2)}")
        return _by_sweeps(problem, best, gap, deadline, progress)
    proof = "every chain of ideals that could be better was priced"
    if chain is not None:
        stages = tuple(tuple(node for item in stage for node in problem.items[item]) for stage in chain.stages)
        return Solution(stages, chain.levels, chain.bottleneck, chain.bottleneck, proof)
    return None if best is None else replace(best, lower_bound=best.bottleneck, proof=proof)


def _with_free_links(problem: Problem, best: Solution, gap: float) -> Solution:
    """``best`` with the bound of free links: cuts then balance so well that few ideals are left to look at."""
    free = optimise(replace(problem, nets=(), objective="sum"), gap, time.monotonic() + LAST, None)
    if free is None or free.lower_bound <= best.lower_bound:
        return best
    return replace(best, lower_bound=min(free.lower_bound, best.bottleneck), proof=f"if links were free: {free.proof}")


def _few_ideals(problem: Problem, whole: Problem, best: Solution | None,
                deadline: float) -> tuple[Chain | None, Solution | None, bool]:
    """Where memory binds: the exact search if ideals are few, else bounds from both sides; and whether that settles
    it."""
    try:
        chain = best_chain(problem, best.bottleneck if best else np.inf, limit=FEW_IDEALS, deadline=deadline)
    except TooMany:
        best = _around_memory(whole, best, deadline) or best
        return None, best, best is not None and _gap(best) <= 1e-12
    if chain is None:
        proof = "every chain of ideals that could be better was priced"
        return None, best and replace(best, lower_bound=best.bottleneck, proof=proof), True
    return chain, best, False


def _around_memory(problem: Problem, best: Solution | None, deadline: float) -> Solution | None:
    """Bounds from both sides where only memory keeps the ideals from being few."""
    if not problem.memory_may_bind() or not can_reduce(problem):
        return None
    try:
        for side in reduce_around_memory(problem):
            known = best.bottleneck if best else np.inf
            chain = best_chain(side, known, limit=_most_ideals(side), deadline=deadline)
            below = side.fixed_bytes.sum() < problem.fixed_bytes.sum()
            stages = chain and tuple(
                tuple(node for item in stage for node in side.items[item]) for stage in chain.stages
            )
            if chain is not None and not below:
                best = Solution(stages, chain.levels, chain.bottleneck, best.lower_bound if best else 0.0,
                                best.proof if best else "")
    except TooMany:
        return best
    if best is None:
        return None
    bound = chain.bottleneck if chain is not None else best.bottleneck
    return replace(best, lower_bound=max(best.lower_bound, bound),
                   proof="every chain of ideals that could be better was priced, leaving out bytes of light items")


def _most_ideals(problem: Problem) -> int:
    return min(1_200_000, MOST_STATES // (problem.num_stages + 1))


def _gap(solution: Solution) -> float:
    return gap_above(solution.bottleneck, solution.lower_bound)


def _by_sweeps(problem: Problem, best: Solution, gap: float, deadline: float,
               progress: Callable[[str], None] | None) -> Solution:
    """Narrow the gap with integer programmes; without scipy, ``best`` as it is."""
    found: dict[float, tuple[Problem, Cuts]] = {}

    def evaluate(chain: list[frozenset[int]]) -> float:
        ordered = reorder(problem, through(problem, chain))
        cuts = best_cuts(ordered, {kind: segment_loads(ordered, kind) for kind in problem.levels})
        if cuts is None:
            return np.inf
        found[cuts.bottleneck] = ordered, cuts
        return cuts.bottleneck
    try:
        for bracket in narrow(
            problem,
            Bracket(best.bottleneck, best.lower_bound, _ideals(problem, best)),
            evaluate,
            gap=gap,
            deadline=deadline if np.isfinite(deadline) else time.monotonic() + EFFORT,
        ):
            if bracket.upper < best.bottleneck:
                ordered, cuts = found[bracket.upper]
                best = replace(best, stages=runs(ordered, cuts), levels=cuts.levels, bottleneck=bracket.upper)
            if bracket.lower > best.lower_bound:
                best = replace(
                    best, lower_bound=bracket.lower, proof="integer programmes, one per stage, find no better"
                )
            if progress:
                progress(f"bottleneck {format_seconds(best.bottleneck)}, gap {format_share(_gap(best), 2)}")
    except NoSolver as error:
        if progress:
            progress(f"no sweeps: {error}")
    return best


def _ideals(problem: Problem, solution: Solution) -> tuple[frozenset[int], ...]:
    """The items of the first stage, of the first two, and so on."""
    item_of = {nodes[0]: item for item, nodes in enumerate(problem.items)}
    held: set[int] = set()
    chain = []
    for stage in filter(None, solution.stages):
        held |= {item_of[node] for node in stage if node in item_of}
        chain.append(frozenset(held))
    return tuple(chain)


def _fewest_tensors(tables: list, limit: float) -> tuple[Problem, Cuts] | None:
    """Cuts within ``limit`` whose widest boundary carries as few tensors as possible, then all together, then the
    lowest bottleneck."""
    counts = [crossing_tensors(ordered) for ordered, _ in tables]
    for most in np.unique(np.concatenate(counts)):
        best = None
        for (ordered, loads), count in zip(tables, counts):
            found = fewest_cuts(ordered, loads, count, limit, np.flatnonzero(count <= most))
            if found is not None and (
                best is None or (found[0], found[1].bottleneck * SAME) < (best[0], best[2].bottleneck)
            ):
                best = found[0], ordered, found[1]
        if best is not None:
            return best[1:]
    return None
