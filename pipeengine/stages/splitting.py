"""Cut a recording into stages, once every placed node has its stage.

Modules that lie whole in one stage stay one call of the user's module; only those that a cut crosses are opened.
"""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pipeengine.schedules import Edge
from pipeengine.tracing import Call, Dataflow, Node, NodeCost, Recording, Ref, encoded_leaves, node_refs, picks, refs


@dataclass(frozen=True)
class StageBoundary:
    """Values that stage ``source`` hands straight to stage ``target`` for a micro-batch, in wire order.

    ``gradients`` are the values whose gradient comes back from ``target``. The gradient of a value that several stages
    read goes from the last of them to the one before it, and so on to its producer: each adds its own share, in the
    order in which one process would add them, so that the sum has the same bits.
    """

    source: int
    target: int
    values: tuple[int, ...]
    gradients: tuple[int, ...]

    @property
    def edge(self) -> Edge:
        """The same boundary as schedules see it: which way messages pass."""
        return Edge(self.source, self.target, bool(self.values), bool(self.gradients))


@dataclass(frozen=True)
class Part:
    """What one stage does with a micro-batch.

    ``nodes`` in order; ``inputs`` are the values of the recording's inputs that it reads, ``attributes`` the names of
    the parameters and buffers; ``returns`` are the values that leave it: for later stages, the loss, or the model's
    output.
    """

    stage: int
    nodes: tuple[Node, ...]
    inputs: tuple[int, ...]
    receives: tuple[StageBoundary, ...]
    sends: tuple[StageBoundary, ...]
    returns: tuple[int, ...]
    attributes: frozenset[str]


@dataclass(frozen=True)
class Split:
    """The parts of all stages and what passes between them."""

    recording: Recording
    parts: tuple[Part, ...]
    boundaries: tuple[StageBoundary, ...]
    loss_stage: int | None
    output_stage: int

    @property
    def edges(self) -> frozenset[Edge]:
        """Pairs of stages between which something passes, and which way."""
        return frozenset(boundary.edge for boundary in self.boundaries)


def split(flow: Dataflow, stage_of: Mapping[int, int], num_stages: int, *, outputs: bool,
          keep_apart: Callable[[Node], bool] = lambda node: False) -> Split:
    """Cut ``flow`` so that placed node n runs on stage ``stage_of[n]``.

    With ``outputs`` the last stage gets the whole output of the model, else only the loss is kept. Modules around a
    node for which ``keep_apart`` holds are opened.
    """
    recording = flow.recording
    made_on = {value: stage_of[n] for n in flow.placed for value in recording.nodes[n].results}
    wanted = _wanted(flow, stage_of, made_on, num_stages, outputs)
    boundaries = _boundaries(flow, wanted, made_on)
    loss_stage = made_on.get(recording.loss) if recording.loss is not None else None
    apart = frozenset(n for n in flow.placed if keep_apart(recording.nodes[n]))
    parts = tuple(_part(flow, stage, stage_of, boundaries, loss_stage, num_stages, outputs, apart)
                  for stage in range(num_stages))
    return Split(recording, parts, boundaries, loss_stage, num_stages - 1)


def closure(flow: Dataflow, values: set[int]) -> set[int]:
    """Free nodes that must run to have ``values``."""
    found: set[int] = set()
    writers = defaultdict(set)
    for index in flow.replicated:
        for storage in flow.recording.nodes[index].writes:
            writers[storage].add(index)
    waiting = [n for v in values for n in (flow.recording.values[v].node, *writers[flow.recording.values[v].storage])]
    while waiting:
        index = waiting.pop()
        if index not in flow.replicated or index in found:
            continue
        found.add(index)
        waiting.extend(flow.before[index])
        for value in flow.recording.nodes[index].results:
            waiting.extend(writers[flow.recording.values[value].storage])
    return found


def _wanted(flow, stage_of, made_on, num_stages: int, outputs: bool) -> dict[int, set[int]]:
    """Stage -> values made on other stages that it reads."""
    found: dict[int, set[int]] = defaultdict(set)
    for index in flow.placed:
        for value in node_refs(flow.recording.nodes[index]):
            if made_on.get(value, stage_of[index]) != stage_of[index]:
                found[stage_of[index]].add(value)
    if outputs:
        found[num_stages - 1] |= {v for v in refs(flow.recording.output)
                                  if made_on.get(v, num_stages - 1) != num_stages - 1}
    return found


def _boundaries(flow, wanted: dict[int, set[int]], made_on) -> tuple[StageBoundary, ...]:
    values, gradients = defaultdict(list), defaultdict(list)
    readers = defaultdict(list)
    for target in sorted(wanted):
        for value in wanted[target]:
            values[made_on[value], target].append(value)
            if value in flow.wants_gradient:
                readers[value].append(target)
    for value, targets in readers.items():
        for source, target in zip((made_on[value], *targets), targets):
            gradients[source, target].append(value)
    order = {index: position for position, index in enumerate(flow.live)}

    def in_order(found: list[int]) -> tuple[int, ...]:
        return tuple(sorted(found, key=lambda v: (order[flow.recording.values[v].node], v)))
    return tuple(StageBoundary(*pair, in_order(values.get(pair, [])), in_order(gradients.get(pair, [])))
                 for pair in sorted({*values, *gradients}))


