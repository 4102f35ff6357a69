"""The truth that pipelines are compared with: one plain process, one micro-batch after the other.

Nothing here knows the engine. The rules are those the engine promises, written a second time, by other means:
weights are counted by watching the loss functions of an extra forward, not by reading a recording.
"""
import copy
from collections.abc import Callable, Mapping, Sequence
from unittest import mock

import torch
from torch.utils import _pytree as pytree

Batch = Mapping[str, object] | tuple[object, ...]


def num_rows(batch: Batch) -> int:
    """Rows of a batch: dimension 0 of its first tensor that has one."""
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            return leaf.shape[0]
    raise ValueError("the batch holds no tensor with rows")


def split_batch(batch: Batch, num_microbatches: int) -> list[Batch]:
    """Micro-batches as ``tensor_split`` makes them; at most one per row. What has no rows goes whole to each."""
    rows = num_rows(batch)
    count = min(num_microbatches, rows)
    leaves, tree = pytree.tree_flatten(batch)
    parts = [torch.tensor_split(leaf, count) if _has_rows(leaf, rows) else [leaf] * count for leaf in leaves]
    return [pytree.tree_unflatten([part[i] for part in parts], tree) for i in range(count)]


def _has_rows(leaf: object, rows: int) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == rows


def loss_of(output: object) -> torch.Tensor:
    """The model's own loss: the output when scalar, ``.loss``, ``["loss"]``, or the first of a tuple."""
    if isinstance(output, torch.Tensor):
        return output
    if getattr(output, "loss", None) is not None:
        return output.loss
    return output["loss"] if isinstance(output, Mapping) else output[0]


def forward_loss(model: torch.nn.Module, batch: Batch, loss_fn: Callable | None, target: object) -> torch.Tensor:
    """The loss of one micro-batch."""
    output = model(**batch) if isinstance(batch, Mapping) else model(*batch)
    return loss_of(output) if loss_fn is None else loss_fn(output, target)


def target_counts(model, parts: Sequence[Batch], loss_fn=None, targets: Sequence[object] | None = None) -> list[int]:
    """Targets that are not ignored in each micro-batch's mean cross-entropy; empty when the loss is not one.

    Watches ``torch.nn.functional.cross_entropy`` during an extra forward of a copy of the model, so it sees the
    labels after whatever shift the model does. The random state is left as found.
    """
    def count(input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean",
              label_smoothing=0.0):
        plain = reduction == "mean" and weight is None and not target.is_floating_point()
        return int((target != ignore_index).sum()) if plain else None

    return _watched("cross_entropy", count, model, parts, loss_fn, targets)


def is_summed(model, parts: Sequence[Batch], loss_fn=None, targets: Sequence[object] | None = None) -> bool:
    """Whether the loss is a connectionist temporal classification that is summed over the rows."""
    def summed(log_probs, targets, input_lengths, target_lengths, blank=0, reduction="mean", zero_infinity=False):
        return True if reduction == "sum" else None

    return bool(_watched("ctc_loss", summed, model, parts, loss_fn, targets))


def _watched(name: str, look: Callable, model, parts, loss_fn, targets) -> list:
    """What ``look`` says of the call of a loss function in each micro-batch; empty if it is not one word for each."""
    seen: list = []
    real = getattr(torch.nn.functional, name)

    def watch(*args, **kwargs):
        word = look(*args, **kwargs)
        seen.extend([] if word is None else [word])
        return real(*args, **kwargs)

    twin = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), mock.patch.object(torch.nn.functional, name, watch):
        for part, target in zip(parts, targets or [None] * len(parts), strict=True):
            forward_loss(twin, part, loss_fn, target)
    return seen if len(seen) == len(parts) else []


