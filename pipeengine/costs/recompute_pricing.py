"""What recomputation changes in a cost graph and in a plan. Seconds and bytes."""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import networkx

from partitioners.plan import price_stages
from pipeengine.autograd import Span, check_recomputable
from pipeengine.errors import InputError
from pipeengine.tracing import Dataflow, node_refs

__all__ = ["name_blocks", "price_modules", "price_stages"]

_MEMBER = re.compile(r"(.*\.)?\d+")         # of a Sequential or a ModuleList: what models repeat


def price_modules(graph: networkx.DiGraph, flow: Dataflow, spans: Iterable[Span]) -> None:
    """Put recomputed modules into a cost graph: their forward twice, and only what they read is kept."""
    recording = flow.recording
    for span in spans:
        nodes = [graph.nodes[recording.nodes[n].name] for n in flow.placed if n in range(*span)]
        activations = sum(node["activation_bytes"] for node in nodes)
        for node in nodes:
            node.update(backward=node["backward"] + node["forward"], activation_bytes=0)
            node.update({name: 0 for name in ("weight_grad", "kept_bytes") if name in node})    # B is not split there
        for label in {node["block"] for node in nodes if "block" in node}:
            for data in (data for _, data in graph.nodes(data=True) if data.get("block") == label):
                del data["block"]
                data.pop("block_bytes", None)
        if nodes:
            nodes[0]["activation_bytes"] = _read_bytes(flow, span)
            nodes[-1]["workspace_bytes"] += activations


def name_blocks(graph: networkx.DiGraph, flow: Dataflow) -> None:
    """Name in a cost graph what a plan may recompute: the outermost members of the model's lists that run once.

    Their labels are module paths, so that a plan's ``recomputed`` is what ``Recompute`` takes.
    """
    for path, span in _members(flow):
        names = [flow.recording.nodes[n].name for n in flow.placed if n in range(*span)]
        if not names:
            continue
        for name in names:
            graph.nodes[name]["block"] = path
        graph.nodes[names[0]]["block_bytes"] = _read_bytes(flow, span)


def _members(flow: Dataflow) -> list[tuple[str, Span]]:
    """Paths and spans, in order, none in another."""
    recording = flow.recording
    spans = [(call.path, (call.start, call.end)) for call in recording.calls if _MEMBER.fullmatch(call.path)]
    spans += [(node.target, (index, index + 1)) for index, node in enumerate(recording.nodes)
              if isinstance(node.target, str) and _MEMBER.fullmatch(node.target)]
    times = Counter(path for path, _ in spans)
    members: list[tuple[str, Span]] = []
    for path, (start, end) in sorted(spans, key=lambda one: (one[1][0], -one[1][1])):
        outermost = end > start and (not members or start >= members[-1][1][1])
        if outermost and times[path] == 1 and _runs_twice(flow, (start, end)):
            members.append((path, (start, end)))
    return members


def _runs_twice(flow: Dataflow, span: Span) -> bool:
    """Whether the nodes may run again in backward: nothing outside is changed, nobody recomputes them as it is."""
    nodes = flow.recording.nodes[slice(*span)]
    try:
        check_recomputable(flow.recording, nodes, "a block")
    except InputError:
        return False
    return not any(node.recompute for node in nodes)


def _read_bytes(flow: Dataflow, span: Span) -> int:
    """Bytes of what a span reads from nodes before it, once each; what follows from the inputs is there anyway."""
    values, (start, end) = flow.recording.values, span
    read = {v for n in flow.placed if start <= n < end for v in node_refs(flow.recording.nodes[n])
            if values[v].node >= 0 and not start <= values[v].node < end}
    return sum(values[v].spec.bytes for v in read if values[v].node not in flow.replicated)
