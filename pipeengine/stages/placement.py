"""The plan, applied to recordings: which stage each node of each recording runs on."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeengine.errors import PlanError
from pipeengine.tracing import Dataflow, Node, node_refs


class Placement:
    """The plan, applied to recordings: which stage each node of each recording runs on."""

    def __init__(self, stage_of: Mapping[str, int], num_stages: int, leaf_modules: Mapping[str, str]):
        self._stage_of, self.num_stages, self.leaf_modules = dict(stage_of), num_stages, dict(leaf_modules)
        self._scopes: dict[str, set[int]] = {}
        for name, stage in stage_of.items():
            path = name.partition(":")[0]
            while path:
                self._scopes.setdefault(path, set()).add(stage)
                path = path.rpartition(".")[0]
        self.holders: dict[str, frozenset[int]] = {}

    def assign(self, flow: Dataflow) -> dict[int, int]:
        """Stage of every placed node. A node that the plan does not know goes where its inputs or its module are."""
        found: dict[int, int] = {}
        group_of = {n: group for group in flow.groups for n in group}
        latest = self._latest(flow)
        for index in flow.placed:
            node = flow.recording.nodes[index]
            earliest = max((found[p] for p in flow.before[index] if p in found), default=0)
            stage = self._stage_of.get(node.name)
            if stage is None or stage not in (self._common_holders(flow, node) or (stage,)):
                stage = self._guess(flow, node, earliest)
            together = [found[n] for n in group_of.get(index, ()) if n in found]
            found[index] = max(min(stage, latest[index]), earliest, *together)
        self._check(flow, found)
        return found

    def _latest(self, flow: Dataflow) -> dict[int, int]:
        """The last stage that each placed node may be on, so that what follows finds its parameters.

        With another batch the same name may stand for another operation; who holds which parameter does not change.
        """
        latest = dict.fromkeys(flow.placed, self.num_stages - 1)
        for index in reversed(flow.placed):
            holders = self._common_holders(flow, flow.recording.nodes[index])
            if holders:
                latest[index] = min(latest[index], max(holders))
            for before in flow.before[index]:
                if before in latest:
                    latest[before] = min(latest[before], latest[index])
        return latest

    def _common_holders(self, flow: Dataflow, node: Node) -> frozenset[int]:
        """Stages that hold everything that the node reads; empty when it reads nothing that is held."""
        values = flow.recording.values
        holders = [self.holders[values[v].name] for v in node_refs(node)
                   if values[v].kind == "attribute" and values[v].name in self.holders]
        return frozenset.intersection(*holders) if holders else frozenset()

    def _guess(self, flow: Dataflow, node: Node, earliest: int) -> int:
        common = self._common_holders(flow, node)
        if common:
            return min((s for s in common if s >= earliest), default=max(common))
        path = node.name.partition(":")[0]
        while path:
            stages = self._scopes.get(path, set())
            if len(stages) == 1:
                return next(iter(stages))
            path = path.rpartition(".")[0]
        return earliest

    def _check(self, flow: Dataflow, found: dict[int, int]) -> None:
        """A stage reads only parameters that it holds, once it is settled who holds what."""
        for index, stage in found.items() if self.holders else ():
            for value in node_refs(flow.recording.nodes[index]):
                made = flow.recording.values[value]
                if made.kind == "attribute" and stage not in self.holders.get(made.name, (stage,)):
                    raise PlanError(
                        f"with this batch, {flow.recording.nodes[index].name} reads {made.name} on stage {stage}, which is "
                        f"held by stage {sorted(self.holders[made.name])} only: the model's structure depends on the batch. "
                        "Construct the pipeline with an example that takes the same path")

    def settle(self, flow: Dataflow, stage_of: Mapping[int, int], names: Sequence[str]) -> None:
        """Fix for good which stages hold which parameters and buffers; those that nobody reads go to their neighbours."""
        found: dict[str, set[int]] = {}
        for index, stage in stage_of.items():
            for value in node_refs(flow.recording.nodes[index]):
                if flow.recording.values[value].kind == "attribute":
                    found.setdefault(flow.recording.values[value].name, set()).add(stage)
        for name in names:
            if name not in found:
                found[name] = {self._neighbour(name)}
        self.holders = {name: frozenset(stages) for name, stages in found.items()}

    def _neighbour(self, name: str) -> int:
        path = name.rpartition(".")[0]
        while path:
            if path in self._scopes:
                return min(self._scopes[path])
            path = path.rpartition(".")[0]
        return 0
