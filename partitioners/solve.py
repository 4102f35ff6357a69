"""``partition``: from a cost graph to a plan with its proof."""
from __future__ import annotations

import time
from itertools import islice
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import networkx as nx
import numpy as np

from partitioners.bounds import simple_bound
from partitioners.coarse import crossing_tensors, merge_runs, promising_positions
from partitioners.costs import build_plan
from partitioners.devices import Cluster, Device, Link, MemoryModel
from partitioners.errors import InfeasibleError, PartitionError
from partitioners.graph import Node, check
from partitioners.ideals import Chain, TooMany, best_chain
from partitioners.memory import fewest_stages, hopeless, memory_problem
from partitioners.orders import candidate_orders, through
from partitioners.plan import Plan, Setting, format_seconds
from partitioners.problem import Kind, Problem, build_problem, reorder
from partitioners.reduction import can_reduce, reduce_around_memory, reduce_problem
from partitioners.segments import Cuts, best_cuts, segment_loads
from partitioners.sweeps import NoSolver, can_sweep, narrow

OBJECTIVES = ("sum", "overlap")
SAME = 1 + 1e-12
FEW_IDEALS = 30_000         # tried before anything that is not exact, where memory binds
MOST_STATES = 6_000_000      # ideals times stages whose loads are kept at once
MOST_SWEPT = 1500   # items beyond which integer programmes are too slow to help
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


def partition(graph: nx.DiGraph, num_stages: int | None = None, *, devices: Cluster | Sequence[Device] | None = None,
              objective: str = "sum", bandwidth: float | None = None, latency: float = 0.0, memory: float | None = None,
              memory_model: MemoryModel = MemoryModel(), num_microbatches: int = 1, stages_per_worker: int = 1,
              allow_empty: bool = False, prefer_single_tensor: float = 0.05, gap: float = 0.0,
              time_limit: float | None = None, progress: Callable[[str], None] | None = None) -> Plan:
    """Cut ``graph`` into stages whose largest load is as small as possible.

    ``num_stages`` equal devices, or ``devices``: a ``Cluster``, or classes to use in any order. ``bandwidth`` in bytes
    per second (None: free links), ``latency`` in seconds, ``memory`` in bytes per device. ``objective``: ``"sum"``
    adds computing and communication, ``"overlap"`` takes the larger. Unless ``allow_empty``, there are exactly
    ``num_stages`` stages and each holds parameters. Among cuts within ``prefer_single_tensor`` of the best, the one
    whose boundaries carry the fewest tensors wins. Stops at ``gap`` or after ``time_limit`` seconds.
    """
    if objective not in OBJECTIVES:
        raise PartitionError(f"objective {objective!r} is none of {', '.join(OBJECTIVES)}")
    check(graph)
    cluster = _cluster(graph, num_stages, devices, Link(bandwidth, latency), memory)
    wanted = num_stages or cluster.num_devices
    problem = build_problem(graph, cluster=cluster, num_stages=wanted, objective=objective, memory_model=memory_model,
                            num_microbatches=num_microbatches, allow_empty=allow_empty)
    _check_size(graph, problem)
    solution = _solve(problem, prefer_single_tensor, gap, time_limit, progress)
    used = [stage for stage, items in enumerate(solution.stages) if items]
    setting = Setting(objective=objective, cluster=cluster, memory_model=memory_model,
                      num_microbatches=num_microbatches, stages_per_worker=stages_per_worker, allow_empty=allow_empty,
                      stage_devices=tuple(_device_index(problem, cluster, solution.levels[stage]) for stage in used))
    stage_of = {node: number for number, stage in enumerate(used) for node in solution.stages[stage]}
    return build_plan(graph, stage_of, setting, lower_bound=solution.lower_bound, proof=solution.proof)


def _cluster(graph: nx.DiGraph, num_stages: int | None, devices: Cluster | Sequence[Device] | None, link: Link,
             memory: float | None) -> Cluster:
    """One cluster from the ways to name it; ordered ones get one entry per device."""
    known = graph.graph.get("devices", ())
    if devices is None and num_stages is None and not known:
        raise PartitionError("neither num_stages nor devices is given; say into how many stages to cut")
    if devices is None and num_stages is not None:
        if num_stages < 1:
            raise PartitionError(f"num_stages is {num_stages}; it must be at least 1")
        base = next((device for device in known if device.pays_link), Device(_only_class(graph)))
        devices = (replace(base, count=num_stages),)
    if not isinstance(devices, Cluster):
        devices = Cluster(tuple(known if devices is None else devices), links=(link,))
    if memory is not None:
        devices = replace(devices, devices=tuple(replace(device, memory=memory) if device.pays_link else device
                                                 for device in devices.devices))
    if devices.ordered:
        devices = replace(devices, devices=tuple(replace(device, count=1) for device in devices.devices
                                                 for _ in range(device.count)))
    if num_stages is not None and devices.num_devices != num_stages:
        raise PartitionError(f"num_stages is {num_stages} but there are {devices.num_devices} devices; give one of them")
    return devices


