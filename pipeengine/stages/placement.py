"""The plan, applied to recordings: which stage each node of each recording runs on.

Two types, one after the other. ``Placement`` is the plan alone and places the first recording; what that puts where
decides which stage holds which parameter. ``SettledPlacement`` knows those holders and places every later recording by
them, since a parameter cannot move once its worker has it.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from pipeengine.errors import PlanError
from pipeengine.tracing import Dataflow, Node, node_refs

Holders = Mapping[str, frozenset[int]]
"""Name of a parameter or buffer -> the stages that hold it."""


@dataclass(frozen=True)
class Placement:
    """The plan by names, before it is settled who holds what.

    ``stage_of`` is the plan's stage of each node's name, ``leaf_modules`` (path -> reason) are the modules that later
    recordings keep whole because the first one did.
    """

    stage_of: Mapping[str, int]
    num_stages: int
    leaf_modules: Mapping[str, str]

    def __post_init__(self) -> None:
        for field in ("stage_of", "leaf_modules"):
            object.__setattr__(self, field, MappingProxyType(dict(getattr(self, field))))

    def assign(self, flow: Dataflow) -> dict[int, int]:
        """Stage of every placed node; never before a node whose result it reads.

        A node that the plan does not know goes where the rest of its module is, else where its inputs are.
        """
        return _assign(flow, self, {})

    def settle(self, flow: Dataflow, stage_of: Mapping[int, int], names: Sequence[str]) -> SettledPlacement:
        """Fix for good which stages hold which parameters and buffers: those whose nodes read them.

        ``stage_of`` is what ``assign(flow)`` gave. Those of ``names``, in the model's order, that nobody reads go to
        one stage: their module's, or where the tensor before them is (a head that the loss does not use is last, and an
        evaluation will read it there).
        """
        readers: dict[str, set[int]] = {}
        for index, stage in stage_of.items():
            for name in _attributes_read(flow, flow.recording.nodes[index]):
                readers.setdefault(name, set()).add(stage)
        before = 0
        for name in names:
            if name not in readers:
                readers[name] = {self._neighbour(name, before)}
            before = min(readers[name])
        return SettledPlacement(self, {name: frozenset(stages) for name, stages in readers.items()})

    @cached_property
    def stages_of_scope(self) -> Mapping[str, frozenset[int]]:
        """Path of a module, the root left out -> every stage that some node inside it is on."""
        stages: dict[str, set[int]] = {}
        for name, stage in self.stage_of.items():
            for path in _upwards(name.partition(":")[0]):
                stages.setdefault(path, set()).add(stage)
        return {path: frozenset(numbers) for path, numbers in stages.items()}

    def _neighbour(self, name: str, before: int) -> int:
        """The stage of the innermost module around ``name`` that has one, and only one; else ``before``."""
        stages = next((self.stages_of_scope[path] for path in _upwards(name.rpartition(".")[0])
                       if path in self.stages_of_scope), frozenset())
        return min(stages) if len(stages) == 1 else before


@dataclass(frozen=True)
class SettledPlacement:
    """The plan, and the stages that hold each parameter and buffer: what later recordings are placed by."""

    plan: Placement
    holders: Holders

    def __post_init__(self) -> None:
        object.__setattr__(self, "holders", MappingProxyType(dict(self.holders)))

    @property
    def num_stages(self) -> int:
        """Stages of the plan."""
        return self.plan.num_stages

    @property
    def leaf_modules(self) -> Mapping[str, str]:
        """Modules that every recording keeps whole (path -> reason)."""
        return self.plan.leaf_modules

    def assign(self, flow: Dataflow) -> dict[int, int]:
        """Stage of every placed node; each finds on its stage what it reads.

        With another batch the same name may stand for another operation; who holds which parameter does not change.
        Raises ``PlanError`` when a node can be on no stage that holds its parameters.
        """
        stages = _assign(flow, self.plan, self.holders)
        for index, stage in stages.items():
            node = flow.recording.nodes[index]
            for name in _attributes_read(flow, node):
                if stage not in self.holders.get(name, (stage,)):
                    raise PlanError(
                        f"with this batch, {node.name} reads {name} on stage {stage}, which is held by stage "
                        f"{sorted(self.holders[name])} only: the model's structure depends on the batch. "
                        "Construct the pipeline with an example that takes the same path")
        return stages


def _assign(flow: Dataflow, plan: Placement, holders: Holders) -> dict[int, int]:
    """Stage of every placed node, as the plan says where the holders of what it reads allow that."""
    stages: dict[int, int] = {}
    group_of = {n: group for group in flow.groups for n in group}
    latest = _latest(flow, plan.num_stages, holders)
    for index in flow.placed:
        node = flow.recording.nodes[index]
        earliest = max((stages[p] for p in flow.before[index] if p in stages), default=0)
        common = _common_holders(flow, node, holders)
        stage = plan.stage_of.get(node.name)
        if stage is None or common and stage not in common:
            stage = _guess(plan, node, common, earliest)
        together = [stages[n] for n in group_of.get(index, ()) if n in stages]
        # Never before what it reads is made, even if it then misses its parameters: SettledPlacement refuses that.
        stages[index] = max(min(stage, latest[index]), earliest, *together)
    return stages


def _latest(flow: Dataflow, num_stages: int, holders: Holders) -> dict[int, int]:
    """The last stage that each placed node may be on, so that what follows finds its parameters."""
    latest = dict.fromkeys(flow.placed, num_stages - 1)
    for index in reversed(flow.placed):
        common = _common_holders(flow, flow.recording.nodes[index], holders)
        if common:
            latest[index] = min(latest[index], max(common))
        for before in flow.before[index]:
            if before in latest:
                latest[before] = min(latest[before], latest[index])
    return latest


def _guess(plan: Placement, node: Node, common: frozenset[int], earliest: int) -> int:
    """Where a node goes that the plan does not know, or that it puts where its parameters are not."""
    if common:
        return min((stage for stage in common if stage >= earliest), default=max(common))
    for path in _upwards(node.name.partition(":")[0]):
        stages = plan.stages_of_scope.get(path, frozenset())
        if len(stages) == 1:
            return min(stages)
    return earliest


def _common_holders(flow: Dataflow, node: Node, holders: Holders) -> frozenset[int]:
    """Stages that hold everything that the node reads; empty when it reads nothing that is held."""
    of_each = [holders[name] for name in _attributes_read(flow, node) if name in holders]
    return frozenset.intersection(*of_each) if of_each else frozenset()


def _attributes_read(flow: Dataflow, node: Node) -> Iterator[str]:
    """Names of the parameters and buffers that a node reads."""
    values = flow.recording.values
    return (values[v].name for v in node_refs(node) if values[v].kind == "attribute")


def _upwards(path: str) -> Iterator[str]:
    """``a.b.c``, ``a.b``, ``a``."""
    while path:
        yield path
        path = path.rpartition(".")[0]
