"""What follows from a recording alone: which steps matter, which can be computed anywhere, which must stay together."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeengine.errors import CaptureError
from pipeengine.tracing.recording import Guard, Node, Recording, node_refs, refs

_CHEAP_SHARE = 0.01                     # of the model's FLOPs: a step above this is placed, not repeated
_CLAMPS = frozenset({"clamp_", "clamp_min_", "clamp_max_", "clip_"})
_SMALL_BUFFER_BYTES = 1 << 24


@dataclass(frozen=True)
class Dataflow:
    """The recording, understood.

    ``live``: nodes that the result needs, in order. ``replicated``: those among them that follow from inputs and
    constants alone, need no gradient and are cheap, so that every stage may compute them again. ``before[n]``: nodes
    that must have run before node n. ``groups``: nodes that must share a stage because one of them changes in place
    what another reads. ``wants_gradient``: values through which a gradient reaches the loss.
    """

    recording: Recording
    goals: tuple[int, ...]
    live: tuple[int, ...]
    replicated: frozenset[int]
    before: dict[int, tuple[int, ...]]
    groups: tuple[frozenset[int], ...]
    wants_gradient: frozenset[int]

    @property
    def placed(self) -> tuple[int, ...]:
        """Live nodes that belong to exactly one stage."""
        return tuple(n for n in self.live if n not in self.replicated)


def analyse(recording: Recording, *, outputs: bool) -> Dataflow:
    """Understand ``recording`` for a training step (its goal is the loss), or with ``outputs`` for the whole output."""
    goals = tuple(dict.fromkeys(refs(recording.output) if outputs else ()))
    if recording.loss is not None and recording.loss not in goals:
        goals += (recording.loss,)
    if not goals:
        raise CaptureError("the model has no loss: its output has no scalar `loss`; pass loss_fn=")
    writers = _writers(recording)
    _refuse_changed_parameters(recording, writers)
    before = {index: _before(recording, node, index, writers) for index, node in enumerate(recording.nodes)}
    live = _live(recording, goals, before, writers)
    wants = _gradient_path(recording, goals, live) if not outputs else frozenset()
    replicated = _replicated(recording, live, writers, before)
    groups = _groups(recording, live, replicated, writers)
    return Dataflow(recording, goals, live, replicated, before, groups, wants)


def _refuse_changed_parameters(recording: Recording, writers: Mapping[int, Sequence[int]]) -> None:
    """Other micro-batches are in flight, and will need a parameter as it was for their backward."""
    for value in recording.values:
        if value.kind == "attribute" and value.storage in writers and value.name not in recording.buffers \
                and not all(_is_idempotent(recording.nodes[index]) for index in writers[value.storage]):
            node = recording.nodes[writers[value.storage][0]]
            raise CaptureError(f"the forward changes the parameter {value.name} in place (at {node.name}), while other "
                               "micro-batches need it as it was; make it a buffer, or change it between steps")


def _is_idempotent(node: Node) -> bool:
    """Whether the node clamps to fixed bounds: the second micro-batch finds what the first one has left."""
    return getattr(node.target, "__name__", "") in _CLAMPS and len(list(node_refs(node))) == 1


def unstable_guard(recording: Recording) -> Guard | None:
    """A guard that looks at a buffer which the forward itself changes: it cannot be known before the step."""
    writers = _writers(recording)
    if not writers:
        return None
    for guard in recording.guards:
        waiting = [*refs(guard.args), *refs(guard.kwargs)]
        seen: set[int] = set()
        while waiting:
            value = waiting.pop()
            if value in seen:
                continue
            seen.add(value)
            made = recording.values[value]
            if made.kind == "attribute" and made.storage in writers:
                return guard
            if made.node >= 0:
                waiting.extend(node_refs(recording.nodes[made.node]))
    return None


def _writers(recording: Recording) -> dict[int, list[int]]:
    """Storage -> the nodes that change it in place, in order."""
    found = defaultdict(list)
    for index, node in enumerate(recording.nodes):
        for storage in node.writes:
            found[storage].append(index)
    return dict(found)


def _before(recording: Recording, node: Node, index: int, writers: dict[int, list[int]]) -> tuple[int, ...]:
    """Nodes whose effect ``node`` sees: producers of what it reads, and earlier writers to the same memory."""
    nodes = set()
    for value in node_refs(node):
        entry = recording.values[value]
        if entry.node >= 0:
            nodes.add(entry.node)
        nodes.update(w for w in writers.get(entry.storage, ()) if w < index)
    return tuple(sorted(nodes))


def _live(recording, goals, before, writers) -> tuple[int, ...]:
    kept = {recording.values[value].storage for value in range(len(recording.values))
            if recording.values[value].kind in ("attribute", "constant")}
    roots = {recording.values[value].node for value in goals if recording.values[value].node >= 0}
    roots |= {w for value in goals for w in writers.get(recording.values[value].storage, ())}
    roots |= {index for index, node in enumerate(recording.nodes) if node.writes & kept}
    needed: set[int] = set()
    waiting = sorted(roots)
    while waiting:
        index = waiting.pop()
        if index in needed:
            continue
        needed.add(index)
        waiting.extend(before[index])
        for value in recording.nodes[index].results:
            waiting.extend(writers.get(recording.values[value].storage, ()))
    # Hooks set on a tensor that matters, matter.
    for index, node in enumerate(recording.nodes):
        if node.effect and index not in needed and set(before[index]) & needed:
            needed.add(index)
    return tuple(sorted(needed))


def _gradient_path(recording: Recording, goals, live) -> frozenset[int]:
    """Values from which a gradient can flow to the loss."""
    values = recording.values
    on_path = {value for value in goals if values[value].spec.requires_grad}
    storages = {values[value].storage for value in on_path}
    for index in reversed(live):
        node = recording.nodes[index]
        reaches = any(v in on_path or (values[v].spec.requires_grad and values[v].storage in storages)
                      for v in node.results)
        if not (reaches or node.writes & storages):
            continue
        for value in node_refs(node):
            if values[value].spec.requires_grad:
                on_path.add(value)
                storages.add(values[value].storage)
    return frozenset(on_path)


def _replicated(recording: Recording, live, writers, before) -> frozenset[int]:
    """Live nodes that any stage may compute for itself."""
    values = recording.values
    total = sum(node.cost.flops for node in recording.nodes)
    replicated: set[int] = set()

    def is_given(value: int) -> bool:
        entry = values[value]
        if entry.kind == "result":
            return entry.node in replicated
        if entry.kind == "attribute":
            return (not entry.spec.requires_grad and entry.name in recording.buffers and entry.storage not in writers
                    and entry.spec.bytes <= _SMALL_BUFFER_BYTES)
        return entry.kind == "input" or entry.storage not in writers

    for index in live:
        node = recording.nodes[index]
        if (all(is_given(value) for value in node_refs(node)) and not node.effect
                and not any(values[v].spec.requires_grad for v in node.results)
                and not (node.is_module and node.target in recording.leaf_modules)
                and node.cost.flops <= _CHEAP_SHARE * total):
            replicated.add(index)
    return _drop_written(recording, replicated, writers, before)


def _drop_written(recording, replicated: set[int], writers, before) -> frozenset[int]:
    """A value that a placed node writes to is not replicated, nor is anything made from it."""
    values = recording.values
    while True:
        spoiled = {index for index in replicated
                   if any(w not in replicated
                          for v in (*recording.nodes[index].results, *node_refs(recording.nodes[index]))
                          for w in writers.get(values[v].storage, ()))
                   or any(p not in replicated for p in before[index])}
        if not spoiled:
            return frozenset(replicated)
        replicated -= spoiled


def _groups(recording, live, replicated, writers) -> tuple[frozenset[int], ...]:
    """Nodes around memory that changes: who touches it up to the last change stays together; where it is an input that
    a placed node changes, who touches it at all: inputs do not travel.
    """
    touching = defaultdict(list)
    for index in live:
        node = recording.nodes[index]
        for value in (*node_refs(node), *node.results):
            touching[recording.values[value].storage].append(index)
    kept = {v.storage for v in recording.values if v.kind in ("attribute", "constant")}
    kept |= {v.storage for v in recording.values if v.kind == "input"
             and not replicated.issuperset(writers.get(v.storage, ()))}
    found = []
    for storage, changes in writers.items():
        last = len(recording.nodes) if storage in kept else changes[-1]
        group = frozenset(i for i in touching.get(storage, ()) if i <= last and i not in replicated)
        if len(group) > 1:
            found.append(group)
    return tuple(found)
