"""What a forward is called with, and the loss that it answers with."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeGuard

import torch


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

    def everything(self) -> tuple:
        """Positional arguments, keyword arguments and the target, as one pytree."""
        return self.args, self.kwargs, self.target


def find_loss(output: object) -> torch.Tensor | None:
    """The model's own loss: ``output.loss``, ``output["loss"]``, the first scalar of a tuple, or a scalar output.

    Scalars are 0-dimensional and floating-point.
    """
    found = getattr(output, "loss", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("loss")
    if found is None and isinstance(output, (tuple, list)):
        found = next(filter(_is_scalar, output), None)
    if found is None:
        found = output
    return found if _is_scalar(found) else None


def _is_scalar(value: object) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and value.dim() == 0 and value.is_floating_point()
