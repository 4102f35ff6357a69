"""Clipping by the gradients of one worker alone is refused: nothing else tells that the norm is not the model's."""
from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import cache

import torch

from pipeengine.errors import InputError
from pipeengine.runtime.gradients import Gradients
from pipeengine.torch_private import wrap_norm_of_clipping

_PARTIAL: weakref.WeakSet[Gradients] = weakref.WeakSet()


def refuse_local_clipping(gradients: Gradients) -> None:
    """From now on, as long as ``gradients`` lives, ``clip_grad_norm_`` and ``get_total_norm`` of ``torch.nn.utils`` are
    an ``InputError`` for any of them, and for their parameters.

    They are those of a worker that has a part of the parameters. ``clip_grad_value_`` looks at each entry alone, and
    ``clip_grads_with_norm_`` is given a norm: they stay.
    """
    _PARTIAL.add(gradients)
    _guard_once()


@cache
def _guard_once() -> None:
    # Where the norm is taken, so that names of clip_grad_norm_ imported before are guarded too.
    wrap_norm_of_clipping(_guarded)


def _guarded(norm: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def guarded(tensors: Iterable[torch.Tensor], *args: object, **kwargs: object) -> torch.Tensor:
        given = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        numbers = {id(tensor) for tensor in given}
        if any(gradients.holds(numbers) for gradients in _PARTIAL):
            raise InputError("clip_grad_norm_ and get_total_norm of torch.nn.utils see what this worker holds alone: "
                             "the norm would be another one on every worker; call pipe.clip_grad_norm_(max_norm), "
                             "which clips by the norm over all of them and returns it (with max_norm=float('inf') it "
                             "changes nothing)")
        return norm(given, *args, **kwargs)
    return guarded
