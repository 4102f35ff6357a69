"""The planner's view of a graph: items that cannot be parted, the order among them, and nets of values that may cross.

A net is a value (or a tied parameter) with all its readers. A stage that holds some but not all of its items pays for
it: the producer once to send, every other stage once to receive. With equal links this is the hypergraph cut of
Tarnawski et al. (NeurIPS 2020), symmetric and submodular.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import networkx as nx
import numpy as np

from partitioners.errors import GraphError
from partitioners.graph import Cluster, Device, Link, MemoryModel, Node, blocks_of, seconds, topological_order


@dataclass(frozen=True)
class Net:
    """One value or tied parameter. ``source`` is its item, -1 for a tie; ``pins`` are all its items, sorted.

    ``fixed`` seconds do not depend on the link; ``messages`` and ``bytes`` do.
    """
    source: int
    pins: tuple[int, ...]
    fixed: float
    messages: float
    bytes: float

    def seconds(self, link: Link) -> float:
        """Seconds to move it once; a tie splits its exchange between both directions."""
        return self.fixed + link.seconds(self.bytes, self.messages)


@dataclass(frozen=True)
class Kind:
    """What a stage is like: its device, the links beside it and the micro-batches it holds."""
    device: Device
    link_in: Link
    link_out: Link
    in_flight: int = 1

    @property
    def symmetric(self) -> bool:
        """Whether receiving costs as much per byte as sending."""
        return self.link_in == self.link_out


@dataclass(frozen=True)
class Piece:
    """A block as the planner sees it: the items it lies in, what recomputation saves, and the scratch it needs. Bytes.
    """

    pins: tuple[int, ...]
    saved_bytes: float
    workspace_bytes: float


@dataclass(frozen=True)
class Problem:
    """Items in a topological order, with their costs, nets and limits.

    ``levels``: for ordered stages one ``Kind`` each; otherwise the classes, of which ``counts`` devices may be used.
    ``times``: seconds of forward and backward of each item; ``again``: of the forward of each piece, to compute it
    again.
    """
    items: tuple[tuple[Node, ...], ...]
    edges: tuple[tuple[int, int], ...]
    nets: tuple[Net, ...]
    shared: tuple[tuple[tuple[int, ...], float], ...]
    times: dict[Device, np.ndarray]
    pieces: tuple[Piece, ...]
    again: dict[Device, np.ndarray]
    fixed_bytes: np.ndarray
    activation_bytes: np.ndarray
    workspace_bytes: np.ndarray
    crossing: tuple[tuple[int, ...], ...]
    has_parameters: np.ndarray
    levels: tuple[Kind, ...]
    counts: tuple[int, ...] | None
    objective: str
    allow_empty: bool

    def __len__(self) -> int:
        return len(self.items)

    @property
    def num_stages(self) -> int:
        """Stages that are to be made."""
        return len(self.levels) if self.counts is None else sum(self.counts)

    @property
    def must_hold(self) -> np.ndarray | None:
        """Items of which every stage needs one; None if stages may be empty."""
        if self.allow_empty:
            return None
        return self.has_parameters if self.has_parameters.any() else np.ones(len(self), bool)

    @cached_property
    def successors(self) -> list[list[int]]:
        """For each item the items that read what it makes."""
        lists: list[list[int]] = [[] for _ in self.items]
        for source, target in self.edges:
            lists[source].append(target)
        return lists

    @cached_property
    def predecessors(self) -> list[list[int]]:
        """For each item the items whose results it reads."""
        lists: list[list[int]] = [[] for _ in self.items]
        for source, target in self.edges:
            lists[target].append(source)
        return lists

    @cached_property
    def paying(self) -> list[Kind]:
        """The kinds of device that pay for what crosses a link."""
        return [kind for kind in self.levels if kind.device.pays_link]

    def memory_may_bind(self) -> bool:
        """Whether a stage could be too large for some device."""
        caps = [kind.device.memory for kind in self.levels if kind.device.memory is not None]
        if not caps:
            return False
        depth = max(kind.in_flight for kind in self.levels)
        total = (self.fixed_bytes.sum() + depth * self.activation_bytes.sum() + self.workspace_bytes.max(initial=0)
                 + sum(size for _, size in self.shared))
        return bool(total > min(caps))


def build_problem(graph: nx.DiGraph, *, cluster: Cluster, num_stages: int, objective: str, memory_model: MemoryModel,
                  num_microbatches: int, allow_empty: bool) -> Problem:
    """Contract co-located nodes and cycles among them, and gather costs."""
    order = topological_order(graph)
    groups, edges = _contract(graph, order)
    item_of = {node: index for index, group in enumerate(groups) for node in group}
    levels, counts = _levels(cluster, num_stages, memory_model, num_microbatches)
    times = {kind.device: _times(graph, groups, kind.device, ("forward", "backward")) for kind in levels}
    blocks = blocks_of(graph)
    again = {kind.device: _times(graph, tuple(block.nodes for block in blocks), kind.device, ("forward",))
             for kind in levels}
    _check_homes(groups, times)

    def total(name: str) -> np.ndarray:
        return np.array([sum(graph.nodes[node].get(name, 0.0) for node in group) for group in groups], float)

    factor, frozen = memory_model.parameter_factor, frozen_names(graph)
    workspace = np.array([max(graph.nodes[node].get("workspace_bytes", 0.0) for node in group) for group in groups],
                         float)
    return Problem(
        items=groups,
        edges=edges,
        nets=_nets(graph, order, item_of, num_microbatches),
        shared=tuple((pins, size if name in frozen else factor * size)
                     for name, (pins, size) in _shared(graph, item_of).items()),
        times=times,
        pieces=tuple(Piece(tuple(sorted({item_of[node] for node in block.nodes})), block.saved_bytes,
                           block.workspace_bytes) for block in blocks),
        again=again,
        fixed_bytes=factor * total("param_bytes") - (factor - 1) * total("frozen_bytes") + total("memory_bytes"),
        activation_bytes=total("activation_bytes"),
        workspace_bytes=workspace,
        crossing=_crossing(graph, item_of),
        has_parameters=np.array([any(has_parameters(graph.nodes[node]) for node in group) for group in groups], bool),
        levels=levels,
        counts=counts,
        objective=objective,
        allow_empty=allow_empty,
    )


def frozen_names(graph: nx.DiGraph) -> frozenset[str]:
    """Shared parameters that nobody trains: their gradients do not travel."""
    return frozenset(name for _, data in graph.nodes(data=True) for name in data.get("frozen") or ())


def has_parameters(data: dict) -> bool:
    """Whether the node reads parameters, its own or shared ones."""
    return bool(data.get("param_bytes")) or bool(data.get("shared"))


def _levels(cluster: Cluster, num_stages: int, memory_model: MemoryModel,
            num_microbatches: int) -> tuple[tuple[Kind, ...], tuple[int, ...] | None]:
    """One kind per stage where stages differ, else one per class with its count."""
    depths = [memory_model.in_flight(stage, num_stages, num_microbatches) for stage in range(num_stages)]
    links = cluster.links
    if cluster.ordered:
        devices = [device for device in cluster.devices for _ in range(device.count)]
        last = len(links) - 1
        return tuple(Kind(device, links[min(max(j - 1, 0), last)], links[min(j, last)], depths[j])
                     for j, device in enumerate(devices)), None
    if len(set(depths)) > 1 and len(cluster.devices) == 1 and cluster.devices[0].memory is not None:
        return tuple(Kind(cluster.devices[0], links[0], links[0], depth) for depth in depths), None
    used = [device for device in cluster.devices if device.count]
    return (tuple(Kind(device, links[0], links[0], max(depths)) for device in used),
            tuple(device.count for device in used))


def _times(graph: nx.DiGraph, groups: tuple[tuple[Node, ...], ...], device: Device,
           names: tuple[str, ...]) -> np.ndarray:
    def cost(node: Node) -> float:
        data = graph.nodes[node]
        if data.get("allowed") is not None and device.name not in data["allowed"]:
            return np.inf
        return sum(seconds(data, name, device) for name in names)
    return np.array([sum(map(cost, group)) for group in groups])


def _check_homes(groups: tuple[tuple[Node, ...], ...], times: dict[Device, np.ndarray]) -> None:
    homeless = np.flatnonzero(np.all([~np.isfinite(each) for each in times.values()], axis=0))
    if len(homeless):
        names = [str(node) for node in groups[homeless[0]]]
        raise GraphError(f"node {names[0]!r}" + (f" and the {len(names) - 1} co-located with it" if names[1:] else "")
                         + f" may run on none of the devices {sorted(device.name for device in times)}; "
                         "see its attributes allowed, forward and colocate")


def _contract(graph: nx.DiGraph, order: list[Node]) -> tuple[tuple[tuple[Node, ...], ...], tuple[tuple[int, int], ...]]:
    """Groups that share a stage, in a topological order that follows the recorded one, and the edges among them."""
    label: dict = {}
    for node in order:
        data = graph.nodes[node]
        label[node] = ("node", node) if data.get("colocate") is None else ("label", data["colocate"])
    quotient = nx.DiGraph()
    quotient.add_nodes_from(label[node] for node in order)
    quotient.add_edges_from((label[u], label[v]) for u, v in _precedence(graph, label) if label[u] != label[v])
    group_of, forward = {}, {}
    for number, component in enumerate(nx.strongly_connected_components(quotient)):
        group_of.update(dict.fromkeys(component, number))
    members: dict[int, list[Node]] = {}
    for position, node in enumerate(order):
        number = group_of[label[node]]
        members.setdefault(number, []).append(node)
        if not graph.nodes[node].get("is_backward"):
            forward.setdefault(number, position)
    place = {node: position for position, node in enumerate(order)}
    condensed = nx.DiGraph()
    condensed.add_nodes_from(members)
    condensed.add_edges_from((group_of[u], group_of[v]) for u, v in quotient.edges if group_of[u] != group_of[v])
    # A backward operation without a forward one runs late, so its mirror image belongs early.
    rank = {number: (forward.get(number, len(order) - place[nodes[0]]), number) for number, nodes in members.items()}
    numbers = list(nx.lexicographical_topological_sort(condensed, key=rank.__getitem__))
    index = {number: position for position, number in enumerate(numbers)}
    edges = tuple(sorted((index[u], index[v]) for u, v in condensed.edges))
    return tuple(tuple(members[number]) for number in numbers), edges


def _precedence(graph: nx.DiGraph, label: dict):
    """Edges that order the stages: forward ones, and mirrored the backward ones without a forward partner."""
    forward = {label[node] for node, data in graph.nodes(data=True) if not data.get("is_backward")}
    for u, v in graph.edges:
        back = bool(graph.nodes[u].get("is_backward")), bool(graph.nodes[v].get("is_backward"))
        if back == (False, False):
            yield u, v
        elif back == (True, True) and (label[u] not in forward or label[v] not in forward):
            yield v, u


def _nets(graph: nx.DiGraph, order: list[Node], item_of: dict[Node, int], num_microbatches: int) -> tuple[Net, ...]:
    """Values with readers elsewhere, and tied parameters; those with the same items are priced as one."""
    sums: dict[tuple[int, tuple[int, ...]], list[float]] = {}
    for node in order:
        pins = {item_of[node], *(item_of[reader] for reader in graph.successors(node))}
        if len(pins) > 1:
            data, entry = graph.nodes[node], sums.setdefault((item_of[node], tuple(sorted(pins))), [0.0, 0.0, 0.0])
            for position, value in enumerate(transfer(data)):
                entry[position] += value
    frozen = frozen_names(graph)
    for name, (pins, size) in _shared(graph, item_of).items():
        if len(pins) > 1 and name not in frozen:
            entry = sums.setdefault((-1, pins), [0.0, 0.0, 0.0])
            entry[1] += 1.0 / num_microbatches
            entry[2] += size / num_microbatches
    return tuple(Net(source, pins, *entry) for (source, pins), entry in sums.items() if any(entry))


def transfer(data: dict) -> tuple[float, float, float]:
    """Fixed seconds, messages and bytes per micro-batch of the node's value, there and back."""
    if data.get("transfer") is not None:
        return float(data["transfer"]), 0.0, 0.0
    times = 2.0 if data.get("gradient") else 1.0
    return 0.0, times, times * data.get("output_bytes", 0.0)


