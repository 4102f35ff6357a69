"""The cost graph: a ``networkx.DiGraph`` whose nodes are operations or modules and whose edges are values.

Node attributes, all optional::

    forward, backward   seconds per micro-batch; a number, or a dict from device class to number
    weight_grad         the part of backward that a schedule may put off (gradients of weights), likewise
    param_bytes         parameters that only this node reads
    frozen_bytes        the part of them that is not trained: no gradient, no optimizer state
    shared              dict parameter name -> bytes: parameters that other nodes read too
    frozen              names in shared that are not trained
    activation_bytes    stashed per micro-batch until backward
    kept_bytes          what stays between the halves of backward: inputs, and gradients of outputs
    output_bytes        the one value it produces
    gradient            whether a gradient of the same size comes back for that value
    transfer            seconds to move the value over a link, both ways; instead of output_bytes over a bandwidth
    memory_bytes        resident whatever the schedule (files that give one number per node)
    workspace_bytes     scratch while it runs
    block               a label; a stage that holds all nodes with it may compute them again in backward, as one piece
    block_bytes         what a block keeps per micro-batch when it does (its inputs), on any of its nodes
    colocate            a label; nodes with the same one share a stage
    allowed             tuple of device classes it may run on
    is_backward         a backward operation; the order of the pipeline is that of the forward ones
    order               position in the recorded run
    label               text for people, such as a module path

``graph.graph["made_with"]``, optional, says what the costs are of: ``rows`` of shape ``row`` in ``num_microbatches``,
``costs`` (``"measured"`` or ``"analytic"``), ``device``, ``flops_per_second`` and ``bytes_per_second``, and
``bytes_per_weight``, the mean over the trained ones.
"""
from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Mapping

import networkx as nx

from partitioners.errors import GraphError
from partitioners.graph.devices import Device

Node = Hashable
COSTS = ("forward", "backward", "weight_grad")
SIZES = ("param_bytes", "activation_bytes", "kept_bytes", "output_bytes", "memory_bytes", "workspace_bytes", "transfer",
         "block_bytes", "frozen_bytes")
OTHERS = ("shared", "frozen", "gradient", "block", "colocate", "allowed", "is_backward", "order", "label")


def check(graph: nx.DiGraph) -> None:
    """Raise ``GraphError`` naming the node and the attribute of whatever no planner could use."""
    if not isinstance(graph, nx.DiGraph) or graph.is_multigraph():
        raise GraphError(f"a cost graph is a networkx.DiGraph, not a {type(graph).__name__}")
    if not len(graph):
        raise GraphError("the cost graph has no nodes; there is nothing to partition")
    names: dict[str, Node] = {}
    for node, data in graph.nodes(data=True):
        if names.setdefault(str(node), node) is not node:
            raise GraphError(f"nodes {names[str(node)]!r} and {node!r} have the same name {str(node)!r}")
        _check_node(node, data)
    if not nx.is_directed_acyclic_graph(graph):
        cycle = " -> ".join(str(edge[0]) for edge in nx.find_cycle(graph))
        raise GraphError(f"the cost graph has a cycle: {cycle}")


def _check_node(node: Node, data: Mapping) -> None:
    for name in COSTS:
        value = data.get(name, 0.0)
        for cost in value.values() if isinstance(value, Mapping) else (value,):
            check_number(node, name, cost)
    for name in SIZES:
        if name in data:
            check_number(node, name, data[name])
    for name, (good, wanted) in _KINDS.items():
        if data.get(name) is not None and not good(data[name]):
            raise GraphError(f"node {str(node)!r} has {name}={data[name]!r}; it must be {wanted}")
    for parameter, size in (data.get("shared") or {}).items():
        check_number(node, f"shared[{parameter!r}]", size)


def _is_number(value: object) -> bool:
    try:
        return not isinstance(value, (bool, str)) and math.isfinite(value)    # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _names_classes(value: object) -> bool:
    return (
        isinstance(value, (list, tuple, set, frozenset))
        and bool(value)
        and all(isinstance(name, str) for name in value)
    )


_KINDS = {
    "shared": (lambda value: isinstance(value, Mapping), "a dict from parameter names to bytes"),
    "frozen": (lambda value: not value or _names_classes(value), "a tuple of names of shared parameters"),
    "allowed": (_names_classes, "a tuple of device classes"),
    "colocate": (_is_hashable, "a label that can be hashed, such as a string or a number"),
    "block": (lambda value: isinstance(value, str), "a string"),
    "order": (_is_number, "a finite number"),
    "gradient": (lambda value: not isinstance(value, (str, list, dict)), "true or false"),
    "is_backward": (lambda value: not isinstance(value, (str, list, dict)), "true or false")}


def check_number(node: Node, name: str, value: object) -> None:
    """Raise ``GraphError`` unless ``value``, attribute ``name`` of ``node``, is a finite number of 0 or more."""
    if not (_is_number(value) and value >= 0):    # type: ignore[operator]
        text = repr(value) if len(repr(value)) < 40 else f"{repr(value)[:36]}..."
        raise GraphError(f"node {str(node)!r} has {name}={text}; it must be a finite number that is not negative")


def seconds(data: Mapping, name: str, device: Device) -> float:
    """Seconds of node attribute ``name`` on ``device``; inf where the node has no cost for its class."""
    value = data.get(name, 0.0)
    if isinstance(value, Mapping):
        value = value.get(device.name, math.inf) if value else 0.0
    return float(value) / device.speed


def topological_order(graph: nx.DiGraph) -> list[Node]:
    """Nodes in the order of production: the recorded ``order`` where it is one, else a stable topological order."""
    position = {node: index for index, node in enumerate(graph)}
    if all(data.get("order") is not None for _, data in graph.nodes(data=True)):
        position = {node: (data["order"], position[node]) for node, data in graph.nodes(data=True)}
        nodes = sorted(graph, key=position.__getitem__)
        if all(position[source] < position[target] for source, target in graph.edges):
            return nodes
    return list(nx.lexicographical_topological_sort(graph, key=position.__getitem__))


def digest(graph: nx.DiGraph) -> str:
    """A fingerprint of names and edges, not of costs: a plan fits every graph with its digest."""
    lines = sorted(str(node) for node in graph) + sorted(f"{u}\t{v}" for u, v in graph.edges)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
