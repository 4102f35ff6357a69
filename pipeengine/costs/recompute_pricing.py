"""What recomputation changes in a cost graph and in a plan. Seconds and bytes."""
from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

import networkx

from partitioners import Plan
from pipeengine.autograd import Span
from pipeengine.tracing import Dataflow, node_refs


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


def price_stages(plan: Plan, stages: Collection[int]) -> Plan:
    """The plan's figures when ``stages`` keep only what they receive."""
    received = [sum(b.bytes for b in plan.boundaries if b.target == stage) for stage in range(plan.num_stages)]
    return replace(plan, stages=tuple(
        replace(cost, backward=cost.backward + cost.forward, activation_bytes=float(received[stage]),
                workspace_bytes=cost.workspace_bytes + cost.activation_bytes,
                first_workspace_bytes=cost.first_workspace_bytes + cost.activation_bytes) if stage in stages else cost
        for stage, cost in enumerate(plan.stages)))
