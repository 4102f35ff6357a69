"""What each micro-batch's loss counts for, so that the weighted sum is the loss of the full batch.

A term that is a sum weighs 1; one that is divided by something weighs what it is divided by, as a share of what the
full batch's is divided by. Terms with different weights get them where the loss adds them up.
"""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from pipeengine.rng import RngStreams
from pipeengine.stages.guards import guard_check, needed_nodes, value_function
from pipeengine.stages.loss_terms import Count, Term, find_terms, operands, stacks
from pipeengine.tracing import (
    Dataflow,
    Inputs,
    Node,
    Recording,
    Ref,
    TensorSpec,
    Value,
    analyse,
    capture,
    usable_loss,
)

_MOST = 128
Evaluate = Callable[[Sequence[torch.Tensor]], float]


@dataclass(frozen=True)
class Weights:
    """``loss[i]``: what the loss of micro-batch i counts for; ``terms[i]``: what each of its terms does besides
    (0-dimensional, float64; empty where the loss is one term)."""

    loss: tuple[float, ...]
    terms: tuple[tuple[torch.Tensor, ...], ...]


def target_count(flow: Dataflow, model: torch.nn.Module) -> Evaluate | None:
    """For a plain mean cross-entropy: a function that counts a micro-batch's targets that are not ignored. Otherwise
    None.

    Then the full batch's count is the sum, and the full batch need not be recorded.
    """
    terms = find_terms(flow, flow, model)
    if len(terms) != 1 or len(terms[0].factors) != 1 or not isinstance(terms[0].factors[0].micro, Count):
        return None
    return _evaluator(flow, model, terms[0].factors[0].micro)


def weigh_terms(recording: Recording, terms: Sequence[Term]) -> tuple[Recording, frozenset[int]]:
    """The recording with one more input for the weight of each term, where there are several; and the nodes that take
    them.
    """
    if len(terms) < 2 or any(term.slot is None for term in terms):
        return recording, frozenset()
    values, nodes = list(recording.values), list(recording.nodes)
    taken: dict[int, dict[int, Ref]] = {}
    for number, term in enumerate(terms):
        index, position = term.slot
        taken.setdefault(index, {})[position] = Ref(len(values))
        spec = TensorSpec((), torch.float64, (), False)
        values.append(Value("input", f"weight of term {number}", -1, spec, -1 - number))
    for index, at in taken.items():
        node = nodes[index]
        weights = tuple(at.get(position) for position in range(len(operands(node))))
        nodes[index] = replace(node, target=_weighted(node), kwargs={**node.kwargs, "weights": weights})
    inputs = (*recording.inputs, *range(len(recording.values), len(values)))
    return replace(recording, values=tuple(values), nodes=tuple(nodes), inputs=inputs), frozenset(taken)


def _weighted(node: Node) -> Callable:
    target, in_place, is_stack = node.target, bool(node.writes), stacks(node)

    def weighted(*args, weights: tuple[torch.Tensor | None, ...], **kwargs):
        given = args[0] if is_stack else args
        scaled = [
            value if weight is None else _scaled(value, weight, in_place and not position)
            for position, (value, weight) in enumerate(zip(given, weights))
        ]
        return target(scaled, *args[1:], **kwargs) if is_stack else target(*scaled, **kwargs)

    weighted.__name__ = getattr(target, "__name__", "weighted")
    return weighted


def _scaled(value: torch.Tensor | float, weight: torch.Tensor, in_place: bool) -> torch.Tensor | float:
    """``value`` times ``weight``. What weighs nothing is nothing, also where it is not a number (a mean over no
    targets).
    """
    if not isinstance(value, torch.Tensor):
        return value * float(weight)
    if not weight:
        return (
            value.masked_fill_(torch.ones_like(value, dtype=torch.bool), 0)
            if in_place
            else value.masked_fill(torch.ones_like(value, dtype=torch.bool), 0)
        )
    weight = weight.to(value)
    return value.mul_(weight) if in_place else value * weight


class TermWeights:
    """Weighs micro-batches of one kind against full batches of one kind: ``share(...)`` for each micro-batch."""

    def __init__(self, micro: Dataflow, full: Dataflow, model: torch.nn.Module):
        self._terms = find_terms(micro, full, model)
        alike = find_terms(micro, micro, model)
        if [term.slot for term in alike] != [term.slot for term in self._terms]:
            # The full batch takes another path: what its terms are divided by says nothing here.
            self._terms = tuple(Term("unknown", (), term.slot) for term in alike)
        self._micro = [[_evaluator(micro, model, factor.micro) for factor in term.factors] for term in self._terms]
        self._full = [[_evaluator(full, model, factor.full) for factor in term.factors] for term in self._terms]

    def share(self, part: Sequence[torch.Tensor], whole: Sequence[torch.Tensor], rows: float) -> tuple[float, ...]:
        """What each term of the micro-batch ``part`` counts for in the full batch ``whole``; ``rows`` is its share of
        rows.
        """
        return tuple(self._share(*term, part, whole, rows) for term in zip(self._terms, self._micro, self._full))

    @staticmethod
    def _share(term: Term, micro, full, part, whole, rows: float) -> float:
        if term.kind != "sum":
            return rows  # no number is known that would be better
        above, below = 1, 1
        for factor, ours, theirs in zip(term.factors, micro, full):
            a, b = ours(part), theirs(whole)
            if factor.power < 0:
                a, b = b, a
            if a != b:
                above, below = above * a, below * b
        return above / below if below and math.isfinite(below) and math.isfinite(above) else rows