def microbatch_weights(model, parts, loss_fn=None, targets=None) -> list[float]:
    """Weights that make the weighted sum of the micro-batches' losses the loss of the full batch.

    A mean cross-entropy: each micro-batch's share of the targets that are not ignored. A sum: 1. Anything else: its
    share of the rows.
    """
    if is_summed(model, parts, loss_fn, targets):
        return [1.0] * len(parts)
    counts = target_counts(model, parts, loss_fn, targets)
    if not counts or not sum(counts):
        counts = [num_rows(part) for part in parts]
    return [count / sum(counts) for count in counts]


def row_weights(batch: Batch, num_microbatches: int) -> list[float]:
    """Each micro-batch's share of the rows."""
    counts = [num_rows(part) for part in split_batch(batch, num_microbatches)]
    return [count / sum(counts) for count in counts]


def reference_step(model: torch.nn.Module, batch: Batch, num_microbatches: int,
                   weights: Sequence[float] | None = None, loss_fn: Callable | None = None,
                   target: object = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One step in one process: ``(w_i * loss_i).backward()`` for the micro-batches in order.

    Returns the loss of the whole batch and the gradients by first name in ``named_parameters()``; a parameter without
    a gradient is left out. Gradients the model came with are dropped first. Buffers change as the forwards change
    them. A micro-batch of weight 0 (it has no target) runs forward only: its own mean is NaN.
    """
    parts = split_batch(batch, num_microbatches)
    targets = [None] * len(parts) if target is None else split_batch({"target": target}, len(parts))
    targets = [part and part["target"] for part in targets]
    model.zero_grad(set_to_none=True)
    return reference_parts(model, parts, weights, loss_fn, targets), gradients(model)


def reference_parts(model: torch.nn.Module, parts: Sequence[Batch], weights: Sequence[float] | None = None,
                    loss_fn: Callable | None = None, targets: Sequence[object] | None = None) -> torch.Tensor:
    """The same for micro-batches ``parts`` as they are; gradients are added to those that are there."""
    targets = targets or [None] * len(parts)
    if weights is None:
        weights = microbatch_weights(model, parts, loss_fn, targets)
    total = torch.zeros(())
    for part, part_target, weight in zip(parts, targets, weights, strict=True):
        loss = forward_loss(model, part, loss_fn, part_target)
        if weight:
            (weight * loss).backward()
            total = total + weight * loss.detach()
    return total


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by parameter name; parameters without one are left out."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def worst_difference(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor],
                     floor: float = 0.0) -> tuple[float, str]:
    """The largest difference between two sets of gradients, relative to the largest entry of the expected tensor.

    Returns it with the parameter's name: 0.0 means bit-equal. A missing or an extra name counts as infinite, and so
    does a NaN on one side only. Tensors smaller than ``floor`` times the largest of them all are measured against
    that: some gradients are zero but for rounding (the bias of an attention key).
    """
    names = set(expected) ^ set(found)
    if names:
        return float("inf"), min(names)
    largest = max((float(value.abs().max()) for value in expected.values() if value.numel()), default=0.0)
    return max(((_difference(expected[name], found[name], floor * largest), name) for name in expected),
               default=(0.0, ""))


def _difference(expected: torch.Tensor, found: torch.Tensor, least: float) -> float:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return float("inf")
    if torch.equal(expected, found):
        return 0.0
    scale = max(float(expected.abs().max()), least) or torch.finfo(expected.dtype).tiny
    difference = float((expected - found).abs().max()) / scale
    return difference if difference < float("inf") else float("inf")


def assert_same_step(expected: tuple, found: tuple, tolerance: float = 0.0, floor: float = 0.0) -> None:
    """Two steps' ``(loss, gradients)`` agree: bit for bit, or to ``tolerance`` of each tensor's largest entry."""
    worst, _ = worst_difference({"the loss": expected[0]}, {"the loss": found[0]})
    assert worst <= tolerance, f"loss {float(found[0])!r}, expected {float(expected[0])!r}"
    worst, name = worst_difference(expected[1], found[1], floor)
    assert worst <= tolerance, f"gradient of {name} is off by {worst:.3g} of its largest entry, allowed {tolerance:g}"
