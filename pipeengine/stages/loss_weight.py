"""What a micro-batch's loss counts for, read from the recorded loss."""
from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeengine.rng import RngStreams
from pipeengine.stages.guards import needed_nodes, value_function
from pipeengine.tracing import Dataflow, Node, Recording, Ref, node_refs

_PASSED_ON = {
    "to",
    "float",
    "double",
    "view",
    "reshape",
    "squeeze",
    "mul",
    "__mul__",
    "__rmul__",
    "add",
    "__add__",
    "__radd__",
    "__truediv__",
    "div",
    "clone",
    "type",
    "contiguous",
    "mean",
    "sum",
}


def target_count(flow: Dataflow, model: torch.nn.Module):
    """For a mean cross-entropy: a function that counts a micro-batch's targets that are not ignored. Otherwise None."""
    found = _cross_entropy(flow, model)
    if found is None:
        return None
    target, ignored, weight = found
    values = flow.recording.values
    nodes = needed_nodes(flow, {target}, len(flow.recording.nodes))
    if any(n not in flow.replicated for n in nodes) or values[target].spec.dtype.is_floating_point:
        return None
    run, _ = value_function(flow, model, [target], nodes, RngStreams(torch.device("cpu")))

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
