"""Why a plan is as it is, in the model's own names: each cut, its second choice, and what limits further gain."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from textwrap import wrap

import networkx as nx
import numpy as np

from partitioners.graph import Link
from partitioners.plan import Plan
from partitioners.solvers import (
    Problem,
    best_cuts,
    build_problem,
    crossing_tensors,
    fewest_cuts,
    loads_of,
    merge_runs,
    period,
    promising_positions,
    recomputing_loads,
    reorder,
    round_trips,
    segment_loads,
    segment_memory,
    simple_bound,
)
from partitioners.units import format_bytes, format_seconds, format_share

LONG, WINDOWS = 1500, 1000
BELOW = 1 - 5e-5      # of a bottleneck: what is told as better
FEW_CUTS = 7    # that are told one by one
NEARBY = 40     # other places of a cut that are priced where one stage's load is not all


@dataclass(frozen=True)
class CutStory:
    """The cut after stage ``stage``: the nodes on both sides, and the best bottleneck if it must be elsewhere.

    ``second`` names the last node before that other place; both are None where there is no other place. The other cuts
    move along where a stage's load is all that counts; for 1F1B, several stages per worker and recomputation they stay.
    ``more_tensors``: whether it is a better place, but not without more tensors across the cuts.
    """
    stage: int
    last: str
    first: str
    second: str | None
    second_bottleneck: float | None
    more_tensors: bool = False


@dataclass(frozen=True)
class Limits:
    """Bottlenecks, in the order of this plan, if one thing were no limit; and the simple bound with its reason.

    ``any_tensors``: if any number of tensors might cross the cuts; the other two likewise. ``tensors_bind``: whether no
    better cuts of this order let as few tensors cross as the plan's. ``tensors`` cross all cuts of the plan together,
    ``most_tensors`` those for ``any_tensors``.
    """
    free_links: float
    unlimited_memory: float
    bound: float
    reason: str
    any_tensors: float
    tensors_bind: bool = False
    tensors: int = 0
    most_tensors: int = 0


def _ordered_problem(plan: Plan, graph: nx.DiGraph) -> tuple[Problem, list[int], list[int]]:
    """The problem with its items in an order that the plan cuts into runs, where it cuts, and the level per stage."""
    setting = plan.setting
    problem = build_problem(graph, cluster=setting.cluster, num_stages=plan.num_stages,
                            objective=setting.objective,
                            memory_model=setting.memory_model, num_microbatches=setting.num_microbatches,
                            allow_empty=setting.allow_empty)
    stage = [plan.stage_of[str(nodes[0])] for nodes in problem.items]
    order = sorted(range(len(problem)), key=stage.__getitem__)
    problem, stage = reorder(problem, order), sorted(stage)
    if len(problem) > LONG:
        cuts = np.flatnonzero(np.diff(stage)) + 1
        ends = np.unique(np.concatenate((promising_positions(problem, WINDOWS), cuts)))
        problem = merge_runs(problem, ends)
        stage = [plan.stage_of[str(nodes[0])] for nodes in problem.items]
    cuts = [int(np.searchsorted(stage, number)) for number in range(1, plan.num_stages)]
    levels = [number if problem.counts is None else
              next(level for level, kind in enumerate(problem.levels) if kind.device == setting.device(number))
              for number in range(plan.num_stages)]
    return problem, cuts, levels


def _sweeps(problem: Problem, levels: list[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Best bottleneck of the first ``j`` stages ending at each position, and of the rest starting there."""
    tables = {level: segment_loads(problem, problem.levels[level]) for level in dict.fromkeys(levels)}
    size = len(problem)
    ahead = [np.where(np.arange(size + 1) == 0, 0.0, np.inf)]
    back = [np.where(np.arange(size + 1) == size, 0.0, np.inf)]
    for level in levels:
        ahead.append(np.maximum(ahead[-1][:, None], tables[level]).min(axis=0))
    for level in reversed(levels):
        back.append(np.maximum(tables[level], back[-1][None, :]).min(axis=1))
    return ahead, back[::-1]


def _by_stage(plan: Plan) -> bool:
    """Whether the bottleneck is the largest load of a single stage, so that other cuts are easily priced."""
    setting = plan.setting
    return setting.objective != "1f1b" and setting.stages_per_worker == 1 and not setting.recompute


