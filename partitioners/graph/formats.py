"""Cost graphs as JSON, and in other people's formats."""
from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import networkx as nx

from partitioners.errors import GraphError
from partitioners.graph.cost_graph import COSTS, OTHERS, SIZES, Node, check, check_number
from partitioners.graph.devices import Device

FORMAT = "pipeline-graph/1"
WORKLOAD = "pipeline-workload/1"
PIPEDREAM = 1e-3    # PipeDream and the workload files count milliseconds


def read_workload(source: Mapping | str | Path) -> nx.DiGraph:
    """Read a ``pipeline-workload/1`` object or file; its devices become ``graph.graph["devices"]``.

    Milliseconds become seconds. Nodes with ``out_bytes`` get a value of that size whose gradient comes back.
    """
    obj = source if isinstance(source, Mapping) else json.loads(Path(source).read_text(encoding="utf-8-sig"))
    if obj.get("format") != WORKLOAD:
        raise GraphError(f"expected format {WORKLOAD!r}, found {obj.get('format')!r}")
    graph = assemble_graph(obj, _workload_node)
    _label_groups(graph, _groups(graph, obj.get("colocate") or ()))
    if obj.get("device_classes"):
        graph.graph["devices"] = _devices(obj["device_classes"])
    graph.graph["name"] = obj.get("name", "")
    return graph


def _groups(graph: nx.DiGraph, groups: object) -> list[list[Node]]:
    """The co-location groups of a workload file, checked."""
    if not isinstance(groups, (list, tuple)):
        raise GraphError(f"colocate is {groups!r}; it must be a list of groups of node ids")
    for label, group in enumerate(groups):
        if not isinstance(group, (list, tuple)):
            raise GraphError(f"co-location group {label} is {group!r}; it must be a list of node ids")
        for node in group:
            if not isinstance(node, (str, int)) or node not in graph:
                raise GraphError(f"co-location group {label} names the unknown node {node!r}")
    return list(map(list, groups))


def _devices(entries: object) -> tuple[Device, ...]:
    """The device classes of a workload file."""
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, Mapping) or "name" not in entry or "count" not in entry:
            raise GraphError(f"a device class must be an object with name and count, found {entry!r}")
    return tuple(
        Device(entry["name"], entry["count"], entry.get("memory"), pays_link=bool(entry.get("pays_comm", True)))
        for entry in entries
    )


def _label_groups(graph: nx.DiGraph, groups: Iterable[Iterable[Node]]) -> None:
    """Label co-located nodes; groups that overlap become one."""
    for number, members in enumerate(nx.connected_components(_links(groups))):
        for node in members:
            graph.nodes[node]["colocate"] = number


def _links(groups: Iterable[Iterable[Node]]) -> nx.Graph:
    joined = nx.Graph()
    for group in groups:
        nx.add_path(joined, list(group))
    return joined


def _workload_node(entry: Mapping) -> dict:
    for name in ("memory", "out_cost", "out_bytes", "param_bytes", "act_bytes"):
        if name in entry:
            check_number(entry["id"], name, entry[name])
    if not isinstance(entry.get("time", {}), Mapping):
        raise GraphError(f"node {str(entry['id'])!r} has time={entry['time']!r}; it must be an object from class to ms")
    if isinstance(entry.get("backward", False), str):
        raise GraphError(f"node {str(entry['id'])!r} has backward={entry['backward']!r}; it must be true or false")
    for device, value in entry.get("time", {}).items():
        check_number(entry["id"], f"time[{device!r}]", value)
    data: dict = {"forward": {device: value * PIPEDREAM for device, value in entry.get("time", {}).items()}}
    data["is_backward"] = entry.get("backward", False)
    if "out_cost" in entry:
        data["transfer"] = entry["out_cost"] * PIPEDREAM
    else:
        data |= {"output_bytes": entry.get("out_bytes", 0.0), "gradient": True}
    data |= {name: entry[key] for name, key in (("memory_bytes", "memory"), ("param_bytes", "param_bytes"),
                                                ("activation_bytes", "act_bytes"), ("label", "name")) if key in entry}
    if entry.get("allowed") is not None:
        data["allowed"] = freeze(entry["allowed"])
    return data


