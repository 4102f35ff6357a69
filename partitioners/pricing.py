"""What an assignment costs on the raw graph: stages, boundaries, ties. The same numbers that ``verify`` finds by
itself."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import networkx as nx

from partitioners.graph import Block, Device, Node, blocks_of, digest, seconds, topological_order
from partitioners.plan import Boundary, Plan, Setting, StageCost, Tie, gap_above
from partitioners.solvers import Choice, choose_recomputed, frozen_names, period, transfer


def build_plan(graph: nx.DiGraph, stage_of: Mapping[Node, int], setting: Setting, *, lower_bound: float,
               proof: str) -> Plan:
    """Price ``stage_of`` (nodes of the graph to stages) and wrap it up."""
    order = topological_order(graph)
    num_stages = len(setting.stage_devices)
    traffic = link_seconds(graph, order, stage_of, setting)
    members: list[list[Node]] = [[] for _ in range(num_stages)]
    for node in order:
        members[stage_of[node]].append(node)
    sent = _sent_bytes(graph, stage_of, num_stages)
    blocks = blocks_of(graph) if setting.recompute else ()
    stages = tuple(_stage_cost(graph, members[stage], blocks, stage, setting, traffic[stage], sent[stage])
                   for stage in range(num_stages))
    if setting.objective == "1f1b":
        bottleneck = period([stage.load for stage in stages], round_trips(graph, stage_of, setting))
    else:
        bottleneck = worker_bottleneck([stage.load for stage in stages], setting)
    lower_bound = min(lower_bound, bottleneck)
    gap = gap_above(bottleneck, lower_bound)
    if gap <= 1e-9:
        gap, lower_bound = 0.0, bottleneck
    return Plan(
        num_stages=num_stages,
        stage_of={str(node): stage_of[node] for node in order},
        stages=stages,
        boundaries=find_boundaries(graph, order, stage_of),
        ties=find_ties(graph, stage_of),
        bottleneck=bottleneck,
        lower_bound=lower_bound,
        gap=gap,
        proof=proof,
        objective=setting.objective,
        graph_digest=digest(graph),
        setting=setting,
    )


def worker_bottleneck(loads: list[float], setting: Setting) -> float:
    """The largest load of a worker, in the unit of ``loads`` (seconds)."""
    together: dict[int, list[float]] = {}
    for worker, load in zip(setting.workers(len(loads)), loads):
        together.setdefault(worker, []).append(load)
    return max(map(math.fsum, together.values()))


def link_seconds(graph: nx.DiGraph, order: list[Node], stage_of: Mapping[Node, int],
                 setting: Setting) -> list[tuple[float, float]]:
    """Per stage: seconds to receive and to send, values and tied gradients, per micro-batch."""
    received: list[list[float]] = [[] for _ in setting.stage_devices]
    sent: list[list[float]] = [[] for _ in setting.stage_devices]

    def price(stage: int, place: int, fixed: float, messages: float, size: float) -> float:
        return fixed + setting.links(stage)[place].seconds(size, messages) if setting.device(stage).pays_link else 0.0

    for node in order:
        home, cost = stage_of[node], transfer(graph.nodes[node])
        away = {stage_of[reader] for reader in graph.successors(node)} - {home}
        for stage in away:
            received[stage].append(price(stage, 0, *cost))
        if away:
            sent[home].append(price(home, 1, *cost))
    share = 1.0 / setting.num_microbatches
    for tie in find_ties(graph, stage_of):
        for stage in tie.stages if tie.trained else ():
            received[stage].append(price(stage, 0, 0.0, share, tie.bytes * share))
            sent[stage].append(price(stage, 1, 0.0, share, tie.bytes * share))
    return [(math.fsum(into), math.fsum(out)) for into, out in zip(received, sent)]


def _stage_cost(graph: nx.DiGraph, nodes: list[Node], blocks: Sequence[Block], stage: int, setting: Setting,
                traffic: tuple[float, float], sent: float) -> StageCost:
    device, data = setting.device(stage), [graph.nodes[node] for node in nodes]
    forward = math.fsum(seconds(each, "forward", device) for each in data)
    backward = math.fsum(seconds(each, "backward", device) for each in data)
    again = _recomputed(nodes, data, blocks, stage, setting)
    for block in again:
        data = _with_block(nodes, data, block, device)
    backward += math.fsum(seconds(graph.nodes[node], "forward", device) for block in again for node in block.nodes)
    parameters, frozen = _weights(data)
    activations = math.fsum(each.get("activation_bytes", 0.0) for each in data)
    model, count = setting.memory_model, len(setting.stage_devices)
    memory = (model.weights(parameters, frozen) + math.fsum(each.get("memory_bytes", 0.0) for each in data)
              + model.in_flight(stage, count, setting.num_microbatches) * activations
              + max((each.get("workspace_bytes", 0.0) for each in data), default=0.0))
    load = {"sum": math.fsum((forward, backward, *traffic)), "overlap": max(forward + backward, *traffic),
            "1f1b": forward + backward}[setting.objective]
    return StageCost(
        forward=forward,
        backward=backward,
        communication=math.fsum(traffic),
        load=load,
        param_bytes=parameters,
        activation_bytes=activations,
        memory_bytes=memory,
        sent_bytes=sent,
        num_nodes=len(nodes),
        device=device.name,
        recomputed=tuple(block.label for block in again),
        weight_grad=math.fsum(seconds(each, "weight_grad", device) for each in data),
        kept_bytes=math.fsum(each.get("kept_bytes", 0.0) for each in data),
        workspace_bytes=_scratch(data, grown=False),
        first_workspace_bytes=_scratch(data, grown=True),
        frozen_bytes=frozen,
    )


def _weights(data: Sequence[dict]) -> tuple[float, float]:
    """Bytes of all weights that the nodes read, shared ones once, and of those that are not trained."""
    shared = {name: size for each in data for name, size in (each.get("shared") or {}).items()}
    frozen = {name for each in data for name in each.get("frozen") or ()}
    return (math.fsum(each.get("param_bytes", 0.0) for each in data) + math.fsum(shared.values()),
            math.fsum(each.get("frozen_bytes", 0.0) for each in data)
            + math.fsum(size for name, size in shared.items() if name in frozen))


def _scratch(data: list[dict], grown: bool) -> float:
    """The most bytes, beyond those stashed at its start, while a backward walks the nodes, the last one first.

    ``grown``: gradients of parameters stay, since there were none.
    """
    more = most = 0.0
    for each in reversed(data):
        most = max(most, more + each.get("workspace_bytes", 0.0))
        more -= each.get("activation_bytes", 0.0)
        if grown:
            weights, frozen = _weights([each])
            more += weights - frozen
    return max(most, more)


def _with_block(nodes: list[Node], data: list[dict], block: Block, device: Device) -> list[dict]:
    """The nodes' attributes when ``block`` is computed again: nothing of it stays but what it reads, nothing waits for
    a W, and its last node, where backward begins, has the scratch."""
    places = [index for index, node in enumerate(nodes) if node in set(block.nodes)]
    changed = list(data)
    for index in places:
        changed[index] = data[index] | {"activation_bytes": 0.0, "weight_grad": 0.0, "kept_bytes": 0.0}
    changed[places[0]]["activation_bytes"] = block.kept_bytes
    scratch = max(block.workspace_bytes, data[places[-1]].get("workspace_bytes", 0.0))
    changed[places[-1]]["workspace_bytes"] = scratch
    return changed


def _recomputed(nodes: list[Node], data: list[dict], blocks: Sequence[Block], stage: int,
                setting: Setting) -> list[Block]:
    """Which of the blocks that lie whole in the stage compute their activations again so that it fits."""
    device, model = setting.device(stage), setting.memory_model
    if not setting.recompute or device.memory is None:
        return []
    depth = model.in_flight(stage, len(setting.stage_devices), setting.num_microbatches)
    of_node = dict(zip(nodes, data))
    whole = [block for block in blocks if all(node in of_node for node in block.nodes)]
    choices = [Choice(math.fsum(seconds(of_node[node], "forward", device) for node in block.nodes),
                      depth * block.saved_bytes, block.workspace_bytes) for block in whole]
    held = model.weights(*_weights(data)) + math.fsum(
        each.get("memory_bytes", 0.0) + depth * each.get("activation_bytes", 0.0) for each in data)
    scratch = max((each.get("workspace_bytes", 0.0) for each in data), default=0.0)
    chosen = choose_recomputed(choices, held, scratch, device.memory)
    return [whole[index] for index in (range(len(whole)) if chosen is None else chosen)]


def round_trips(graph: nx.DiGraph, stage_of: Mapping[Node, int], setting: Setting) -> list[float]:
    """Per cut: seconds that the values across it take there and back."""
    trips: list[list[float]] = [[] for _ in setting.stage_devices[1:]]
    for node, data in graph.nodes(data=True):
        stages = [stage_of[node], *(stage_of[reader] for reader in graph.successors(node))]
        fixed, messages, size = transfer(data)
        for cut in range(min(stages), max(stages)):
            trips[cut].append(fixed + setting.links(cut)[1].seconds(size, messages))
    return list(map(math.fsum, trips))


def _sent_bytes(graph: nx.DiGraph, stage_of: Mapping[Node, int], num_stages: int) -> list[float]:
    """Per stage and micro-batch: values out, once for every stage that reads them, and one gradient back for each
    read."""
    sizes: list[list[float]] = [[] for _ in range(num_stages)]
    for node, home in stage_of.items():
        data = graph.nodes[node]
        for stage in {stage_of[reader] for reader in graph.successors(node)} - {home}:
            sizes[home].append(data.get("output_bytes", 0.0))
            if data.get("gradient"):
                sizes[stage].append(data.get("output_bytes", 0.0))
    return [math.fsum(each) for each in sizes]


def find_boundaries(graph: nx.DiGraph, order: list[Node], stage_of: Mapping[Node, int]) -> tuple[Boundary, ...]:
    """One per pair of stages with values between them; each value once per pair, in the order of production.

    The gradient of a value that several stages read goes from the last of them to the one before it, and so on to its
    producer, each adding its share: one message per reader, as many as if each sent its own to the producer.
    """
    values: dict[tuple[int, int], list[Node]] = {}
    gradients: dict[tuple[int, int], list[Node]] = {}
    for node in order:
        home = stage_of[node]
        readers = sorted({stage_of[reader] for reader in graph.successors(node)} - {home})
        for stage in readers:
            values.setdefault((home, stage), []).append(node)
        if graph.nodes[node].get("gradient"):
            for pair in zip((home, *readers), readers):
                gradients.setdefault(pair, []).append(node)

    def size(nodes: list[Node]) -> int:
        return round(math.fsum(graph.nodes[node].get("output_bytes", 0.0) for node in nodes))
    return tuple(Boundary(*pair, tuple(map(str, out)), size(out), tuple(map(str, back)), size(back))
                 for pair in sorted({*values, *gradients})
                 for out, back in [(values.get(pair, []), gradients.get(pair, []))])


def find_ties(graph: nx.DiGraph, stage_of: Mapping[Node, int]) -> tuple[Tie, ...]:
    """Shared parameters whose readers live on several stages."""
    holders: dict[str, set[int]] = {}
    sizes: dict[str, float] = {}
    for node, data in graph.nodes(data=True):
        for name, size in (data.get("shared") or {}).items():
            holders.setdefault(name, set()).add(stage_of[node])
            sizes[name] = max(sizes.get(name, 0.0), size)
    frozen = frozen_names(graph)
    return tuple(Tie(name, tuple(sorted(stages)), round(sizes[name]), name not in frozen)
                 for name, stages in sorted(holders.items()) if len(stages) > 1)
