"""Whether a micro-batch takes the path that was recorded."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy
import torch

from pipeengine.rng import RngStreams
from pipeengine.stages.codegen import compile_part
from pipeengine.stages.splitting import Part
from pipeengine.tracing import Dataflow, fill, node_refs, refs


def needed_nodes(flow: Dataflow, values: set[int], until: int) -> list[int]:
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


def value_function(flow: Dataflow, model: torch.nn.Module, values: list[int], nodes: list[int], rng: RngStreams):
    """A function of a micro-batch's tensors that computes ``values``."""
    recording = flow.recording
    chosen = tuple(recording.nodes[n] for n in nodes)
    read = {v for node in chosen for v in node_refs(node)} | set(values)
    inputs = tuple(sorted(v for v in read if recording.values[v].kind == "input"))
    compiled = compile_part(Part(-1, chosen, inputs, (), (), tuple(values), frozenset()), recording, model, rng)

    def run(tensors: Sequence[torch.Tensor]) -> tuple:
        return compiled.run(*[tensors[i] for i in compiled.inputs])
    return run, compiled.random


def guard_nodes(flow: Dataflow) -> list[int]:
    """Nodes that must run to evaluate every guard, in order."""
    return sorted({n for guard in flow.recording.guards
                   for n in needed_nodes(flow, {*refs(guard.args), *refs(guard.kwargs)}, guard.position)})


def guard_check(flow: Dataflow, model: torch.nn.Module, rng: RngStreams):
    """A function that tells whether a micro-batch takes the recorded path, or None when every one does."""
    guards = flow.recording.guards
    if not guards:
        return None
    values = list(dict.fromkeys(v for guard in guards for v in (*refs(guard.args), *refs(guard.kwargs))))
    nodes = guard_nodes(flow)
    run, random = value_function(flow, model, values, nodes, rng)

    def holds(tensors: Sequence[torch.Tensor], key: int | None) -> bool:
        with torch.no_grad():
            states = rng.enter(key) if random else None
            try:
                found = dict(zip(values, run(tensors)))
                return all(_holds(guard, found) for guard in guards)
            except Exception:       # another path may not even have these shapes
                return False
            finally:
                rng.leave(states)
    return holds


def _holds(guard, found: Mapping[int, torch.Tensor]) -> bool:
    args, kwargs = fill(guard.args, found.__getitem__), fill(guard.kwargs, found.__getitem__)
    if guard.target is None:
        return tuple(args[0].shape) == guard.expected
    result = guard.target(*args, **kwargs)
    if isinstance(result, numpy.ndarray):
        return numpy.array_equal(result, guard.expected)
    return type(result) is type(guard.expected) and bool(result == guard.expected)
