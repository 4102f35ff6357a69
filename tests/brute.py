"""The truth for small graphs: every assignment, priced straight from the definition; no code of the planner's."""
import itertools
import math


def brute_force(graph, devices, *, objective="sum", allow_empty=True, num_microbatches=1, factor=4.0, depth=None):
    """Smallest bottleneck over all orders of ``devices`` and all assignments, or inf.

    ``devices``: dicts with name, memory, speed, pays, link_in, link_out (latency, bandwidth); any order of the list is
    allowed unless ``ordered`` is in the first. ``depth(stage, num_stages)`` is the number of micro-batches in flight.
    """
    nodes = list(graph)
    orders = [tuple(devices)] if devices[0].get("ordered") else _distinct(devices)
    labels = {}
    for node in nodes:
        label = graph.nodes[node].get("colocate")
        labels.setdefault(("one", node) if label is None else ("label", label), []).append(node)
    groups = list(labels.values())
    best = math.inf
    for choice in itertools.product(range(len(devices)), repeat=len(groups)):
        stage = {node: place for group, place in zip(groups, choice) for node in group}
        if not _in_order(graph, stage) or not (allow_empty or _all_full(graph, stage, len(devices))):
            continue
        for order in orders:
            worst = 0.0
            for number, device in enumerate(order):
                worst = max(worst, _load(graph, stage, number, device, objective, num_microbatches, factor,
                                         1 if depth is None else depth(number, len(devices))))
                if worst >= best:
                    break
            best = min(best, worst)
    return best


def _distinct(devices):
    seen, orders = set(), []
    for order in itertools.permutations(devices):
        key = tuple(str(sorted(device.items(), key=lambda pair: pair[0])) for device in order)
        if key not in seen:
            seen.add(key)
            orders.append(order)
    return orders


def _in_order(graph, stage):
    return all(stage[u] <= stage[v] for u, v in graph.edges
               if not graph.nodes[u].get("is_backward") and not graph.nodes[v].get("is_backward"))


def _all_full(graph, stage, count):
    owners = {stage[node] for node, data in graph.nodes(data=True) if data.get("param_bytes") or data.get("shared")}
    return len(owners or set(stage.values())) == count


def _load(graph, stage, number, device, objective, num_microbatches, factor, depth):
    mine = [node for node in graph if stage[node] == number]
    compute = memory = scratch = 0.0
    ties = {}
    for node, data in graph.nodes(data=True):
        for name, size in (data.get("shared") or {}).items():
            ties.setdefault(name, [size, set()])[1].add(stage[node])
    for node in mine:
        data = graph.nodes[node]
        if data.get("allowed") is not None and device["name"] not in data["allowed"]:
            return math.inf
        for cost in (data.get("forward", 0.0), data.get("backward", 0.0)):
            compute += (cost[device["name"]] if isinstance(cost, dict) else cost) / device.get("speed", 1.0)
        memory += factor * data.get("param_bytes", 0) + data.get("memory_bytes", 0)
        memory += depth * data.get("activation_bytes", 0)
        scratch = max(scratch, data.get("workspace_bytes", 0))
    memory += scratch + sum(factor * size for size, holders in ties.values() if number in holders)
    if device.get("memory") is not None and memory > device["memory"]:
        return math.inf
    into = out = 0.0
    if device.get("pays", True):
        (latency_in, rate_in), (latency_out, rate_out) = device["link_in"], device["link_out"]
        for node, data in graph.nodes(data=True):
            readers = {stage[reader] for reader in graph.successors(node)}
            times = 2 if data.get("gradient") else 1
            if stage[node] == number and readers - {number}:
                travel = times * (latency_out + data.get("output_bytes", 0) / rate_out)
                out += data.get("transfer", travel)
            if stage[node] != number and number in readers:
                travel = times * (latency_in + data.get("output_bytes", 0) / rate_in)
                into += data.get("transfer", travel)
        for size, holders in ties.values():
            if number in holders and len(holders) > 1:
                into += (latency_in + size / rate_in) / num_microbatches
                out += (latency_out + size / rate_out) / num_microbatches
    return compute + into + out if objective == "sum" else max(compute, into, out)


