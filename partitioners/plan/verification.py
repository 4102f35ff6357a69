"""An independent second opinion on a plan, from the raw graph alone; shares no arithmetic with the planner."""
from __future__ import annotations

import math
from collections import defaultdict

import networkx as nx

from partitioners.errors import PlanError
from partitioners.graph import digest
from partitioners.plan.plan import Plan

TOLERANCE = 1e-9


def verify(plan: Plan, graph: nx.DiGraph) -> None:
    """Raise ``PlanError`` unless every figure and every promise of ``plan`` holds on ``graph``."""
    if plan.graph_digest != digest(graph):
        raise PlanError(f"the plan was made for graph {plan.graph_digest}, this one is {digest(graph)}; plan it again")
    stage = check_rules(plan, graph)
    _check_stages(plan, graph, stage)
    _check_boundaries(plan, graph, stage)
    _check_workers(plan)
    loads: dict[int, float] = defaultdict(float)
    for number, cost in enumerate(plan.stages):
        loads[_worker(plan, number)] += cost.load
    if plan.objective == "1f1b":
        _same("period", plan.bottleneck, _period(plan, graph, stage))
    else:
        _same("bottleneck", plan.bottleneck, max(loads.values()))
    if plan.lower_bound > plan.bottleneck * (1 + TOLERANCE):
        raise PlanError(f"lower bound {plan.lower_bound} exceeds the bottleneck {plan.bottleneck}")
    _same("gap", plan.gap * plan.lower_bound, max(0.0, plan.bottleneck - plan.lower_bound), scale=plan.bottleneck)


def _same(name: str, claimed: float, found: float, scale: float = 0.0) -> None:
    if not abs(claimed - found) <= TOLERANCE * max(abs(claimed), abs(found), scale):
        raise PlanError(f"the plan says {name} = {claimed!r}, the graph says {found!r}")


def check_rules(plan: Plan, graph: nx.DiGraph) -> dict:
    """The stage of every node. Raises ``PlanError`` where order, co-location, allowed classes or stages that hold
    nothing forbid them, whatever the costs."""
    stage = {node: plan.stage_of.get(str(node), -1) for node in graph}
    for node, place in stage.items():
        if not 0 <= place < plan.num_stages:
            raise PlanError(f"node {str(node)!r} is on stage {place} of {plan.num_stages}")
    homes: dict = {}
    for node, data in graph.nodes(data=True):
        label = data.get("colocate")
        if label is not None and homes.setdefault(label, stage[node]) != stage[node]:
            raise PlanError(f"co-location {label!r} is split over stages {homes[label]} and {stage[node]}")
        name = plan.setting.device(stage[node]).name
        if data.get("allowed") is not None and name not in data["allowed"]:
            raise PlanError(f"node {str(node)!r} is on a {name!r}, allowed are {data['allowed']}")
    for u, v in graph.edges:
        back = graph.nodes[u].get("is_backward"), graph.nodes[v].get("is_backward")
        if not any(back) and stage[u] > stage[v]:
            raise PlanError(f"edge {str(u)!r} -> {str(v)!r} goes back from stage {stage[u]} to {stage[v]}")
    if not plan.setting.allow_empty:
        owners = {stage[node] for node, data in graph.nodes(data=True) if data.get("param_bytes") or data.get("shared")}
        missing = set(range(plan.num_stages)) - (owners or set(stage.values()))
        if missing:
            raise PlanError(f"stages {sorted(missing)} hold nothing to train")
    return stage


def _check_stages(plan: Plan, graph: nx.DiGraph, stage: dict) -> None:
    blocks = _blocks(graph)
    for number, cost in enumerate(plan.stages):
        device = plan.setting.device(number)
        mine = {node for node in graph if stage[node] == number}
        compute = sum(_compute(graph.nodes[node], device) for node in mine)
        into, out = _traffic(plan, graph, stage, number)
        again = sum(_again(graph.nodes[node], device) for node in mine if blocks[node] in set(cost.recomputed))
        load = compute + again
        if plan.objective != "1f1b":
            load = max(load, into, out) if plan.objective == "overlap" else load + into + out
        _same(f"load of stage {number}", cost.load, load)
        memory = _memory(plan, graph, mine, number, blocks)
        _same(f"memory of stage {number}", cost.memory_bytes, memory)
        if device.memory is not None and memory > device.memory * (1 + TOLERANCE):
            raise PlanError(f"stage {number} needs {memory:,.0f} bytes, its device has {device.memory:,.0f}")


