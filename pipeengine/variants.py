"""The recordings of one model: one for every kind of micro-batch that has come by.

What eager execution would do depends on shapes, modes and on what the forward reads from its inputs (guards). A micro-batch
of a kind not seen before is recorded anew; the plan, keyed by names, says where everything goes.
"""
from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy
import torch

from pipeengine.capturing import Inputs, capture
from pipeengine.dataflow import Dataflow, analyse
from pipeengine.deferral import Replacement, put_off
from pipeengine.errors import PlanError
from pipeengine.executor import Runnable, make_runnable
from pipeengine.recomputation import Recompute, check_twice
from pipeengine.recording import Node, Recording, Ref, fill, node_refs, refs
from pipeengine.split import Part, Split, split
from pipeengine.stage import Draw, compile_part

_MOST = 128


@dataclass(frozen=True)
class Variant:
    """One recording, cut by the plan and compiled for the stages of this worker."""

    recording: Recording
    split: Split
    stages: Runnables
    guards: Callable[[Sequence[torch.Tensor], int | None], bool] | None
    count_targets: Callable[[Sequence[torch.Tensor]], float] | None
    cloned: tuple[int, ...]                     # inputs that the forward changes in place
    links: frozenset[tuple[int, int, bool, bool]]       # (source, target, activation, gradient)
    outputs: tuple[int, ...]
    digest: int


class Runnables:
    """The stages of this worker for one kind of micro-batch, each compiled once, when it is first needed.

    ``make(stage, halved)`` compiles one: ``halved`` where backward is two actions, I and W, so that weight gradients can wait.
    """

    def __init__(self, own: Sequence[int], make: Callable[[int, bool], Runnable]):
        self._own, self._make = tuple(own), cache(make)
        self._known: dict[frozenset[int], dict[int, Runnable]] = {}

    def of(self, halved: frozenset[int] = frozenset()) -> dict[int, Runnable]:
        """What runs a micro-batch whose backward is halved on the stages ``halved``."""
        found = self._known.get(halved)
        if found is None:
            found = self._known[halved] = {stage: self._make(stage, stage in halved) for stage in self._own}
        return found


class Variants:
    """Finds or makes the variant for a micro-batch."""

    def __init__(self, model: torch.nn.Module, placement: Placement, own: Sequence[int], *, loss_fn: Callable | None,
                 device: torch.device, draw: Draw, defer: bool = False,
                 recompute: Recompute = Recompute()):
        self._defer, self._recompute = defer, recompute
        self._model, self._placement, self._own = model, placement, tuple(own)
        self._loss_fn, self._device, self._draw = loss_fn, device, draw
        self._known: OrderedDict[tuple, list[Variant]] = OrderedDict()
        self.recorded = 0

    def find(self, key: tuple, tensors: Sequence[torch.Tensor], inputs: Callable[[], Inputs], random_key: int | None, *,
             outputs: bool) -> Variant:
        """The variant for the micro-batch ``tensors``; ``inputs()`` gives it as the model wants it."""
        known = self._known.setdefault(key, [])
        self._known.move_to_end(key)
        for variant in known:
            if variant.guards is None or variant.guards(tensors, random_key):
                return variant
        with torch.set_grad_enabled(not outputs):
            given = inputs()                # an evaluation may have no target: then there is no loss
            recording = capture(self._model, given, loss_fn=None if given.target is None else self._loss_fn, device=self._device,
                                random_key=random_key, warm=self._placement.sealed)
        variant = self.make(recording, outputs=outputs)
        self.recorded += 1
        known.append(variant)
        del known[:-_MOST]
        while len(self._known) > _MOST:
            self._known.popitem(last=False)
        return variant

    def make(self, recording: Recording, *, outputs: bool) -> Variant:
        """Cut and compile a recording."""
        flow = analyse(recording, outputs=outputs)
        stage_of = self._placement.assign(flow)
        wanted = tuple(dict.fromkeys(refs(recording.output))) if outputs else ()
        again = () if outputs else self._recompute.spans(recording)
        for span in again:
            nodes = recording.nodes[slice(*span)]
            check_twice(recording, nodes, f"module {nodes[0].name.partition(':')[0]}")

        @cache
        def cut_for(halved: bool) -> tuple[Split, Mapping[int, Replacement] | None]:
            waits = put_off(recording, self._model) if halved else None
            apart = {id(recording.nodes[n]) for span in again for n in range(*span)}
            apart |= {id(node) for node in recording.nodes if node.results and node.results[0] in (waits or ())}
            return split(flow, stage_of, self._placement.num_stages, outputs=outputs,
                         keep_apart=lambda node: id(node) in apart), waits

        def runnable(stage: int, halved: bool) -> Runnable:
            cut, waits = cut_for(halved)
            if stage in self._recompute.stages and not outputs:
                check_twice(recording, cut.parts[stage].nodes, f"stage {stage}")
            return make_runnable(compile_part(cut.parts[stage], recording, self._model, self._draw, put_off=waits, again=again), cut,
                                 outputs=wanted if outputs else None, recompute=stage in self._recompute.stages)
        cut, _ = cut_for(self._defer and not outputs)       # the links are the same either way
        written = {storage for node in recording.nodes for storage in node.writes}
        cloned = tuple(i for i, v in enumerate(recording.inputs) if recording.values[v].storage in written)
        links = frozenset((link.source, link.target, bool(link.values), bool(link.gradients)) for link in cut.links)
        return Variant(recording, cut, Runnables(self._own, runnable), guard_check(flow, self._model, self._draw), target_count(flow, self._model),
                       cloned, links, wanted, _digest(cut))

    def seed(self, key: tuple, variant: Variant) -> None:
        """Remember a variant made elsewhere."""
        self._known.setdefault(key, []).append(variant)