def cut_stories(plan: Plan, graph: nx.DiGraph) -> tuple[CutStory, ...]:
    """One story per cut, from the inputs to the outputs."""
    problem, cuts, levels = _ordered_problem(plan, graph)
    choices = (
        _second_choices(problem, cuts, levels) if _by_stage(plan) else _nearby_choices(plan, problem, cuts, levels)
    )
    better, count = plan.bottleneck * BELOW, crossing_tensors(problem)
    bind = (
        _by_stage(plan) and any(price < better for _, price in choices) and _tensors_bind(plan, problem, cuts, levels)
    )
    return tuple(CutStory(stage, _last(graph, problem.items[:cut]), str(problem.items[cut][0]),
                          _last(graph, problem.items[:place]) if np.isfinite(price) else None,
                          price if np.isfinite(price) else None,
                          price < better and bool(bind if _by_stage(plan) else count[place] > count[cut]))
                 for stage, (cut, (place, price)) in enumerate(zip(cuts, choices)))


def _fixed(problem: Problem, levels: list[int]) -> Problem:
    """The problem with the plan's device for each stage."""
    return replace(problem, levels=tuple(problem.levels[level] for level in levels), counts=None)


def _tensors_bind(plan: Plan, problem: Problem, cuts: list[int], levels: list[int]) -> bool:
    """Whether all better cuts of this order have a wider boundary than the plan, or more tensors over all
    boundaries."""
    count, fixed = crossing_tensors(problem), _fixed(problem, levels)
    found = fewest_cuts(fixed, loads_of(fixed), count, plan.bottleneck * BELOW,
                        np.flatnonzero(count <= count[cuts].max(initial=0)))
    return found is None or found[0] > count[cuts].sum()


def _second_choices(problem: Problem, cuts: list[int], levels: list[int]) -> list[tuple[int, float]]:
    """For each cut the best other place, all other cuts chosen anew, and the bottleneck there (inf: there is none)."""
    ahead, back = _sweeps(problem, levels)
    choices = []
    for stage, cut in enumerate(cuts):
        either = np.maximum(ahead[stage + 1], back[stage + 1])
        either[[0, cut]] = np.inf
        place = int(either.argmin())
        choices.append((place, float(either[place])))
    return choices


def _nearby_choices(plan: Plan, problem: Problem, cuts: list[int], levels: list[int]) -> list[tuple[int, float]]:
    """For each cut the best other place while the other cuts stay, and the bottleneck there (inf: there is none)."""
    price, tables = _pricing(plan, problem, levels)
    choices = []
    for stage, cut in enumerate(cuts):
        places = [0, *cuts, len(problem)]
        first, last = places[stage], places[stage + 2]
        larger = np.maximum(tables[stage][first, first + 1:last], tables[stage + 1][first + 1:last, last])
        best = cut, np.inf
        for place in (np.argsort(larger, kind="stable")[:NEARBY] + first + 1).tolist():
            places[stage + 1] = place
            if place != cut and np.isfinite(larger[place - first - 1]) and (found := price(places)) < best[1]:
                best = place, found
        choices.append(best)
    return choices


def _pricing(plan: Plan, problem: Problem, levels: list[int]) -> tuple[Callable[[list[int]], float], list[np.ndarray]]:
    """The bottleneck of any cuts of this order under the plan's objective, and the loads of segments per stage."""
    setting, kinds = plan.setting, [problem.levels[level] for level in levels]
    priced = replace(problem, nets=(), objective="sum") if plan.objective == "1f1b" else problem
    load = recomputing_loads if setting.recompute else segment_loads
    tables = {kind: load(priced, kind) for kind in dict.fromkeys(kinds)}
    trips = [round_trips(problem, kind.link_out) for kind in kinds]
    workers, cap = setting.workers(plan.num_stages), kinds[0].device.memory
    memory = segment_memory(problem, kinds[0]) if max(workers) + 1 < plan.num_stages and cap is not None else None

    def bottleneck(places: list[int]) -> float:
        loads = [float(tables[kind][a, b]) for kind, a, b in zip(kinds, places, places[1:])]
        if plan.objective == "1f1b":
            return period(loads, [float(trip[place]) for trip, place in zip(trips, places[1:-1])])
        if memory is not None and np.bincount(workers, memory[places[:-1], places[1:]]).max() > cap * (1 + 1e-12):
            return np.inf
        return float(np.bincount(workers, loads).max())
    return bottleneck, [tables[kind] for kind in kinds]


