"""Real numbers beside the fakes: what follows from the inputs is computed, what does not is made up to learn its
shape.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from pipeengine.torch_private import FakeTensorMode
from pipeengine.tracing.meter import tensor_bytes
from pipeengine.tracing.pytree import tensors, tree_map
from pipeengine.tracing.value_table import REAL_SIDE_LIMIT_BYTES, ValueTable

RngOfPlace = Callable[[str], contextlib.AbstractContextManager]
"""Gives a context in which random numbers are those of a place in the model."""


class RealSide:
    """Runs functions on the real tensors of a value table."""

    def __init__(self, values: ValueTable, fake_mode: FakeTensorMode, rng_of_place: RngOfPlace):
        self._values, self._fake_mode, self._rng_of_place = values, fake_mode, rng_of_place

    def beside(self, function: Callable, args: tuple, kwargs: dict, output: object, place: str | None
               ) -> dict[int, torch.Tensor] | None:
        """Run ``function`` on real numbers: id of a new fake in ``output`` -> the real tensor beside it.

        None where the numbers are unknown, too large, or not wanted because ``output`` needs a gradient. ``place``
        is where the function draws random numbers, None when it draws none.
        """
        fakes = tensors(output)
        real = self._values.reals((args, kwargs))
        if real is None or any(fake.requires_grad or tensor_bytes(fake) > REAL_SIDE_LIMIT_BYTES for fake in fakes):
            return None
        with torch.no_grad(), (contextlib.nullcontext() if place is None else self._rng_of_place(place)):
            result = function(*real[0], **real[1])
        return {id(fake): tensor for fake, tensor in zip(fakes, tensors(result)) if not self._values.knows(fake)}

    def known_result(self, function: Callable, args: tuple, kwargs: dict) -> object | None:
        """Fakes that look like what ``function`` gives on real numbers, None where those are unknown."""
        real = self._values.reals((args, kwargs))
        if real is None:
            return None
        with torch.no_grad():
            return self.fakes_like(function(*real[0], **real[1]), needs_gradient=False)

    def guessed_result(self, function: Callable, args: tuple, kwargs: dict, meter: contextlib.AbstractContextManager
                       ) -> object | None:
        """Fakes that look like what ``function``, inside ``meter``, gives on made-up numbers, None unless two trials
        give the same shapes.

        Then the data do not matter to the shapes after all.
        """
        trials = [self._trial(function, args, kwargs, number, meter) for number in (0, 1)]
        if None in trials or _shapes(trials[0]) != _shapes(trials[1]):
            return None
        needs = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors((args, kwargs)))
        return self.fakes_like(trials[0], needs_gradient=needs)

    def _trial(self, function: Callable, args: tuple, kwargs: dict, number: int,
               meter: contextlib.AbstractContextManager) -> object | None:
        """Run ``function`` on made-up numbers where there are no real ones; None where that fails."""
        try:
            with torch.no_grad():
                return self.trial(function, args, kwargs, number, meter)
        except Exception:
            return None

    def trial(self, function: Callable, args: tuple, kwargs: dict, number: int = 0,
              meter: contextlib.AbstractContextManager = contextlib.nullcontext()) -> object:
        """What ``function``, run inside ``meter``, gives on made-up numbers where there are no real ones."""
        def real_of(leaf: object) -> object:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            real = self._values.real_of(leaf)
            if real is None:
                real = made_up(leaf, leaf.device, number)
                if leaf.requires_grad and torch.is_grad_enabled():
                    real.requires_grad_()
            return real
        with self._rng_of_place(f"made up {number}"):
            args, kwargs = tree_map(args, real_of), tree_map(kwargs, real_of)
            with meter:
                return function(*args, **kwargs)

    def fakes_like(self, result: object, *, needs_gradient: bool) -> object:
        """Fakes that look like the tensors in ``result``; floating-point ones follow from something trained if asked.
        """
        anchor = None
        if needs_gradient:
            with self._fake_mode:
                anchor = torch.zeros((), requires_grad=True)

        def fake_of(leaf: object) -> object:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            with self._fake_mode:
                fake = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
                return fake + anchor if needs_gradient and leaf.is_floating_point() else fake
        return tree_map(result, fake_of)


def made_up(fake: torch.Tensor, device: torch.device, number: int = 0) -> torch.Tensor:
    """A real tensor that looks like ``fake``: small random numbers, or ``number`` for integers."""
    tensor = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=device)
    if fake.is_floating_point() or fake.is_complex():
        return tensor.normal_(0, 0.02)
    return tensor.fill_(1 - number if fake.dtype == torch.bool else number)


def _shapes(structure: object) -> list:
    return [(tensor.shape, tensor.dtype) for tensor in tensors(structure)]
