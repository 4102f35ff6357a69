"""Weights in float32 beside parameters in half precision, kept in the optimizer's state.

torch has no such optimizer for all devices; its hooks before and after a step make one of any.
Kept as state of its parameter, a master weight is saved, loaded and dealt to workers as momentum is.
"""
from __future__ import annotations

from functools import wraps
from types import MethodType
from typing import Any

import torch

from pipeengine.distributed import is_sharded
from pipeengine.errors import InputError
from pipeengine.torch_private import version_of

MASTER = "master"           # its name in the state of a parameter
_HALF = (torch.bfloat16, torch.float16)


def keep_master_weights(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Let ``optimizer`` update float32 copies of its parameters in half precision; returns ``optimizer``.

    Its state is in float32 then; after each step the parameters are the copies, rounded. 4 bytes per parameter more.
    A parameter that was changed elsewhere (by ``load_state_dict``) counts: its copy follows. Call it before the first
    step or after a state was loaded. Raises ``InputError`` in a step that is given a closure. After a step that raises,
    the parameters are in half precision as before, as far as it has come.
    """
    _Masters().watch(optimizer)
    return optimizer


class _Masters:
    """Puts the copies in the place of the parameters' values while the optimizer steps."""

    def __init__(self) -> None:
        self._inside: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        self._swapped: list[tuple[list, int, torch.nn.Parameter]] = []      # of a group, the place, and what was there
        self._versions: dict[int, int] = {}

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at every step of ``optimizer``."""
        optimizer.register_step_pre_hook(self._enter)
        optimizer.register_step_post_hook(lambda optimizer, args, kwargs: self._leave(optimizer))
        step = optimizer.step           # a step that raises calls no hooks

        @wraps(step)
        def ending(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> object:
            try:
                return step(*args, **kwargs)
            finally:
                self._leave(optimizer)
        # A method, because learning rate schedulers look for its function.
        optimizer.step = MethodType(ending, optimizer)      # type: ignore[method-assign]

    def _enter(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if any(callable(given) for given in (*args[1:], *kwargs.values())):
            raise InputError("the optimizer's step was given a closure, which would run the model on float32 copies; "
                             "call pipe.step before it, and the optimizer's step without")
        for group in optimizer.param_groups:
            for place, parameter in enumerate(group["params"]):
                if parameter.dtype not in _HALF or parameter.grad is None:
                    continue
                state = optimizer.state[parameter]
                # Out of the state meanwhile: optimizers take a state that is not empty for a complete one.
                master = self._current(parameter, state.pop(MASTER, None))
                if is_sharded(parameter):       # keeps its dtype, whatever its values are replaced by
                    self._swap(optimizer, group["params"], place, master)
                    continue
                low, gradient = parameter.data, parameter.grad.to(torch.float32)
                parameter.grad, parameter.data = None, master
                parameter.grad = gradient
                self._inside.append((parameter, low))

    def _swap(self, optimizer: torch.optim.Optimizer, parameters: list, place: int, master: torch.Tensor) -> None:
        """Put a parameter in float32, with the state, in the place of a sharded one."""
        parameter, stand_in = parameters[place], torch.nn.Parameter(master)
        stand_in.grad = parameter.grad.to(torch.float32)
        optimizer.state[stand_in] = optimizer.state.pop(parameter)
        parameters[place] = stand_in
        self._swapped.append((parameters, place, parameter))

    def _current(self, parameter: torch.nn.Parameter, master: torch.Tensor | None) -> torch.Tensor:
        """The copy, where it still is the parameter's."""
        if master is None:
            return parameter.detach().to(torch.float32)
        if self._versions.get(id(parameter)) == version_of(parameter):
            return master
        low = parameter.detach()
        return torch.where(master.to(low.dtype) == low, master, low.to(torch.float32))

    def _leave(self, optimizer: torch.optim.Optimizer) -> None:
        with torch.no_grad():
            for parameters, place, parameter in self._swapped:
                stand_in, parameters[place] = parameters[place], parameter
                parameter.copy_(stand_in)
                optimizer.state[parameter] = optimizer.state.pop(stand_in)
                optimizer.state[parameter][MASTER] = stand_in.detach()
                self._versions[id(parameter)] = version_of(parameter)
            for parameter, low in self._inside:
                master = parameter.data
                gradient, parameter.grad = parameter.grad, None
                parameter.data = low
                parameter.copy_(master)
                parameter.grad = None if gradient is None else gradient.to(low.dtype)
                optimizer.state[parameter][MASTER] = master
                self._versions[id(parameter)] = version_of(parameter)
        self._inside.clear()
        self._swapped.clear()
