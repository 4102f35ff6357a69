"""Forwards that run twice: activations that are computed again in backward instead of being kept."""
from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import networkx
import torch

from partitioners import Plan
from pipeengine.dataflow import Dataflow
from pipeengine.errors import InputError
from pipeengine.recording import Node, Recording, node_refs

Span = tuple[int, int]
"""Nodes ``start <= index < end`` of a recording."""


@dataclass(frozen=True)
class Recompute:
    """Whole ``stages``, and ``modules`` by path, whose forward runs again in backward."""

    stages: frozenset[int] = frozenset()
    modules: frozenset[str] = frozenset()

    @classmethod
    def of(cls, asked: bool | Collection[int | str], num_stages: int, model: torch.nn.Module) -> Recompute:
        """What the user has asked for: all stages, or the stages and modules that are named."""
        if isinstance(asked, bool):
            return cls(frozenset(range(num_stages) if asked else ()))
        asked = (asked,) if isinstance(asked, str) else asked
        stages = frozenset(one for one in asked if not isinstance(one, str))
        if stages - set(range(num_stages)):
            raise InputError(f"recompute names stages {sorted(stages - set(range(num_stages)))}; there are stages 0 to "
                             f"{num_stages - 1}")
        modules = frozenset(one for one in asked if isinstance(one, str))
        unknown = sorted(modules - {path for path, _ in model.named_modules() if path})
        if unknown:
            some = [path for path, _ in model.named_modules() if path][:3]
            raise InputError(f"recompute names {unknown[0]!r}, which is no module of the model; its modules are "
                             f"{', '.join(some)} ...")
        return cls(stages, modules)

    def spans(self, recording: Recording) -> tuple[Span, ...]:
        """Where the named modules run, one in another counted once."""
        found = [(call.start, call.end) for call in recording.calls if call.path in self.modules]
        found += [(index, index + 1) for index, node in enumerate(recording.nodes)
                  if node.is_module and node.target in self.modules]
        outermost: list[Span] = []
        for start, end in sorted(found, key=lambda span: (span[0], -span[1])):
            if end > start and (not outermost or start >= outermost[-1][1]):
                outermost.append((start, end))
        return tuple(outermost)


def check_twice(recording: Recording, nodes: Sequence[Node], what: str) -> None:
    """Raise ``InputError`` when running ``nodes`` a second time would change something again that is there outside of them."""
    made = {v for node in nodes for v in node.results}
    outside = {value.storage for v, value in enumerate(recording.values) if v not in made}
    for node in nodes:
        if node.writes & outside:
            changed = next(value for v, value in enumerate(recording.values) if v not in made and value.storage in node.writes)
            raise InputError(f"{what} cannot be recomputed: {node.name} changes {changed.name} in place, and would change it again "
                             "in the second forward; leave it out of recompute")


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
                                               if recording.values[v].node not in flow.free)
            nodes[-1]["workspace_bytes"] += activations


def price_stages(plan: Plan, stages: Collection[int]) -> Plan:
    """The plan's figures when ``stages`` keep only what they receive."""
    received = [sum(b.bytes for b in plan.boundaries if b.target == stage) for stage in range(plan.num_stages)]
    return replace(plan, stages=tuple(
        replace(cost, backward=cost.backward + cost.forward, activation_bytes=float(received[stage]),
                workspace_bytes=cost.workspace_bytes + cost.activation_bytes,
                first_workspace_bytes=cost.first_workspace_bytes + cost.activation_bytes) if stage in stages else cost
        for stage, cost in enumerate(plan.stages)))
