"""The gradients of all workers looked at as one: their norm, and whether all of them are finite.

A step that must not be taken is skipped by every worker alike, because each decides by what all have told: the norm is
the same number everywhere, and what a ``GradScaler`` finds is made so.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from pipeengine.distributed import Workers, own_part, total_norm
from pipeengine.errors import InputError
from pipeengine.torch_private import foreach_norm

Named = Callable[[], Iterable[tuple[str, torch.nn.Parameter]]]
_NOTHING = 1 << 20          # told by a worker without any gradient; more than there are workers


class Gradients:
    """Those of the parameters that ``named()`` yields here; each gradient, or each part of a sharded one, is in the
    ``counted`` names of one worker. ``precision`` is that of the norm, on all workers alike."""

    def __init__(self, named: Named, counted: frozenset[str], workers: Workers, device: torch.device,
                 precision: torch.dtype = torch.float32):
        self._named, self._counted, self._workers, self._device = named, counted, workers, device
        self._precision = precision

    def _present(self) -> list[torch.Tensor]:
        return [own_part(parameter.grad) for _, parameter in self._named() if parameter.grad is not None]

    def holds(self, numbers: set[int]) -> bool:
        """Whether one of these gradients, or a parameter of theirs, has one of these ``id``s."""
        return any(id(parameter) in numbers or id(parameter.grad) in numbers for _, parameter in self._named())

    def norm(self, norm_type: float) -> torch.Tensor:
        """Of the gradients of all workers, 0-dimensional, the same on each of them; every worker calls it."""
        counted = [own_part(p.grad) for name, p in self._named() if p.grad is not None and name in self._counted]
        return total_norm(counted, norm_type, self._workers, self._device).to(self._precision)

    def scale(self, factor: torch.Tensor) -> None:
        """Multiply all of this worker's by ``factor``."""
        for gradient in self._present():
            gradient.mul_(factor.to(gradient.device))

    def spread_overflow(self) -> bool:
        """Where one worker has a gradient that is not finite, give one to all parameters everywhere, so that what looks
        at one worker's alone (a ``GradScaler``) finds the same on each; every worker calls it.

        Returns whether it was so. Raises ``InputError`` on every worker where one has no gradient at all.
        """
        own = self._present()
        values = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in own]
        values = [value for value in values if value.numel()]
        bad = not all(bool(norm.isfinite()) for norm in foreach_norm(values, float("inf"))) if values else False
        told = torch.tensor(float(bad if own else _NOTHING), dtype=torch.float64)
        without, found = divmod(int(self._workers.all_reduce(told)), _NOTHING)
        if without:
            raise InputError(f"{without} of {self._workers.size} workers have no gradient after this step (their "
                             "stages train nothing, or have nothing to update), and a GradScaler needs one on each of "
                             "them; train in bfloat16 without a scaler, or take fewer workers")
        if found:
            for gradient in own:
                gradient.mul_(float("inf"))     # zeros become NaN
        return bool(found)


def scale_of(scaler: object, device: torch.device) -> torch.Tensor | None:
    """What ``scaler`` multiplies a loss by now, 0-dimensional; None for one that is not enabled.

    Every worker asks, not only those that have the loss: a ``GradScaler`` has a scale once it was asked. Raises
    ``InputError`` for what is no scaler.
    """
    if not all(callable(getattr(scaler, name, None)) for name in ("scale", "unscale_", "is_enabled")):
        raise InputError(f"scaler is a {type(scaler).__name__}; give a torch.amp.GradScaler")
    if not scaler.is_enabled():         # type: ignore[attr-defined]
        return None
    return scaler.scale(torch.ones((), device=device))      # type: ignore[attr-defined]
