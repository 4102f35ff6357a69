"""From a recording to a cost graph: what every node takes, in seconds and bytes."""
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import networkx

from pipeengine.autograd import Replacement
from pipeengine.costs.recompute_pricing import name_blocks
from pipeengine.costs.roofline import Seconds
from pipeengine.tracing import Dataflow, Node, Recording, Ref, node_refs


def cost_graph(flow: Dataflow, seconds: Mapping[int, Seconds],
               deferrable: Mapping[int, Replacement] = {}) -> networkx.DiGraph:
    """The cost graph of the placed nodes, for ``partitioners``. Names are stable from one recording to the next.

    ``deferrable`` are the nodes whose weight gradients can be put off, as ``find_deferrable`` finds them.
    """
    recording = flow.recording
    graph = networkx.DiGraph()
    readers = Counter(v for index in flow.placed for v in set(node_refs(recording.nodes[index])))
    labels = _group_labels(flow)
    counted: set[int] = set()
    held: set[int] = set()
    carrier: dict[int, str] = {}                # value -> the graph node that stands for it
    for index in flow.placed:
        node = recording.nodes[index]
        used = [v for v in node.results if readers[v] or v in flow.goals]
        spent = seconds.get(index, Seconds(0.0, 0.0))
        graph.add_node(node.name, **_attributes(recording, node, readers, spent, counted), order=index,
                       label=_label(node))
        if node.results and node.results[0] in deferrable:
            graph.nodes[node.name].update(_deferred_costs(recording, node, deferrable[node.results[0]], spent, held))
        if index in labels or len(used) > 1:
            graph.nodes[node.name]["colocate"] = labels.setdefault(index, node.name)
        carriers = [node.name] if len(used) == 1 else [recording.values[v].name for v in used]
        for value, name in zip(used, carriers):
            carrier[value] = name
            if name != node.name:
                graph.add_node(name, forward=0.0, backward=0.0, colocate=labels[index], order=index, label=_label(node))
                graph.add_edge(node.name, name)
            graph.nodes[name]["output_bytes"] = recording.values[value].spec.bytes
            graph.nodes[name]["gradient"] = value in flow.wants_gradient
    _add_edges(graph, flow, carrier)
    name_blocks(graph, flow)
    return graph


def _add_edges(graph: networkx.DiGraph, flow: Dataflow, carrier: dict[int, str]) -> None:
    for index in flow.placed:
        node = flow.recording.nodes[index]
        for value in node_refs(node):
            if value in carrier and carrier[value] != node.name:
                graph.add_edge(carrier[value], node.name)


def _group_labels(flow: Dataflow) -> dict[int, str]:
    """Node -> the label of its group; groups that overlap are one."""
    label: dict[int, str] = {}
    for group in flow.groups:
        known = {label[n] for n in group if n in label}
        chosen = min(known) if known else flow.recording.nodes[min(group)].name
        for n, old in list(label.items()):
            if old in known:
                label[n] = chosen
        label.update(dict.fromkeys(group, chosen))
    return label


def _attributes(recording: Recording, node: Node, readers: Counter, seconds: Seconds, counted: set[int]) -> dict:
    own, frozen, shared, still = 0, 0, {}, []
    for value in dict.fromkeys(node_refs(node)):
        entry = recording.values[value]
        if entry.kind == "attribute" and readers[value] > 1:
            shared[entry.name] = entry.spec.bytes
            still += [] if entry.spec.requires_grad else [entry.name]
        elif entry.kind == "attribute":
            own += entry.spec.bytes
            frozen += 0 if entry.spec.requires_grad else entry.spec.bytes
    kept = sum(size for storage, size in node.cost.saved if storage not in counted)
    counted.update(storage for storage, _ in node.cost.saved)
    return {"forward": float(seconds.forward), "backward": float(seconds.backward),
            "param_bytes": own, "frozen_bytes": frozen, "shared": shared, "frozen": tuple(still),
            "activation_bytes": kept,
            "workspace_bytes": _workspace(recording, node), "output_bytes": 0, "gradient": False}


def _deferred_costs(recording: Recording, node: Node, replacement: Replacement, seconds: Seconds,
                    held: set[int]) -> dict:
    """What of a node's backward waits for W, and what it keeps until then: its input and its output's gradient."""
    read = [recording.values[a.value] for a in replacement[1] if isinstance(a, Ref)]
    inputs = [value for value in read if value.kind == "result" and value.storage not in held]
    held.update(value.storage for value in inputs)
    both = any(value.kind != "attribute" and value.spec.requires_grad for value in read)
    weight = seconds.backward / (1 + both) if seconds.weight is None else min(seconds.weight, seconds.backward)
    return {"weight_grad": float(weight),
            "kept_bytes": sum(value.spec.bytes for value in inputs) + recording.values[node.results[0]].spec.bytes}


def _workspace(recording: Recording, node: Node) -> int:
    """Bytes alive only while the node's backward runs: gradients of its results, its inputs and its parameters.

    That of a parameter too: it is made anew for every micro-batch, and then added to what is there. A node that keeps
    something of its own, such as the logarithms inside a cross-entropy, has a gradient for that on its way too. An
    autograd function makes again what it did not keep.
    """
    if not any(recording.values[v].spec.requires_grad for v in node.results):
        return 0
    values = [recording.values[v] for v in {*node.results, *node_refs(node)}]
    outside = {value.storage for value in values}
    inside = max((size for storage, size in node.cost.saved if storage not in outside), default=0)
    return sum(value.spec.bytes for value in values if value.spec.requires_grad) + inside + node.cost.scratch


def _label(node: Node) -> str:
    path, _, operation = node.name.partition(":")
    return f"{path or 'model'} ({operation})" if operation else path