def read_pipedream(text: str) -> nx.DiGraph:
    """Read PipeDream's text profile (Narayanan et al., SOSP 2019, ``graph.txt``); milliseconds become seconds."""
    graph = nx.DiGraph()
    for line in filter(str.strip, text.splitlines()):
        parts = line.strip().split(" -- ")
        if len(parts) == 2:
            graph.add_edge(*parts)
        elif len(parts) == 3:
            graph.add_node(parts[0], label=parts[1], gradient=True, **_pipedream_costs(parts[0], parts[2]))
        else:
            raise GraphError(f"a PipeDream profile has lines 'node -- text -- costs' and 'node -- node', not {line!r}")
    for node, data in graph.nodes(data=True):
        if "label" not in data:
            raise GraphError(f"an edge of the profile names the unknown node {node!r}")
    check(graph)
    return graph


def _pipedream_costs(node: str, text: str) -> dict:
    try:
        fields = dict(part.split("=") for part in text.split(", "))
        size = sum(float(part) for part in fields["activation_size"].strip("[]").split(";"))
        return {"forward": float(fields["forward_compute_time"]) * PIPEDREAM,
                "backward": float(fields["backward_compute_time"]) * PIPEDREAM,
                "output_bytes": size, "activation_bytes": size, "param_bytes": float(fields["parameter_size"])}
    except (KeyError, ValueError) as error:
        raise GraphError(f"node {node!r} of the profile has costs {text!r}: {error}") from error


def to_json(graph: nx.DiGraph) -> dict:
    """The graph as one JSON object; ``from_json`` reads it back."""
    nodes = [{"id": node if isinstance(node, (str, int)) else str(node),
              **{name: data[name] for name in (*COSTS, *SIZES, *OTHERS) if name in data}}
             for node, data in graph.nodes(data=True)]
    ids = {node: entry["id"] for node, entry in zip(graph, nodes)}
    made = {"made_with": graph.graph["made_with"]} if "made_with" in graph.graph else {}
    return {"format": FORMAT, **made, "nodes": nodes, "edges": [[ids[u], ids[v]] for u, v in graph.edges]}


def from_json(obj: Mapping) -> nx.DiGraph:
    """Build a cost graph from ``to_json``'s object or from a ``pipeline-workload/1`` object."""
    kind = obj.get("format") if isinstance(obj, Mapping) else None
    if kind == WORKLOAD:
        return read_workload(obj)
    if kind != FORMAT:
        raise GraphError(f"expected format {FORMAT!r} or {WORKLOAD!r}, found {kind!r}")
    graph = assemble_graph(obj, _graph_node)
    made = obj.get("made_with")
    if made is not None:
        if not isinstance(made, Mapping):
            raise GraphError(f"made_with is {made!r}; it must be an object that says what the costs were made with")
        graph.graph["made_with"] = dict(made)
    return graph


def _graph_node(entry: Mapping) -> dict:
    return {name: freeze(value) if name in ("allowed", "colocate") else value for name, value in entry.items()
            if name != "id"}


def freeze(value: object) -> object:
    """JSON has no tuples."""
    return tuple(map(freeze, value)) if isinstance(value, list) else value


def assemble_graph(obj: Mapping, attributes) -> nx.DiGraph:
    """Nodes and edges of ``obj``, checked."""
    graph = nx.DiGraph()
    for name in ("nodes", "edges"):
        if not isinstance(obj.get(name), list):
            raise GraphError(f"the graph object has no list of {name}")
    for entry in obj["nodes"]:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("id"), (str, int)):
            raise GraphError(f"a node must be an object with an id, found {entry!r}")
        if entry["id"] in graph:
            raise GraphError(f"two nodes have the id {entry['id']!r}")
        graph.add_node(entry["id"], **attributes(entry))
    for edge in obj["edges"]:
        if not isinstance(edge, (list, tuple)) or len(edge) != 2:
            raise GraphError(f"an edge must be a pair of node ids, found {edge!r}")
        for node in edge:
            if not isinstance(node, (str, int)) or node not in graph:
                raise GraphError(f"edge {list(edge)!r} names the unknown node {node!r}")
        graph.add_edge(*edge)
    check(graph)
    return graph