def _last(graph: nx.DiGraph, items: tuple[tuple, ...]) -> str:
    """Name of the last forward node of ``items``; of the last one if there is none."""
    for item in reversed(items):
        for node in reversed(item):
            if not graph.nodes[node].get("is_backward"):
                return str(node)
    return str(items[-1][-1])


def limits(plan: Plan, graph: nx.DiGraph) -> Limits:
    """What the bottleneck would be, in this plan's order, without links and without memory limits."""
    problem, cuts, levels = _ordered_problem(plan, graph)
    bound, reason = simple_bound(problem)
    if not _by_stage(plan):
        return Limits(plan.bottleneck, plan.bottleneck, plan.lower_bound, plan.proof, plan.bottleneck)

    def bottleneck(changed: Problem) -> float:
        return float(_sweeps(changed, levels)[0][-1][-1])
    free = tuple(replace(kind, link_in=Link(), link_out=Link()) for kind in problem.levels)
    nets = tuple(replace(net, fixed=0.0) for net in problem.nets)
    loose = tuple(replace(kind, device=replace(kind.device, memory=None)) for kind in problem.levels)
    times = {new.device: problem.times[old.device] for new, old in zip(loose, problem.levels)}
    fixed, count = _fixed(problem, levels), crossing_tensors(problem)
    best = best_cuts(fixed, loads_of(fixed))
    assert best is not None, "the plan's own cuts are there"
    return Limits(
        free_links=bottleneck(replace(problem, levels=free, nets=nets)),
        unlimited_memory=bottleneck(replace(problem, levels=loose, times=times)),
        bound=bound,
        reason=reason,
        any_tensors=best.bottleneck,
        tensors=int(count[cuts].sum()),
        most_tensors=int(count[list(best.positions)].sum()),
        tensors_bind=best.bottleneck < plan.bottleneck * BELOW and _tensors_bind(plan, problem, cuts, levels),
    )


def _title(graph: nx.DiGraph, names: dict[str, object], name: str) -> str:
    label = graph.nodes[names[name]].get("label")
    # "layers.3 (add.1)" is "layers.3:add.1" for people: it is named once.
    if label and label == f"{str(name).replace(':', ' (', 1)})":
        return str(label)
    return f"{label} ({name})" if label and label != name else name


def explain(plan: Plan, graph: nx.DiGraph) -> str:
    """The plan as a table, then each cut with its second choice, then what limits further gain.

    Of many cuts, those next to each other that the same tensors cross are told together.
    """
    names = {str(node): node for node in graph}
    lines = [str(plan), ""]
    stories = cut_stories(plan, graph) if plan.num_stages > 1 else ()
    for alike in _alike(plan, graph, names, stories):
        lines += _tell(plan, graph, names, alike[0]) if len(alike) == 1 else _tell_together(plan, graph, names, alike)
    lines += ["", *_tell_limits(plan, limits(plan, graph))]
    for tie in plan.ties:
        lines.append(f"parameter {tie.name} ({format_bytes(tie.bytes)}) lives on stages "
                     f"{', '.join(map(str, tie.stages))}; its gradient is exchanged once per step")
    return "\n".join(lines)


def _crossing(plan: Plan, graph: nx.DiGraph, names: dict[str, object], story: CutStory) -> str:
    """What crosses a cut: how many tensors, and their weight."""
    crossing = [boundary for boundary in plan.boundaries if boundary.source <= story.stage < boundary.target]
    values = list(dict.fromkeys(name for boundary in crossing for name in boundary.values))
    return (f"{len(values)} tensor{'s' * (len(values) != 1)} of "
            f"{_weight([graph.nodes[names[value]] for value in values])}")