def _part(flow, stage: int, stage_of, boundaries, loss_stage, num_stages: int, outputs: bool,
          apart: frozenset[int]) -> Part:
    recording = flow.recording
    own = {n for n in flow.placed if stage_of[n] == stage}
    sends = tuple(boundary for boundary in boundaries if boundary.source == stage)
    receives = tuple(boundary for boundary in boundaries if boundary.target == stage)
    returns = dict.fromkeys(v for boundary in sends for v in boundary.values)
    if loss_stage == stage:
        returns[recording.loss] = None
    if outputs and stage == num_stages - 1:
        returns.update(dict.fromkeys(refs(recording.output)))
    arrived = {v for boundary in receives for v in boundary.values}
    nodes = _fuse(flow, own, set(returns), arrived, apart)
    read = {v for node in nodes for v in node_refs(node)} | set(returns)
    free = closure(flow, read)
    inside = {v for node in nodes for v in node.results}
    repeated = [recording.nodes[n] for n in sorted(free)
                if not set(recording.nodes[n].results) & inside or not recording.nodes[n].results]
    ordered = tuple(sorted([*repeated, *nodes], key=lambda node: first_index(recording, node)))
    read |= {v for node in ordered for v in node_refs(node)}
    attributes = frozenset(recording.values[v].name for v in read if recording.values[v].kind == "attribute")
    inputs = tuple(sorted(v for v in read if recording.values[v].kind == "input"))
    return Part(stage, ordered, inputs, receives, sends, tuple(returns), attributes)


def first_index(recording: Recording, node: Node) -> int:
    """Where a (possibly fused) node stands in the recording."""
    return node.call if isinstance(node, _Fused) else recording.index_of(node)


class _Fused(Node):
    """A whole module call in the place of its nodes; ``call`` is the index of the first of them."""


def _fuse(flow: Dataflow, own: set[int], returns: set[int], arrived: set[int], apart: frozenset[int]) -> list[Node]:
    """The stage's nodes, with every module call that lies whole among them as one node."""
    recording = flow.recording
    live = set(flow.live)
    readers = defaultdict(list)
    for index in own:
        for value in node_refs(recording.nodes[index]):
            readers[value].append(index)
    children = defaultdict(list)
    for index, call in enumerate(recording.calls):
        children[call.parent].append(index)
    nodes: list[Node] = []
    covered: set[int] = set()

    def visit(index: int) -> None:
        call = recording.calls[index]
        span = range(call.start, call.end)
        if not any(n in own for n in span):
            return
        if call.parent >= 0 and apart.isdisjoint(span) and _is_whole(flow, call, own, live, readers, returns, arrived):
            nodes.append(_as_node(recording, call))
            covered.update(span)
            return
        for child in children[index]:
            visit(child)
    for root in children[-1]:
        visit(root)
    nodes.extend(recording.nodes[n] for n in own if n not in covered)
    return nodes


def _is_whole(flow, call: Call, own, live, readers, returns, arrived) -> bool:
    """Whether calling the user's module gives all that its nodes give, and needs nothing but its arguments."""
    recording, span = flow.recording, range(call.start, call.end)
    arguments = set(refs(call.args)) | set(refs(call.kwargs))
    if not call.plain_arguments or not any(n in own and n in live for n in span):
        return False
    for value in arguments:                 # an argument that its nodes do not read must not cause a message
        producer = recording.values[value].node
        if producer >= 0 and producer not in own and producer not in flow.replicated and value not in arrived:
            return False
    handed = set(refs(call.output))
    for index in span:
        node = recording.nodes[index]
        if node.random or node.effect and not node.is_module:
            return False
        if index not in own and index not in flow.replicated \
                and (index in live or node.attributes or _reads_attribute(recording, node)):
            return False
        for value in node_refs(node):
            entry = recording.values[value]
            if entry.kind in ("result", "input") and entry.node not in span and value not in arguments:
                return False
        if index in own:
            for value in node.results:
                outside = value in returns or any(r not in span for r in readers[value])
                if outside and value not in handed:
                    return False
    return True


def _reads_attribute(recording: Recording, node: Node) -> bool:
    return any(recording.values[v].kind == "attribute" for v in node_refs(node))


def _as_node(recording: Recording, call: Call) -> Node:
    inside = [recording.nodes[n] for n in range(call.start, call.end)]
    made = {value for node in inside for value in node.results}
    results = tuple(dict.fromkeys(leaf.value for leaf in encoded_leaves(call.output)
                                  if isinstance(leaf, Ref) and leaf.value in made))
    attributes = tuple(dict.fromkeys(v for node in inside for v in node_refs(node)
                                     if recording.values[v].kind == "attribute"))
    writes = frozenset(w for node in inside for w in node.writes)
    cost = NodeCost(sum(n.cost.flops for n in inside), sum(n.cost.bytes for n in inside))
    return _Fused(call.scope, call.path, True, call.args, call.kwargs, results, picks(call.output, results), call.start,
                  call.modes, writes, attributes, False, False, False, cost)