def _digest(cut: Split) -> int:
    values = cut.recording.values
    text = repr([(link.source, link.target, [(values[v].name, values[v].spec) for v in link.values], len(link.gradients))
                 for link in cut.links])
    return zlib.crc32(text.encode())


# -- where nodes go -----------------------------------------------------------------------------------------------------


class Placement:
    """The plan, applied to recordings: which stage each node of each recording runs on."""

    def __init__(self, stage_of: Mapping[str, int], num_stages: int, sealed: Mapping[str, str]):
        self._stage_of, self.num_stages, self.sealed = dict(stage_of), num_stages, dict(sealed)
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


# -- guards and loss weights --------------------------------------------------------------------------------------------


def _needed(flow: Dataflow, values: set[int], until: int) -> list[int]:
    """Nodes that must run to have ``values`` as they were after ``until`` nodes, in order."""
    recording = flow.recording
    found: set[int] = set()
    storages = {recording.values[v].storage for v in values}
    waiting = [recording.values[v].node for v in values if recording.values[v].node >= 0]
    waiting += [n for n, node in enumerate(recording.nodes[:until]) if node.writes & storages]
    while waiting:
        index = waiting.pop()
        if index not in found:
            found.add(index)
            waiting.extend(flow.before[index])
    return sorted(found)


def _function(flow: Dataflow, model: torch.nn.Module, values: list[int], nodes: list[int], draw: Draw):
    """A function of a micro-batch's tensors that computes ``values``."""
    recording = flow.recording
    chosen = tuple(recording.nodes[n] for n in nodes)
    read = {v for node in chosen for v in node_refs(node)} | set(values)
    inputs = tuple(sorted(v for v in read if recording.values[v].kind == "input"))
    compiled = compile_part(Part(-1, chosen, inputs, (), (), tuple(values), frozenset()), recording, model, draw)
    written = {s for node in chosen for s in node.writes}

    def run(tensors: Sequence[torch.Tensor]) -> tuple:
        given = [tensors[i].clone() if recording.values[v].storage in written else tensors[i]
                 for i, v in zip(compiled.inputs, inputs)]
        return compiled.run(*given)
    return run, compiled.random


def guard_nodes(flow: Dataflow) -> list[int]:
    """Nodes that must run to evaluate every guard, in order."""
    return sorted({n for guard in flow.recording.guards
                   for n in _needed(flow, {*refs(guard.args), *refs(guard.kwargs)}, guard.position)})