def _alike(plan: Plan, graph: nx.DiGraph, names: dict[str, object],
           stories: Sequence[CutStory]) -> list[list[CutStory]]:
    """The stories one by one, or of many, those next to each other that say the same of what crosses."""
    if len(stories) <= FEW_CUTS:
        return [[story] for story in stories]
    found = groupby(stories, key=lambda story: (_crossing(plan, graph, names, story), story.second is None,
                                                story.more_tensors))
    return [list(group) for _, group in found]


def _tell_together(plan: Plan, graph: nx.DiGraph, names: dict[str, object], stories: Sequence[CutStory]) -> list[str]:
    """Cuts that are told alike: where they are, and how far their loads and second choices spread."""
    first, last = stories[0].stage, stories[-1].stage
    loads = [plan.stages[stage].load for stage in range(first, last + 2)]
    lines = [f"cuts {first} | {first + 1} to {last} | {last + 1}: loads {format_seconds(min(loads))} to "
             f"{format_seconds(max(loads))}, {_crossing(plan, graph, names, stories[0])} at each"]
    lines += wrap("after " + ", ".join(story.last for story in stories), 116, initial_indent="    ",
                  subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    seconds = [story.second_bottleneck for story in stories if story.second_bottleneck is not None]
    if not seconds:
        return [*lines, "    there is no other place for any of them"]
    spread = dict.fromkeys(_change(each, plan.bottleneck) for each in (min(seconds), max(seconds)))
    return [*lines, f"    second choices: bottleneck {format_seconds(min(seconds))} to {format_seconds(max(seconds))} ("
            f"{' to '.join(spread)}{'; not taken, because more tensors would cross' * stories[0].more_tensors})"]


def _tell(plan: Plan, graph: nx.DiGraph, names: dict[str, object], story: CutStory) -> list[str]:
    load = plan.stages[story.stage].load, plan.stages[story.stage + 1].load
    lines = [f"cut {story.stage} | {story.stage + 1}: after {_title(graph, names, story.last)}, before "
             f"{_title(graph, names, story.first)}: loads {format_seconds(load[0])} | {format_seconds(load[1])}, "
             f"{_crossing(plan, graph, names, story)}"]
    if story.second is None:
        lines.append("    there is no other place for it")
    else:
        change = _change(story.second_bottleneck, plan.bottleneck) + (
            "; not taken, because more tensors would cross" if story.more_tensors else "")
        lines.append(f"    second choice: after {_title(graph, names, story.second)}; bottleneck "
                     f"{format_seconds(story.second_bottleneck)} ({change})")
    return lines


def _change(value: float, known: float) -> str:
    change = value / known - 1 if known else 0.0
    return "the same" if abs(change) < 5e-5 else format_share(change, 2, signed=True)


def _weight(values: Sequence[dict]) -> str:
    """Bytes of the values, or their seconds on a link where a file says only those."""
    size = sum(float(data.get("output_bytes", 0.0)) for data in values)
    return format_bytes(size) if size else format_seconds(sum(float(data.get("transfer") or 0.0) for data in values))


def _tell_limits(plan: Plan, limit: Limits) -> list[str]:
    worst = max(range(plan.num_stages), key=lambda stage: plan.stages[stage].load)
    lines = [f"what limits further gain: stage {worst} is the bottleneck at {format_seconds(plan.bottleneck)}; "
             f"no plan is below {format_seconds(plan.lower_bound)} ({plan.proof})"]
    if limit.reason != plan.proof:
        lines.append(f"    {limit.reason}: {format_seconds(limit.bound)}")
    if limit.any_tensors < plan.bottleneck * BELOW:
        best = format_seconds(limit.any_tensors)
        lines.append(
            f"    fewer tensors across the cuts cost {_change(plan.bottleneck, limit.any_tensors)} ({limit.tensors} "
            f"in all; "
            f"with {limit.most_tensors}, {best})"
            if limit.tensors_bind
            else f"    other cuts of the same order: {best} ({_change(limit.any_tensors, plan.bottleneck)})"
        )
    for name, value in (("links: if they were free", limit.free_links),
                        ("memory: without a limit", limit.unlimited_memory)):
        if value < limit.any_tensors * (1 - 1e-9):
            than = " of that" if limit.any_tensors < plan.bottleneck * BELOW else ""
            lines.append(f"    {name}, {format_seconds(value)} ({_change(value, limit.any_tensors)}{than})")
    return lines
