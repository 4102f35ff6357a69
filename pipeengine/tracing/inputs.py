"""What a forward is called with, and the loss that it answers with."""
from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeGuard

import torch

from pipeengine.errors import CaptureError
from pipeengine.tracing.born_objects import is_returned

WHOLE_LOSS = ":loss_fn"
"""Among the modules that are kept whole: the loss function, where it is one node; no module has such a name."""


@dataclass(frozen=True)
class Inputs:
    """What a forward is called with: positional and keyword arguments, and the target of ``loss_fn``."""

    args: tuple
    kwargs: dict
    target: object = None

    @classmethod
    def of(cls, example: object, target: object = None) -> Inputs:
        """From a dict of keyword arguments, a tuple of positional ones, or one tensor."""
        if isinstance(example, Mapping):
            return cls((), dict(example), target)
        return cls(tuple(example) if isinstance(example, (tuple, list)) else (example,), {}, target)

    def returned(self, value: object) -> bool:
        """Whether this object of the model's output is wanted: none is in training, and no cache unless
        ``use_cache=True`` is passed. Models of Hugging Face return one unasked, as large as their activations.
        """
        return not torch.is_grad_enabled() and is_returned(value, self.kwargs.get("use_cache") is True)

    def everything(self) -> tuple:
        """Positional arguments, keyword arguments and the target, as one pytree."""
        return self.args, self.kwargs, self.target


def loss_of(loss_fn: Callable | None, output: object, target: object) -> torch.Tensor | None:
    """The loss: the model's own, or what ``loss_fn`` makes of output and target, or of the output alone.

    Where ``loss_fn`` returns more than a tensor, the loss is in there as it is in a model's output. Raises
    ``CaptureError`` where it is not.
    """
    if loss_fn is None:
        return find_loss(output)
    result = loss_fn(output, target) if _number_of_arguments(loss_fn)[1] > 1 else loss_fn(output)
    loss = result if isinstance(result, torch.Tensor) and result.numel() == 1 else find_loss(result)
    if loss is None and isinstance(result, torch.Tensor):
        raise CaptureError(f"loss_fn returned a {result.dtype} tensor of shape {tuple(result.shape)}; return one "
                           "number, such as its mean")
    if loss is None:
        what = f" with {', '.join(map(str, result))}" if isinstance(result, Mapping) else ""
        raise CaptureError(f"loss_fn returned a {type(result).__name__}{what}, in which there is no loss: return a "
                           "scalar tensor, a dict or an object with it under 'loss', or a tuple that begins with it")
    return loss


def needs_target(loss_fn: Callable | None) -> bool:
    """Whether ``loss_fn`` cannot do without a target."""
    return loss_fn is not None and _number_of_arguments(loss_fn)[0] > 1


def usable_loss(loss_fn: Callable | None, inputs: Inputs) -> Callable | None:
    """``loss_fn``, or None where these inputs have no target and it needs one."""
    return None if inputs.target is None and needs_target(loss_fn) else loss_fn


def _number_of_arguments(function: Callable) -> tuple[int, int]:
    """How many positional arguments it must get, and how many it may."""
    try:
        arguments = list(inspect.signature(getattr(function, "forward", function)).parameters.values())
    except (TypeError, ValueError):
        return 2, 2
    if any(one.kind is one.VAR_POSITIONAL for one in arguments):
        return 2, 2
    positional = [one for one in arguments if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    return sum(one.default is one.empty for one in positional), len(positional)


def find_loss(output: object) -> torch.Tensor | None:
    """The model's own loss: ``output.loss``, ``output["loss"]``, the first scalar of a tuple, or a scalar output.

    Scalars are 0-dimensional and floating-point.
    """
    loss = getattr(output, "loss", None)
    if loss is None and isinstance(output, Mapping):
        loss = output.get("loss")
    if loss is None and isinstance(output, (tuple, list)):
        loss = next(filter(_is_scalar, output), None)
    if loss is None:
        loss = output
    return loss if _is_scalar(loss) else None


def _is_scalar(value: object) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and value.dim() == 0 and value.is_floating_point()