def _shared(graph: nx.DiGraph, item_of: dict[Node, int]) -> dict[str, tuple[tuple[int, ...], float]]:
    """Per shared parameter: the items that read it and its bytes."""
    pins: dict[str, set[int]] = {}
    sizes: dict[str, float] = {}
    for node, data in graph.nodes(data=True):
        for name, size in (data.get("shared") or {}).items():
            pins.setdefault(name, set()).add(item_of[node])
            sizes[name] = max(sizes.get(name, 0.0), float(size))
    return {name: (tuple(sorted(items)), sizes[name]) for name, items in pins.items()}


def _crossing(graph: nx.DiGraph, item_of: dict[Node, int]) -> tuple[tuple[int, ...], ...]:
    """Items of every value that may cross a cut, one entry per tensor."""
    pins = (sorted({item_of[node], *(item_of[reader] for reader in graph.successors(node))}) for node in graph
            if not graph.nodes[node].get("is_backward"))
    return tuple(tuple(each) for each in pins if len(each) > 1)


def reorder(problem: Problem, order: list[int]) -> Problem:
    """The same problem with its items in another topological order."""
    place = np.empty(len(order), int)
    place[order] = np.arange(len(order))

    def moved(pins: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(place[list(pins)].tolist()))
    return replace(
        problem, items=tuple(problem.items[index] for index in order),
        edges=tuple((int(place[u]), int(place[v])) for u, v in problem.edges),
        nets=tuple(replace(net, source=int(place[net.source]) if net.source >= 0 else -1, pins=moved(net.pins))
                   for net in problem.nets),
        shared=tuple((moved(pins), size) for pins, size in problem.shared),
        times={device: values[order] for device, values in problem.times.items()},
        pieces=tuple(replace(piece, pins=moved(piece.pins)) for piece in problem.pieces),
        fixed_bytes=problem.fixed_bytes[order], activation_bytes=problem.activation_bytes[order],
        workspace_bytes=problem.workspace_bytes[order], crossing=tuple(map(moved, problem.crossing)),
        has_parameters=problem.has_parameters[order])