def _only_class(graph: nx.DiGraph) -> str:
    """The device class that the costs name, if they name exactly one."""
    names = {name for _, data in graph.nodes(data=True) if isinstance(data.get("forward"), dict)
             for name in data["forward"]}
    return names.pop() if len(names) == 1 else "device"


def _device_index(problem: Problem, cluster: Cluster, level: int) -> int:
    if cluster.ordered:
        return level
    return cluster.devices.index(problem.levels[level].device)


def _check_size(graph: nx.DiGraph, problem: Problem) -> None:
    if problem.must_hold is None:
        return
    have = int(problem.must_hold.sum())
    if have < problem.num_stages:
        kind = "with parameters " if problem.has_parameters.any() else ""
        raise PartitionError(f"the model has {have} cuttable nodes {kind}but {problem.num_stages} stages were asked for; "
                             f"try num_stages={max(have, 1)}" + ("" if have > 1 else " (or allow_empty=True)"))


def _solve(problem: Problem, prefer_single_tensor: float, gap: float, time_limit: float | None,
           progress: Callable[[str], None] | None) -> Solution:
    """The best solution found, with the best bound; then the one nearby that carries the fewest tensors."""
    deadline = time.monotonic() + (np.inf if time_limit is None else time_limit)
    solution = _relaxed(problem, gap, deadline, progress) or _optimise(problem, gap, deadline, progress)
    if solution is None:
        raise InfeasibleError(_why_infeasible(problem, deadline))
    if prefer_single_tensor > 0:
        limit = solution.bottleneck * (1 + prefer_single_tensor)
        fewest = _fewest_tensors(list(_tables(problem)), limit)
        if fewest is not None:
            ordered, cuts = fewest
            return replace(solution, stages=_runs(ordered, cuts), levels=cuts.levels, bottleneck=cuts.bottleneck)
    return solution


def _relaxed(problem: Problem, gap: float, deadline: float,
             progress: Callable[[str], None] | None) -> Solution | None:
    """The optimum if stages might be empty, where it happens to fill them all; it is easier to find."""
    if problem.allow_empty:
        return None
    solution = _optimise(replace(problem, allow_empty=True), gap, deadline, progress)
    if solution is None:
        return None
    must = {node for index in np.flatnonzero(problem.must_hold) for node in problem.items[index]}
    full = sum(1 for stage in solution.stages if must.intersection(stage))
    return solution if full == problem.num_stages else None


def _tables(problem: Problem) -> Iterator[tuple[Problem, dict[Kind, np.ndarray]]]:
    """The problem in several orders, each with the loads of its segments."""
    for order in islice(candidate_orders(problem), MANY_ORDERS if len(problem) <= 600 else FEW_ORDERS):
        ordered = reorder(problem, order)
        if len(ordered) > LONG:
            ordered = _focus(ordered)
        yield ordered, _loads(ordered)


def _loads(problem: Problem) -> dict[Kind, np.ndarray]:
    return {kind: segment_loads(problem, kind) for kind in dict.fromkeys(problem.levels)}