def _period(plan: Plan, graph: nx.DiGraph, stage: dict) -> float:
    """Period of 1F1B: over all runs of stages, their work and the round trips between them per stage."""
    trips = [0.0] * plan.num_stages
    for node, data in graph.nodes(data=True):
        places = {stage[node]} | {stage[reader] for reader in graph.successors(node)}
        for cut in range(min(places), max(places)):
            link, times = plan.setting.links(cut)[1], 2 if data.get("gradient") else 1
            trips[cut] += (data["transfer"] if data.get("transfer") is not None else times * (
                link.latency + (data.get("output_bytes", 0.0) / link.bandwidth if link.bandwidth else 0.0)))
    return max((sum(cost.load for cost in plan.stages[i:j + 1]) + sum(trips[i:j])) / (j + 1 - i)
               for i in range(plan.num_stages) for j in range(i, plan.num_stages))


def _worker(plan: Plan, stage: int) -> int:
    """As the plan says, else in turns."""
    if plan.setting.worker_of:
        return plan.setting.worker_of[stage]
    return stage % -(-plan.num_stages // plan.setting.stages_per_worker)


def _check_workers(plan: Plan) -> None:
    """Together, the stages of one worker fit its memory."""
    needs: dict[int, float] = defaultdict(float)
    for number, cost in enumerate(plan.stages):
        needs[_worker(plan, number)] += cost.memory_bytes
    for worker, need in needs.items():
        room = plan.setting.device(worker).memory
        if room is not None and need > room * (1 + TOLERANCE):
            raise PlanError(f"worker {worker} needs {need:,.0f} bytes for its stages, its device has {room:,.0f}")


def _compute(data: dict, device) -> float:
    total = 0.0
    for name in ("forward", "backward"):
        value = data.get(name, 0.0)
        total += (value[device.name] if value else 0.0) if isinstance(value, dict) else value
    return total / device.speed


def _again(data: dict, device) -> float:
    value = data.get("forward", 0.0)
    return (value[device.name] if isinstance(value, dict) else value) / device.speed


def _traffic(plan: Plan, graph: nx.DiGraph, stage: dict, number: int) -> tuple[float, float]:
    """Seconds that values and tied gradients cost stage ``number``, in and out."""
    if not plan.setting.device(number).pays_link:
        return 0.0, 0.0
    before, after = plan.setting.links(number)
    into = out = 0.0
    for node, data in graph.nodes(data=True):
        readers = {stage[reader] for reader in graph.successors(node)}
        times = 2 if data.get("gradient") else 1

        def price(link, data=data, times=times) -> float:
            if data.get("transfer") is not None:
                return data["transfer"]
            return times * (link.latency + (data.get("output_bytes", 0.0) / link.bandwidth if link.bandwidth else 0.0))
        if stage[node] == number and readers - {number}:
            out += price(after)
        elif stage[node] != number and number in readers:
            into += price(before)
    unmoved = {name for _, data in graph.nodes(data=True) for name in data.get("frozen") or ()}
    for holders, size in (entry for name, entry in _holders(graph, stage).items() if name not in unmoved):
        if number in holders and len(holders) > 1:
            into += (
                before.latency + (size / before.bandwidth if before.bandwidth else 0.0)
            ) / plan.setting.num_microbatches
            out += (
                after.latency + (size / after.bandwidth if after.bandwidth else 0.0)
            ) / plan.setting.num_microbatches
    return into, out


def _holders(graph: nx.DiGraph, stage: dict) -> dict:
    found: dict = {}
    for node, data in graph.nodes(data=True):
        for name, size in (data.get("shared") or {}).items():
            holders, known = found.get(name, (set(), 0.0))
            found[name] = (holders | {stage[node]}, max(known, size))
    return found


def _memory(plan: Plan, graph: nx.DiGraph, mine: set, number: int, blocks: dict) -> float:
    model, again = plan.setting.memory_model, set(plan.stages[number].recomputed)
    shared: dict = {}
    frozen: set = set()
    total = scratch = 0.0
    if model.schedule == "gpipe":
        depth = plan.setting.num_microbatches
    elif model.schedule == "1f1b":
        depth = max(1, min(plan.setting.num_microbatches, plan.num_stages - number))
    else:
        depth = 1
    for node in mine:
        data = graph.nodes[node]
        shared |= data.get("shared") or {}
        frozen |= set(data.get("frozen") or ())
        trained = data.get("param_bytes", 0.0) - data.get("frozen_bytes", 0.0)
        total += model.parameter_factor * trained + data.get("frozen_bytes", 0.0) + data.get("memory_bytes", 0.0)
        if blocks[node] not in again:
            total += depth * data.get("activation_bytes", 0.0)
        scratch = max(scratch, data.get("workspace_bytes", 0.0))
    for label in again:
        kept, needed = _computed_again(label, plan, graph, mine, blocks)
        total, scratch = total + depth * kept, max(scratch, needed)
    return total + scratch + sum(size * (1 if name in frozen else model.parameter_factor)
                                 for name, size in shared.items())


def _blocks(graph: nx.DiGraph) -> dict:
    """What each node is computed again with: its block, or itself in a graph that names no blocks."""
    labels = {node: data.get("block") for node, data in graph.nodes(data=True)}
    return {node: str(node) for node in graph} if set(labels.values()) == {None} else labels


def _computed_again(label: str, plan: Plan, graph: nx.DiGraph, mine: set, blocks: dict) -> tuple[float, float]:
    """Bytes that stay of a block that is computed again, per micro-batch, and the scratch of its backward."""
    members = [node for node in graph if blocks[node] == label]
    if not members or not mine.issuperset(members):
        raise PlanError(f"a stage recomputes {label!r}, of which it holds {len(mine.intersection(members))} of "
                        f"{len(members)} nodes")
    if graph.nodes[members[0]].get("block") is None:
        return 0.0, 0.0
    place = {name: position for position, name in enumerate(plan.stage_of)}
    last = graph.nodes[max(members, key=lambda node: place[str(node)])]
    return (sum(graph.nodes[node].get("block_bytes", 0.0) for node in members), last.get("workspace_bytes", 0.0)
            + sum(graph.nodes[node].get("activation_bytes", 0.0) for node in members))


def _check_boundaries(plan: Plan, graph: nx.DiGraph, stage: dict) -> None:
    """Every value that crosses is in exactly one boundary per reading stage, in the order of production."""
    name_of = {str(node): node for node in graph}
    place = {name: position for position, name in enumerate(plan.stage_of)}
    claimed: set = set()
    for boundary in plan.boundaries:
        if sorted(boundary.values, key=place.__getitem__) != list(boundary.values):
            raise PlanError(f"boundary {boundary.source} -> {boundary.target} is not in the order of production")
        for names, size in ((boundary.values, boundary.bytes), (boundary.gradients, boundary.gradient_bytes)):
            found = sum(graph.nodes[name_of[name]].get("output_bytes", 0.0) for name in names)
            if not math.isclose(size, found, rel_tol=TOLERANCE, abs_tol=1.0):
                raise PlanError(f"boundary {boundary.source} -> {boundary.target} says {size:,} bytes, not {found:,}")
        claimed |= {(boundary.source, boundary.target, name) for name in boundary.values}
    crossing = {(stage[u], stage[v], str(u)) for u, v in graph.edges if stage[u] != stage[v]}
    if claimed != crossing:
        raise PlanError(f"the boundaries differ from the values that cross in {sorted(claimed ^ crossing)[:4]}")
    ties = {name: tuple(sorted(holders)) for name, (holders, _) in _holders(graph, stage).items() if len(holders) > 1}
    if {tie.name: tie.stages for tie in plan.ties} != ties:
        raise PlanError(f"the ties are {sorted(ties)}, the plan says {sorted(tie.name for tie in plan.ties)}")