def brute_force_variant(graph, num_stages, variant, *, latency, bandwidth, memory, num_microbatches):
    """Smallest period of 1F1B (``"1f1b"``), load of a worker with two stages (``"turns"``), or load of a stage that
    computes again what it must, nodes or blocks (``"recompute"``, ``"blocks"``); parameters count once, stages are
    never empty."""
    device = dict(name="device", link_in=(latency, bandwidth), link_out=(latency, bandwidth))
    best, nodes, stages = math.inf, list(graph), range(num_stages)
    for choice in itertools.product(stages, repeat=len(nodes)):
        stage = dict(zip(nodes, choice))
        labels = {(data["colocate"], stage[node]) for node, data in graph.nodes(data=True) if "colocate" in data}
        if not _in_order(graph, stage) or not _all_full(graph, stage, num_stages) or len(dict(labels)) < len(labels):
            continue
        need = [_bytes(graph, stage, number, num_microbatches, ()) for number in stages]
        loads = [_load(graph, stage, number, device, "sum", num_microbatches, 1.0, 1) for number in stages]
        if variant in ("recompute", "blocks"):
            again = _again if variant == "recompute" else _blocks_again
            worst = max(loads[number] + again(graph, stage, number, num_microbatches, memory) for number in stages)
            best = min(best, worst)
            continue
        workers = -(-num_stages // 2) if variant == "turns" else num_stages
        if memory is not None and max(sum(need[worker::workers]) for worker in range(workers)) > memory:
            continue
        if variant == "turns":
            best = min(best, max(sum(loads[worker::workers]) for worker in range(workers)))
        else:
            best = min(best, _period(graph, stage, num_stages, latency, bandwidth))
    return best


def _bytes(graph, stage, number, num_microbatches, dropped):
    mine, shared = [node for node in graph if stage[node] == number], {}
    for node in mine:
        shared |= graph.nodes[node].get("shared") or {}
    return sum(shared.values()) + sum(graph.nodes[node]["param_bytes"] + num_microbatches * (
        0 if node in dropped else graph.nodes[node]["activation_bytes"]) for node in mine)


def _again(graph, stage, number, num_microbatches, memory):
    """Least seconds of computing again that make the stage fit."""
    mine = [node for node in graph if stage[node] == number]
    return min((sum(graph.nodes[node]["forward"] for node in dropped)
                for count in range(len(mine) + 1) for dropped in itertools.combinations(mine, count)
                if _bytes(graph, stage, number, num_microbatches, dropped) <= memory), default=math.inf)


def _blocks_again(graph, stage, number, num_microbatches, memory):
    """The same where only whole blocks can be computed again, which keep their inputs and need scratch."""
    blocks: dict[str, list] = {}
    for node in graph:
        blocks.setdefault(graph.nodes[node].get("block"), []).append(node)
    whole = [nodes for label, nodes in blocks.items() if label and all(stage[node] == number for node in nodes)]
    best = math.inf
    for count in range(len(whole) + 1):
        for dropped in itertools.combinations(whole, count):
            gone = {node for nodes in dropped for node in nodes}
            scratch = max(graph.nodes[node]["workspace_bytes"] for node in graph if stage[node] == number)
            need = _bytes(graph, stage, number, num_microbatches, gone)
            for nodes in dropped:
                need += num_microbatches * sum(graph.nodes[node].get("block_bytes", 0) for node in nodes)
                scratch = max(scratch, graph.nodes[nodes[-1]]["workspace_bytes"]
                              + sum(graph.nodes[node]["activation_bytes"] for node in nodes))
            if need + scratch <= memory:
                best = min(best, sum(graph.nodes[node]["forward"] for node in gone))
    return best


def _period(graph, stage, num_stages, latency, bandwidth):
    times, trips = [0.0] * num_stages, [0.0] * num_stages
    for node, data in graph.nodes(data=True):
        times[stage[node]] += data["forward"] + data["backward"]
        last = max([stage[reader] for reader in graph.successors(node)], default=stage[node])
        for cut in range(stage[node], last):
            trips[cut] += (2 if data["gradient"] else 1) * (latency + data["output_bytes"] / bandwidth)
    return max((sum(times[first:last + 1]) + sum(trips[first:last])) / (last - first + 1)
               for first in range(num_stages) for last in range(first, num_stages))