def as_weights(shares: Sequence[tuple[float, ...]], rows: Sequence[float]) -> Weights:
    """One weight of each micro-batch's whole loss, and of its terms relative to that: 1 exactly where all weigh the
    same.
    """
    loss = [max(share, key=abs, default=row) for share, row in zip(shares, rows)]
    terms = [
        tuple(torch.tensor(value / whole if whole else 1.0, dtype=torch.float64) for value in share)
        if len(share) > 1
        else ()
        for share, whole in zip(shares, loss)
    ]
    return Weights(tuple(loss), tuple(terms))


def even_weights(raw: Sequence[float], sizes: Sequence[int], num_terms: Sequence[int]) -> Weights:
    """Each micro-batch's share of ``raw`` (of the rows ``sizes`` where ``raw`` adds up to 0), the same for all of its
    terms.
    """
    total = sum(raw)
    loss = [value / total for value in raw] if total else [size / sum(sizes) for size in sizes]
    return as_weights([(weight,) * max(1, count) for weight, count in zip(loss, num_terms)], loss)


Kind = tuple[Dataflow, tuple[Term, ...], Evaluate | None]


class LossWeights:
    """Weighs the micro-batches of one model; remembers the kinds of full batches that have come by."""

    def __init__(self, model: torch.nn.Module, loss_fn: Callable | None, device: torch.device, rng: RngStreams):
        self._model, self._loss_fn, self._device, self._rng = model, loss_fn, device, rng
        self._full: OrderedDict[tuple, tuple[Dataflow | None, Callable | None]] = OrderedDict()
        self._pairs: dict[tuple[int, int], tuple[Dataflow, Dataflow | None, TermWeights]] = {}

    def weigh(
        self,
        key: tuple,
        kinds: Sequence[Kind],
        parts: Sequence[Sequence[torch.Tensor]],
        sizes: Sequence[int],
        whole: Callable[[], Sequence[torch.Tensor]],
        again: Callable[[Sequence[torch.Tensor]], Inputs],
        leaf_modules: Mapping[str, str],
    ) -> Weights:
        """``kinds[i]``: flow, terms and counter of targets of micro-batch i; ``whole()``: tensors of the full batch of
        kind ``key``, asked for only where they are needed; ``again`` puts them into its inputs.
        """
        num_terms = [len(terms) for _, terms, _ in kinds]
        if len(parts) == 1 or not any(term.kind == "sum" for _, terms, _ in kinds for term in terms):
            return even_weights(sizes, sizes, num_terms)
        if all(count is not None for _, _, count in kinds):
            return even_weights([count(part) for (_, _, count), part in zip(kinds, parts)], sizes, num_terms)
        tensors = whole()
        full = self._full_batch(key, tensors, again, leaf_modules)
        if full is None:
            return even_weights(sizes, sizes, num_terms)
        rows = [size / sum(sizes) for size in sizes]
        return as_weights(
            [self._pair(flow, full).share(part, tensors, row) for (flow, _, _), part, row in zip(kinds, parts, rows)],
            rows,
        )

    def _full_batch(self, key, whole, again, leaf_modules) -> Dataflow | None:
        """The full batch's recording; None where it cannot be recorded, which leaves the shares of rows."""
        key = key, tuple(tuple(tensor.shape) for tensor in whole)
        known = self._full.get(key)
        if known is not None and (known[1] is None or known[1](whole, 0)):
            return known[0]
        given = again(whole)
        try:
            with warnings.catch_warnings(action="ignore"):
                recording = capture(
                    self._model,
                    given,
                    loss_fn=usable_loss(self._loss_fn, given),
                    device=self._device,
                    known_leaf_modules=leaf_modules,
                )
            flow = analyse(recording, outputs=False)
            entry = flow, guard_check(flow, self._model, self._rng)
        except Exception:       # the model never sees this batch whole: it may not even be able to take it
            entry = None, None
        self._full[key] = entry
        while len(self._full) > _MOST:
            self._full.popitem(last=False)
        return entry[0]

    def _pair(self, micro: Dataflow, full: Dataflow) -> TermWeights:
        key = id(micro), id(full)
        if key not in self._pairs:
            if len(self._pairs) >= _MOST:
                self._pairs.clear()
            self._pairs[key] = micro, full, TermWeights(micro, full, self._model)  # kept, so that no id is used twice
        return self._pairs[key][2]


def _evaluator(flow: Dataflow, model: torch.nn.Module, what: float | Ref | Count) -> Evaluate:
    """A function of a batch's tensors that computes a number, a scalar or the count of targets."""
    if not isinstance(what, (Ref, Count)):
        return lambda tensors: what
    weight = what.weight if isinstance(what, Count) else None
    wanted = [what.target] + ([weight] if isinstance(weight, int) else []) if isinstance(what, Count) else [what.value]
    nodes = needed_nodes(flow, set(wanted), len(flow.recording.nodes))
    run, _ = value_function(flow, model, wanted, nodes, RngStreams(torch.device("cpu")))

    def evaluate(tensors: Sequence[torch.Tensor]) -> float:
        with torch.no_grad():
            labels, *others = run(tensors)
            if isinstance(what, Ref):
                return float(labels)
            kept = labels[labels != what.ignored]
            classes = others[0] if others else weight
            return float(kept.numel()) if classes is None else float(classes.double()[kept].sum())

    return evaluate
