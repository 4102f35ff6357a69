"""Whether the weighted micro-batches give the loss of the full batch, tried once with real parameters."""
from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch

from pipeengine.rng import RngStreams
from pipeengine.stages.guards import guard_check
from pipeengine.stages.loss_terms import find_terms
from pipeengine.stages.loss_weight import LossWeights, Weights, target_count
from pipeengine.torch_private import DropoutModule
from pipeengine.tracing import Dataflow, Inputs, loss_of, undisturbed


def compare_two_microbatches(model: torch.nn.Module, flow: Dataflow, parts: Sequence[Sequence[torch.Tensor]],
                             whole: Sequence[torch.Tensor], again: Callable[[Sequence[torch.Tensor]], Inputs],
                             loss_fn: Callable | None, device: torch.device) -> str | None:
    """Take the micro-batches ``parts``, two of a kind, as the full batch ``whole``; None if their weighted losses are
    its loss, or if that cannot be tried, else what to tell the user.

    ``flow`` is recorded for the first; ``again`` puts tensors into the inputs. Two are enough to see what mixes rows,
    whatever the batch, and cost four forwards. Models that draw random numbers are not compared: the full batch draws
    others.
    """
    recording = flow.recording
    rng = RngStreams(device)
    holds = guard_check(flow, model, rng)
    alike = [tensor.shape for tensor in parts[0]] == [tensor.shape for tensor in parts[1]]
    if not alike or any(node.random for node in recording.nodes) or not (holds is None or holds(parts[1], 0)):
        return None
    kinds = [(flow, find_terms(flow, flow, model), target_count(flow, model))] * 2
    try:
        with warnings.catch_warnings(action="ignore"):
            weights = LossWeights(model, loss_fn, device, rng).weigh((), kinds, parts, (1, 1), lambda: whole, again,
                                                                     recording.leaf_modules)
            return full_batch_loss_check(model, again(whole), [again(part) for part in parts], weights, loss_fn)
    except Exception:       # the model may take micro-batches only, or not have the memory for two
        return None


def full_batch_loss_check(
    model: torch.nn.Module,
    whole: Inputs,
    parts: Sequence[Inputs],
    weights: Weights,
    loss_fn: Callable | None = None,
    losses: Sequence[torch.Tensor] | None = None,
) -> str | None:
    """None if the weighted micro-batches ``parts`` give the loss of the batch ``whole`` but for rounding, else what to
    tell the user.

    Runs the model itself with real parameters, without gradients, dropout off, and leaves it as it was. ``losses``: the
    micro-batches' losses with the weights of their terms, as the pipeline computes them; needed where a loss has
    several terms with weights of their own (without, such a loss is not checked).
    """
    if losses is None and any((term != 1).any() for terms in weights.terms for term in terms):
        return None
    dropouts = [
        module
        for module in model.modules()
        if isinstance(module, DropoutModule) and module.training
    ]
    with torch.no_grad(), undisturbed(model):
        try:
            for module in dropouts:
                module.training = False
            expected = _eager_loss(model, whole, loss_fn)
            losses = losses or [_eager_loss(model, part, loss_fn) for part in parts]
        finally:
            for module in dropouts:
                module.training = True
    total = float(sum(loss.double() * weight for loss, weight in zip(losses, weights.loss) if weight))
    scale = max(
        abs(float(expected)), sum(abs(float(loss) * weight) for loss, weight in zip(losses, weights.loss) if weight)
    )
    # Sums over millions of entries round in another order; what is wrong with a weight is off by per cents.
    if abs(total - float(expected)) <= max(1e-4, 64 * torch.finfo(expected.dtype).eps) * scale or not math.isfinite(
        float(expected)
    ):
        return None
    return (
        f"the loss of the full batch is {float(expected):.6g}, its {len(parts)} micro-batches give {total:.6g}: "
        "no weights that follow from the recorded loss make them equal (a loss that mixes rows, batch norm, a target "
        "count that the inputs do not tell). The pipeline trains on the second. Pass loss_weight= with what a "
        "micro-batch counts for, divide by a number that is the same for all micro-batches, or use num_microbatches=1"
    )


def _eager_loss(model: torch.nn.Module, inputs: Inputs, loss_fn: Callable | None) -> torch.Tensor:
    output = model(*inputs.args, **inputs.kwargs)
    loss = loss_of(loss_fn, output, inputs.target)
    assert isinstance(loss, torch.Tensor), "the recording has found one"
    return loss
