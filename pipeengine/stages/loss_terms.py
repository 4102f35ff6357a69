"""The recorded loss as a sum of terms, and what each of them is divided by.

A loss is read from its end: sums and differences of scalars separate terms, factors on the way are collected, and a
term ends at a reduction over rows (``sum``, ``mean``, a loss function). Two recordings of one model are read side by
side, of a micro-batch and of the full batch: where both have the same shape, there are no rows to add up.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from pipeengine.stages.guards import needed_nodes
from pipeengine.torch_private import LossModule
from pipeengine.tracing import Dataflow, Node, Ref, node_refs

_PASSED_ON = {"to", "float", "double", "half", "bfloat16", "view", "reshape", "squeeze", "unsqueeze", "clone", "type",
              "type_as", "contiguous", "neg", "positive", "flatten", "cpu", "cuda"}
_ADDED = {"add", "iadd", "radd", "sub", "isub", "rsub", "subtract"}
# Means over targets that count. The linear one is younger than the oldest torch that is known to work.
_COUNTING = tuple(getattr(torch.nn.functional, name) for name in ("cross_entropy", "nll_loss", "linear_cross_entropy")
                  if hasattr(torch.nn.functional, name))
_MULTIPLIED, _DIVIDED = {"mul", "imul", "rmul", "multiply"}, {"div", "truediv", "itruediv", "divide", "true_divide"}


@dataclass(frozen=True)
class Count:
    """Targets of a mean cross-entropy: values of the targets and of their classes' weights, and the target that does
    not count.
    """

    target: int
    ignored: int
    weight: int | torch.Tensor | None


@dataclass(frozen=True)
class Factor:
    """What a term is divided by (``power`` 1) or multiplied with (-1), in the micro-batch and in the full batch.

    Each is a number, a ``Ref`` to a value that follows from the inputs, or a ``Count``.
    """

    micro: float | Ref | Count
    full: float | Ref | Count
    power: int = 1


@dataclass(frozen=True)
class Term:
    """A scalar that the loss adds up. Times its factors it is a sum over rows, unless ``kind`` is ``"same"`` (it does
    not depend
    on the batch) or ``"unknown"``. ``slot``: the node of the micro-batch's recording that adds it, and which operand it
    is."""

    kind: str
    factors: tuple[Factor, ...]
    slot: tuple[int, int] | None


def find_terms(micro: Dataflow, full: Dataflow, model: torch.nn.Module) -> tuple[Term, ...]:
    """The terms of the loss, in order. ``slot`` is the same for every ``full``, ``micro`` itself included."""
    if micro.recording.loss is None or full.recording.loss is None:
        return ()
    reader = _Reader(micro, full, model)
    start = _Place(micro.recording.loss, full.recording.loss, len(micro.recording.nodes), len(full.recording.nodes))
    return tuple(reader.read(start, (), None))


def operands(node: Node) -> tuple | None:
    """What a node adds up or stacks; None when it is called in a way that is not read here."""
    name = _name(node)
    if name == "stack" and stacks(node):
        return tuple(node.args[0])
    return node.args if name in _ADDED and len(node.args) == 2 and not node.kwargs else None


def stacks(node: Node) -> bool:
    """Whether its first argument is a sequence of tensors."""
    return bool(node.args) and isinstance(node.args[0], (tuple, list)) and not isinstance(node.args[0], Ref)


def _name(node: Node) -> str:
    return "" if node.is_module else getattr(node.target, "__name__", "").strip("_")


@dataclass(frozen=True)
class _Place:
    """A value in both recordings, as it was after so many nodes."""

    micro: int
    full: int
    micro_end: int
    full_end: int


class _Reader:
    def __init__(self, micro: Dataflow, full: Dataflow, model: torch.nn.Module):
        self._micro, self._full, self._model = micro, full, model

    def read(self, place: _Place, factors: tuple[Factor, ...], slot) -> list[Term]:
        """The terms of the value at ``place``, all of them divided by ``factors``."""
        if not _depends_on_rows(self._micro, place.micro):
            return [Term("same", factors, slot)]
        index, other = (
            self._last_step(self._micro, place.micro, place.micro_end),
            self._last_step(self._full, place.full, place.full_end),
        )
        unknown = [Term("unknown", factors, slot)]
        if index < 0 or other < 0:
            return unknown
        node, twin = self._micro.recording.nodes[index], self._full.recording.nodes[other]
        if node.name != twin.name or node.is_module != twin.is_module or len(node.args) != len(twin.args):
            return unknown
        end = replace(place, micro_end=index, full_end=other)
        name = _name(node)
        if name in ("sum", "mean"):
            return self._read_reduction(node, twin, end, factors, slot) or unknown
        if name in _ADDED and self._shape(place) == ():
            return self._read_sum(node, twin, index, end, factors) or unknown
        if name in _PASSED_ON or name in _MULTIPLIED or name in _DIVIDED:
            return self._read_factor(node, twin, end, factors, slot) or unknown
        return self._read_loss(node, twin, factors, slot) or unknown

    def _shape(self, place: _Place) -> tuple[int, ...]:
        return self._micro.recording.values[place.micro].spec.shape

    @staticmethod
    def _last_step(flow: Dataflow, value: int, end: int) -> int:
        """The last of the first ``end`` nodes that made the value or changed it in place; -1 where not known."""
        recording = flow.recording
        entry = recording.values[value]
        changes = [n for n in range(max(entry.node, 0), end) if entry.storage in recording.nodes[n].writes]
        if not changes or changes[-1] == entry.node:
            return entry.node
        node = recording.nodes[changes[-1]]
        first = node.args[0] if node.args else None
        known = (
            not node.is_module
            and isinstance(first, Ref)
            and recording.values[first.value].storage == entry.storage
            and recording.values[first.value].spec.shape == entry.spec.shape == ()
        )
        return changes[-1] if known else -1

    def _read_sum(self, node: Node, twin: Node, index: int, end: _Place, factors) -> list[Term] | None:
        ours, theirs = operands(node), operands(twin)
        if ours is None or theirs is None or len(ours) != len(theirs) or self._readers(node) > 1:
            return None
        terms: list[Term] = []
        for position, (a, b) in enumerate(zip(ours, theirs)):
            if isinstance(a, Ref) and isinstance(b, Ref):
                if self._micro.recording.values[a.value].spec.shape != ():
                    return None
                terms += self.read(replace(end, micro=a.value, full=b.value), factors, (index, position))
            elif a != 0:
                terms.append(Term("same", factors, (index, position)))
        return terms

    def _readers(self, node: Node) -> int:
        """How many nodes read what ``node`` makes: to others, its terms must stay as they are."""
        made = set(node.results)
        return sum(not made.isdisjoint(node_refs(self._micro.recording.nodes[n])) for n in self._micro.live)

    def _read_reduction(self, node: Node, twin: Node, end: _Place, factors, slot) -> list[Term] | None:
        a, b = _argument(node, 0, "input"), _argument(twin, 0, "input")
        if not isinstance(a, Ref) or not isinstance(b, Ref):
            return None
        values, others = self._micro.recording.values, self._full.recording.values
        below = replace(end, micro=a.value, full=b.value)
        stacked = values[a.value].node
        if (
            stacked >= 0
            and operands(self._micro.recording.nodes[stacked])
            and values[a.value].spec.shape
            and _name(self._micro.recording.nodes[stacked]) not in _ADDED
        ):
            return self._read_sum(
                self._micro.recording.nodes[stacked],
                self._full.recording.nodes[others[b.value].node],
                stacked,
                below,
                factors,
            )
        chosen = _chooser(self._micro, a.value)
        if _name(node) == "mean":
            factor = self._size(a, b, _numel(values, node.results[0]), _numel(others, twin.results[0]))
            if factor is None:
                return None
            factors += (factor,)
        if values[a.value].spec.shape != others[b.value].spec.shape or chosen is not None or self._micro is self._full:
            return [Term("sum", factors, slot)]
        return self.read(below, factors, slot)

    def _size(self, a: Ref, b: Ref, kept: int = 1, kept_full: int = 1) -> Factor | None:
        """The entries that a mean over ``a`` (``b`` in the full batch) divides by, when ``kept`` of its results are
        left.
        """
        mask, full_mask = _chooser(self._micro, a.value), _chooser(self._full, b.value)
        if (mask is None) != (full_mask is None):
            return None
        if mask is None:
            return Factor(
                _numel(self._micro.recording.values, a.value) * kept_full,
                _numel(self._full.recording.values, b.value) * kept,
            )
        if kept != 1 or not _follows_from_inputs(self._micro, mask) or not _follows_from_inputs(self._full, full_mask):
            return None
        return Factor(Count(mask, False, None), Count(full_mask, False, None))

    def _read_factor(self, node: Node, twin: Node, end: _Place, factors, slot) -> list[Term] | None:
        name = _name(node)
        if name in _PASSED_ON:
            a, b = _argument(node, 0, "input"), _argument(twin, 0, "input")
            return (
                self.read(replace(end, micro=a.value, full=b.value), factors, slot)
                if isinstance(a, Ref) and isinstance(b, Ref)
                else None
            )
        if len(node.args) != 2 or node.kwargs:
            return None
        for scaled, by in ((0, 1), (1, 0)) if name in _MULTIPLIED else ((0, 1),):
            a, b = node.args[scaled], twin.args[scaled]
            factor = self._factor(node.args[by], twin.args[by], -1 if name in _MULTIPLIED else 1)
            if (
                factor is not None
                and isinstance(a, Ref)
                and isinstance(b, Ref)
                and _depends_on_rows(self._micro, a.value)
            ):
                return self.read(replace(end, micro=a.value, full=b.value), (*factors, *factor), slot)
        return None

    def _factor(self, a: object, b: object, power: int) -> tuple[Factor, ...] | None:
        """What multiplies or divides, if it is known before the first forward or the same for every micro-batch."""
        if not isinstance(a, Ref) or not isinstance(b, Ref):
            return (Factor(a, b, power),) if isinstance(a, (int, float)) and isinstance(b, (int, float)) else None
        if self._micro.recording.values[a.value].spec.shape != ():
            return None
        if not _depends_on_rows(self._micro, a.value):
            return ()
        if _follows_from_inputs(self._micro, a.value) and _follows_from_inputs(self._full, b.value):
            return (Factor(a, b, power),)
        return None

    def _read_loss(self, node: Node, twin: Node, factors, slot) -> list[Term] | None:
        """A loss function with a reduction of its own."""
        call, other = _loss_call(node, self._model), _loss_call(twin, self._model)
        if call is None or other is None or call.get("reduction") != other.get("reduction"):
            return None
        if call["reduction"] == "sum":
            return [Term("sum", factors, slot)]
        if call["reduction"] not in ("mean", "batchmean") or not isinstance(call["input"], Ref):
            return None
        values, others = self._micro.recording.values, self._full.recording.values
        shape, whole = values[call["input"].value].spec.shape, others[other["input"].value].spec.shape
        factor = (
            Factor(shape[0], whole[0])
            if call["reduction"] == "batchmean"
            else self._size(call["input"], other["input"])
        )
        if (
            call["counts"]
            and isinstance(call["target"], Ref)
            and not values[call["target"].value].spec.dtype.is_floating_point
        ):
            if not _is_counted(self._micro, call) or not _is_counted(self._full, other):
                return None
            factor = Factor(_count(call), _count(other))
        return None if factor is None else [Term("sum", (*factors, factor), slot)]


def _argument(node: Node, position: int, name: str) -> object:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _numel(values: Sequence, value: int) -> int:
    return torch.Size(values[value].spec.shape).numel()


def _chooser(flow: Dataflow, value: int) -> int | None:
    """The mask by which the entries of a value were chosen: their number is another for every batch, whatever the
    recording says.
    """
    values = flow.recording.values
    length = values[value].spec.shape[:1]
    while values[value].node >= 0 and values[value].spec.shape[:1] == length:
        node = flow.recording.nodes[values[value].node]
        given = [v for v in node_refs(node) if values[v].spec.shape]
        if (
            _name(node) in ("getitem", "masked_select")
            and len(node.args) > 1
            and isinstance(node.args[1], Ref)
            and values[node.args[1].value].spec.dtype == torch.bool
        ):
            return node.args[1].value
        following = [v for v in given if values[v].spec.shape[:1] == length]
        if not following:
            return None
        value = following[0]
    return None


def _loss_call(node: Node, model: torch.nn.Module) -> dict | None:
    """Input, target, reduction, class weights and ignored index of a loss function of torch; ``counts`` where those
    matter.
    """
    if node.is_module:
        module = model.get_submodule(node.target)
        reduction = getattr(module, "reduction", None)
        if not isinstance(module, LossModule) or len(node.args) < 2:
            return None
        counts = isinstance(module, (torch.nn.CrossEntropyLoss, torch.nn.NLLLoss))
        return {
            "input": node.args[0],
            "target": node.args[1],
            "reduction": reduction,
            "counts": counts,
            "weight": getattr(module, "weight", None),
            "ignore_index": getattr(module, "ignore_index", -100),
        }
    function = torch.nn.functional
    if getattr(function, getattr(node.target, "__name__", ""), None) is not node.target:
        return None
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return None
    bound.apply_defaults()
    arguments = bound.arguments
    if "reduction" not in arguments or arguments.get("reduce") is not None or arguments.get("size_average") is not None:
        return None
    if arguments.get("ignore_index", -100) is None:     # a linear cross-entropy's default
        arguments["ignore_index"] = -100
    return {
        "weight": None,
        "ignore_index": -100,
        "target": None,
        **arguments,
        "input": next(iter(arguments.values())),
        "counts": node.target in _COUNTING,
    }


def _is_counted(flow: Dataflow, call: dict) -> bool:
    weight = call["weight"]
    return _follows_from_inputs(flow, call["target"].value) and (
        not isinstance(weight, Ref) or _follows_from_inputs(flow, weight.value)
    )


def _count(call: dict) -> Count:
    weight = call["weight"]
    return Count(call["target"].value, call["ignore_index"], weight.value if isinstance(weight, Ref) else weight)


def _follows_from_inputs(flow: Dataflow, value: int) -> bool:
    """Whether every worker can compute the value from the inputs, before the first forward."""
    made = flow.recording.values[value]
    if made.kind == "attribute":
        return made.name in flow.recording.buffers
    return all(n in flow.replicated for n in needed_nodes(flow, {value}, len(flow.recording.nodes)))


def _depends_on_rows(flow: Dataflow, value: int) -> bool:
    """Whether an input with at least one dimension has a part in the value."""
    values = flow.recording.values
    nodes = needed_nodes(flow, {value}, len(flow.recording.nodes))
    read = {value, *(v for n in nodes for v in node_refs(flow.recording.nodes[n]))}
    return any(values[v].kind == "input" and values[v].spec.shape for v in read)