def guard_check(flow: Dataflow, model: torch.nn.Module, draw: Draw):
    """A function that tells whether a micro-batch takes the recorded path, or None when every one does."""
    guards = flow.recording.guards
    if not guards:
        return None
    values = list(dict.fromkeys(v for guard in guards for v in (*refs(guard.args), *refs(guard.kwargs))))
    nodes = guard_nodes(flow)
    run, random = _function(flow, model, values, nodes, draw)

    def holds(tensors: Sequence[torch.Tensor], key: int | None) -> bool:
        with torch.no_grad():
            states = draw.enter(key) if random else None
            try:
                found = dict(zip(values, run(tensors)))
                return all(_holds(guard, found) for guard in guards)
            except Exception:       # another path may not even have these shapes
                return False
            finally:
                draw.leave(states)
    return holds


def _holds(guard, found: Mapping[int, torch.Tensor]) -> bool:
    args, kwargs = fill(guard.args, found.__getitem__), fill(guard.kwargs, found.__getitem__)
    if guard.target is None:
        return tuple(args[0].shape) == guard.expected
    result = guard.target(*args, **kwargs)
    if isinstance(result, numpy.ndarray):
        return numpy.array_equal(result, guard.expected)
    return type(result) is type(guard.expected) and bool(result == guard.expected)


_PASSED_ON = {"to", "float", "double", "view", "reshape", "squeeze", "mul", "__mul__", "__rmul__", "add", "__add__", "__radd__",
              "__truediv__", "div", "clone", "type", "contiguous", "mean", "sum"}


def target_count(flow: Dataflow, model: torch.nn.Module):
    """For a mean cross-entropy: a function that counts a micro-batch's targets that are not ignored. Otherwise None."""
    found = _cross_entropy(flow, model)
    if found is None:
        return None
    target, ignored, weight = found
    values = flow.recording.values
    nodes = _needed(flow, {target}, len(flow.recording.nodes))
    if any(n not in flow.free for n in nodes) or values[target].spec.dtype.is_floating_point:
        return None
    run, _ = _function(flow, model, [target], nodes, Draw(torch.device("cpu")))

    def count(tensors: Sequence[torch.Tensor]) -> float:
        with torch.no_grad():
            labels = run(tensors)[0]
            kept = labels[labels != ignored]
            return float(weight.double()[kept].sum()) if weight is not None else float(kept.numel())
    return count


def _cross_entropy(flow: Dataflow, model: torch.nn.Module) -> tuple[int, int, torch.Tensor | None] | None:
    """Target, ignored index and class weights of the one mean cross-entropy that the loss comes from."""
    recording = flow.recording
    waiting, seen, terms = [recording.loss], set(), []
    while waiting:
        value = waiting.pop()
        index = recording.values[value].node if value is not None else -1
        if index < 0 or index in seen:
            continue
        seen.add(index)
        node = recording.nodes[index]
        term = _mean_cross_entropy(node, model, recording)
        if term is not None:
            terms.append(term)
        elif recording.values[value].spec.shape == () and not node.is_module \
                and getattr(node.target, "__name__", "") in _PASSED_ON:
            waiting.extend(v for v in node_refs(node) if recording.values[v].spec.shape == ())
    return terms[0] if len(terms) == 1 else None


def _mean_cross_entropy(node: Node, model: torch.nn.Module, recording: Recording):
    if node.is_module:
        module = model.get_submodule(node.target)
        if not isinstance(module, (torch.nn.CrossEntropyLoss, torch.nn.NLLLoss)) or module.reduction != "mean":
            return None
        target = node.args[1] if len(node.args) > 1 else node.kwargs.get("target")
        return (target.value, module.ignore_index, module.weight) if isinstance(target, Ref) else None
    if node.target not in (torch.nn.functional.cross_entropy, torch.nn.functional.nll_loss):
        return None
    names = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
    given = {**dict(zip(names, node.args)), **node.kwargs}
    if given.get("reduction", "mean") != "mean" or not isinstance(given.get("target"), Ref):
        return None
    weight = given.get("weight")
    if isinstance(weight, Ref):
        made = recording.values[weight.value]
        weight = recording.constants.get(weight.value) if made.kind == "constant" else \
            dict(model.named_buffers()).get(made.name)
        if weight is None:
            return None
    return given["target"].value, given.get("ignore_index", -100), weight

