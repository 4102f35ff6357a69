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
    """From now on, as long as ``gradients`` lives, ``torch.nn.utils.clip_grad_norm_`` of any of them is an
    ``InputError``.

    They are those of a worker that has a part of the parameters. ``clip_grad_value_`` looks at each entry alone, and
    stays.
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
            raise InputError("torch.nn.utils.clip_grad_norm_ sees the gradients of this worker alone, and would clip "
                             "by another norm on every worker; call pipe.clip_grad_norm_(max_norm), which takes the "
                             "norm over all of them")
        return norm(given, *args, **kwargs)
    return guarded
