"""Whether a batch's ids and class numbers lie within the tables that they are looked up in, asked before a step.

A step that failed in the middle would close the pipeline, and on an accelerator end the process.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pipeengine.errors import InputError
from pipeengine.tracing import Dataflow, Node, Ref

# What gives every entry of its tensor, and at most adds some.
_ARRANGING = frozenset({"flatten", "view", "reshape", "contiguous", "clone", "detach", "squeeze", "unsqueeze",
                        "transpose", "permute", "long"})
_CLASS_NUMBERS = (torch.int64, torch.uint8)


@dataclass(frozen=True)
class Lookup:
    """Entries of input ``index`` are to be at least 0 and below ``size``, but for ``besides``; ``where`` reads them."""

    index: int
    size: int
    besides: int | None
    where: str


def find_lookups(flow: Dataflow, model: torch.nn.Module) -> tuple[Lookup, ...]:
    """Those lookups in embeddings and cross-entropies whose every index is an entry of an input as it was given."""
    recording = flow.recording
    written = {storage for node in recording.nodes for storage in node.writes}
    at = {value: index for index, value in enumerate(recording.inputs)}
    found: dict[tuple[int, int], Lookup] = {}
    for number in flow.live:
        node = recording.nodes[number]
        for ref, size, besides in _reads(node, flow, model):
            value = _given(flow, ref.value)
            if value in at and recording.values[value].storage not in written \
                    and not recording.values[value].spec.dtype.is_floating_point:
                found.setdefault((at[value], size), Lookup(at[value], size, besides, node.name))
    return tuple(found.values())


def check_lookups(lookups: Sequence[Lookup], tensors: Sequence[torch.Tensor]) -> None:
    """Raise ``InputError`` for the first entry of a batch's ``tensors`` that a lookup would not find.

    Only tensors on the CPU are looked at: to wait for an accelerator would cost more than the step may.
    """
    for lookup in lookups:
        tensor = tensors[lookup.index]
        if tensor.device.type != "cpu" or not tensor.numel():
            continue
        least, most = (int(bound) for bound in tensor.aminmax())
        if most >= lookup.size or least < 0 and least != lookup.besides:
            wrong = most if most >= lookup.size else least
            raise InputError(f"a tensor of shape {tuple(tensor.shape)} holds {wrong}, and {lookup.where} has entries 0 "
                             f"to {lookup.size - 1}; is the vocabulary, or the number of classes, that of the data?")


def _reads(node: Node, flow: Dataflow, model: torch.nn.Module) -> Iterator[tuple[Ref, int, int | None]]:
    """What this node looks up where: the value, how many entries there are, and an index that is left out."""
    values = flow.recording.values
    arguments = dict(zip(("input", "other"), node.args)) | node.kwargs
    if node.is_module:
        module = model.get_submodule(str(node.target))
        if type(module) is torch.nn.Embedding and isinstance(arguments.get("input"), Ref):
            yield arguments["input"], module.num_embeddings, None
    elif node.target is F.embedding:
        table = arguments.get("weight", arguments.get("other"))
        if isinstance(table, Ref) and isinstance(arguments.get("input"), Ref):
            yield arguments["input"], values[table.value].spec.shape[0], None
    elif node.target in (F.cross_entropy, F.nll_loss):
        target = arguments.get("target", arguments.get("other"))
        ignored = node.args[4] if len(node.args) > 4 else node.kwargs.get("ignore_index", -100)
        if isinstance(target, Ref) and isinstance(arguments.get("input"), Ref):
            shape = values[arguments["input"].value].spec.shape
            spec = values[target.value].spec
            if not spec.dtype.is_floating_point and spec.dtype not in _CLASS_NUMBERS:
                raise InputError(f"the class numbers for {node.name} are {spec.dtype}, and torch takes torch.int64; "
                                 "pass target.long()")
            yield target, shape[1 if len(shape) > 1 else 0], ignored


def _given(flow: Dataflow, value: int) -> int:
    """The value that has the entries of ``value``, before they were arranged."""
    made = flow.recording.values[value]
    while made.node >= 0:
        node = flow.recording.nodes[made.node]
        if getattr(node.target, "__name__", "") not in _ARRANGING or not isinstance(node.args[0], Ref):
            break
        value = node.args[0].value
        made = flow.recording.values[value]
    return value