def _focus(ordered: Problem) -> Problem:
    """A long order made short: cuttable where a rough solution cuts and near by, and at the promising positions."""
    rough = promising_positions(ordered, WINDOWS)
    merged = merge_runs(ordered, rough)
    cuts = best_cuts(merged, _loads(merged))
    if cuts is None:
        return merged
    ends = np.append(rough, len(ordered))
    places = {int(ends[cut - 1]) for cut in cuts.positions if cut > 0}
    reach = max(2, WINDOWS // (2 * len(places)))
    near = np.unique([np.clip(place + np.arange(-reach, reach + 1), 1, len(ordered)) for place in places])
    return merge_runs(ordered, np.unique(np.concatenate((near, rough[::2]))))


def _runs(ordered: Problem, cuts: Cuts) -> tuple[tuple[Node, ...], ...]:
    return tuple(sum(ordered.items[a:b], ()) for a, b in zip(cuts.positions, cuts.positions[1:]))


def _optimise(problem: Problem, gap: float, deadline: float,
              progress: Callable[[str], None] | None) -> Solution | None:
    """Orders from above, bounds and ideals from below; None if nothing fits."""
    bound, proof = simple_bound(problem)
    reduced = reduce_problem(problem) if len(problem) <= HUGE else problem
    best = None
    for ordered, loads in _tables(reduced):
        cuts = best_cuts(ordered, loads)
        if cuts is not None and (best is None or cuts.bottleneck * SAME < best.bottleneck):
            best = Solution(_runs(ordered, cuts), cuts.levels, cuts.bottleneck, bound, proof)
        if best is not None and best.bottleneck * (1 - gap) <= bound * SAME:
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
    even = _optimise(memory_problem(problem), 0.0, deadline, None)
    if even is None or even.lower_bound > 1 + 1e-9:
        return None, False
    place = {node: number for number, stage in enumerate(even.stages) for node in stage}
    order = sorted(range(len(problem)), key=lambda item: place[problem.items[item][0]])
    ordered = reorder(problem, order)
    cuts = best_cuts(ordered, _loads(ordered))
    return cuts and Solution(_runs(ordered, cuts), cuts.levels, cuts.bottleneck, bound, proof), True


def _why_infeasible(problem: Problem, deadline: float) -> str:
    """What does not fit, and what would."""
    text = f"no cut into {problem.num_stages} stages is possible"
    if not problem.memory_may_bind():
        return (f"{text}: order, co-location, allowed classes and the parameters that each stage needs leave none; "
                "try fewer stages or allow_empty=True")
    reason = hopeless(problem)
    if reason:
        return f"{text}: {reason}; try more memory per device or smaller micro-batches"
    caps = [kind.device.memory for kind in problem.levels if kind.device.memory is not None]
    even = _optimise(memory_problem(problem), 0.0, deadline, None)
    ordered = [reorder(problem, order) for order in islice(candidate_orders(problem), FEW_ORDERS)]
    counts = [count for count in map(fewest_stages, ordered) if count] if len(problem) <= LONG else []
    advice = []
    if even is not None and len(set(caps)) == 1:
        least = even.bottleneck * caps[0]
        held = sum(size for _, size in problem.shared) + problem.workspace_bytes.max(initial=0.0)
        advice.append(f"memory of {least + held:,.0f} bytes per device" + (" or less" if held else ""))
    if counts and min(counts) > problem.num_stages:
        advice.append(f"{min(counts)} stages")
    total = problem.fixed_bytes.sum() + problem.levels[0].in_flight * problem.activation_bytes.sum()
    return (f"{text}: the model needs {total:,.0f} bytes in all and a device has {min(caps):,.0f}; "
            f"try {' or '.join(advice or ['more memory per device'])}")


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
        if best is None or not can_sweep(problem) or len(problem) > MOST_SWEPT or _gap(best) <= gap:
            return best
        if progress:
            progress(f"{reason}; sweeping with integer programmes, gap {_gap(best):.2%}")
        return _by_sweeps(problem, best, gap, deadline, progress)
    proof = "every chain of ideals that could be better was priced"
    if chain is not None:
        stages = tuple(tuple(node for item in stage for node in problem.items[item]) for stage in chain.stages)
        return Solution(stages, chain.levels, chain.bottleneck, chain.bottleneck, proof)
    return None if best is None else replace(best, lower_bound=best.bottleneck, proof=proof)


def _few_ideals(problem: Problem, whole: Problem, best: Solution | None,
                deadline: float) -> tuple[Chain | None, Solution | None, bool]:
    """Where memory binds: the exact search if ideals are few, else bounds from both sides; and whether that settles it."""
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
            stages = chain and tuple(tuple(node for item in stage for node in side.items[item]) for stage in chain.stages)
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
    return (solution.bottleneck - solution.lower_bound) / solution.bottleneck if solution.bottleneck else 0.0


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
        for bracket in narrow(problem, best.bottleneck, best.lower_bound, evaluate, gap=gap,
                              deadline=min(deadline, time.monotonic() + EFFORT)):
            if bracket.upper < best.bottleneck:
                ordered, cuts = found[bracket.upper]
                best = replace(best, stages=_runs(ordered, cuts), levels=cuts.levels, bottleneck=bracket.upper)
            if bracket.lower > best.lower_bound:
                best = replace(best, lower_bound=bracket.lower, proof="integer programmes, one per stage, find no better")
            if progress:
                progress(f"bottleneck {format_seconds(best.bottleneck)}, gap {_gap(best):.2%}")
    except NoSolver as error:
        if progress:
            progress(f"no sweeps: {error}")
    return best


def _fewest_tensors(tables: list, limit: float) -> tuple[Problem, Cuts] | None:
    """Cuts within ``limit`` whose boundaries carry as few tensors as possible, then the lowest bottleneck."""
    counts = [crossing_tensors(ordered) for ordered, _ in tables]
    for most in np.unique(np.concatenate(counts)):
        found = None
        for (ordered, loads), count in zip(tables, counts):
            cuts = best_cuts(ordered, loads, np.flatnonzero(count <= most))
            if cuts is not None and cuts.bottleneck <= limit and (found is None or
                                                                  cuts.bottleneck * SAME < found[1].bottleneck):
                found = ordered, cuts
        if found is not None:
            return found
    return None
