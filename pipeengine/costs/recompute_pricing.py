"""What recomputation changes in a cost graph and in a plan. Seconds and bytes."""
from __future__ import annotations

from collections.abc import Iterable

import networkx

from partitioners.plan import price_stages
from pipeengine.autograd import Span
from pipeengine.tracing import Dataflow, node_refs

__all__ = ["price_modules", "price_stages"]


def price_modules(graph: networkx.DiGraph, flow: Dataflow, spans: Iterable[Span]) -> None:
    """Put recomputed modules into a cost graph: their forward twice, and only what they read is kept."""
    recording = flow.recording
    for start, end in spans:
        inside = [n for n in flow.placed if start <= n < end]
        nodes = [graph.nodes[recording.nodes[n].name] for n in inside]
        read = {v for n in inside for v in node_refs(recording.nodes[n])
                if recording.values[v].node >= 0 and not start <= recording.values[v].node < end}
        activations = sum(node["activation_bytes"] for node in nodes)
        for node in nodes:
            node.update(backward=node["backward"] + node["forward"], activation_bytes=0)
        if nodes:
            nodes[0]["activation_bytes"] = sum(recording.values[v].spec.bytes for v in read
                                               if recording.values[v].node not in flow.replicated)
            nodes[-1]["workspace_bytes"] += activations
