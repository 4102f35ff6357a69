"""The thread-wide switches that change what an operator does: told, and set again."""
from __future__ import annotations

import contextlib
import zlib
from operator import attrgetter, getitem, itemgetter
from typing import NamedTuple

import torch

from pipeengine.torch_private import DropoutModule


class Modes(NamedTuple):
    """Thread-wide switches under which a node ran: gradients, inference mode, autocast per device."""

    grad: bool
    inference: bool
    autocast: tuple


def current_modes() -> Modes:
    """The thread-wide switches that change what an operator does."""
    kinds = ("cpu", *_accelerators())
    autocast = tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind))
    return Modes(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast)


class ModelFlags:
    """Whether each module trains and each parameter wants a gradient, told in one pass over what the model holds now.
    """

    def __init__(self, model: torch.nn.Module):
        self._modules = [vars(module) for module in model.modules()]
        self._trained = all("training" in attributes for attributes in self._modules)   # elsewhere in TorchScript
        self._model = model
        # Every name of a shared parameter: where it is not held its names are not one object, and workers compare this.
        places = [(module._parameters, name) for module in model.modules()
                  for name, parameter in module._parameters.items() if parameter is not None]
        self._tables, self._names = [table for table, _ in places], [name for _, name in places]

    def now(self) -> tuple[bytes, bytes]:
        """One byte for each module, and one for each parameter."""
        training = map(itemgetter("training"), self._modules) if self._trained else \
            (module.training for module in self._model.modules())
        try:
            return bytes(training), bytes(map(attrgetter("requires_grad"), map(getitem, self._tables, self._names)))
        except (LookupError, AttributeError):       # a parameter was taken out
            return ModelFlags(self._model).now()


def settings_digest(flags: tuple[bytes, bytes], autocast: tuple) -> int:
    """32 bits of what ``ModelFlags`` and ``Modes`` tell, equal on two workers where ``settings_of`` is."""
    return zlib.crc32(repr(autocast).encode(), zlib.crc32(flags[1], zlib.crc32(flags[0])))


def settings_of(model: torch.nn.Module) -> dict[str, object]:
    """What a training loop sets on a model and around it, by names for people: it must be alike on every worker."""
    autocast = ", ".join(f"{kind} in {dtype}" for kind, dtype in current_modes().autocast) or "off"
    modes = {f"the mode of {path or 'the model'}": "train" if module.training else "eval"
             for path, module in model.named_modules()}
    dropout = {f"the dropout rate of {path or 'the model'}": module.p for path, module in model.named_modules()
               if isinstance(module, DropoutModule)}
    trained = {f"requires_grad of {name}": parameter.requires_grad
               for name, parameter in model.named_parameters(remove_duplicate=False)}
    return {"autocast": autocast, **modes, **dropout, **trained}


class switch:
    """A context that sets the modes a node was recorded under; enters any number of times."""

    def __init__(self, modes: Modes):
        self._modes = modes
        self._stacks: list[contextlib.ExitStack] = []

    def __enter__(self) -> None:
        stack = contextlib.ExitStack()
        stack.enter_context(torch.inference_mode(self._modes.inference))
        stack.enter_context(torch.set_grad_enabled(self._modes.grad))
        wanted = dict(self._modes.autocast)
        for kind in {"cpu", *wanted, *_accelerators()}:
            stack.enter_context(torch.autocast(kind, dtype=wanted.get(kind), enabled=kind in wanted))
        self._stacks.append(stack)

    def __exit__(self, *exc) -> None:
        self._stacks.pop().close()


def _accelerators() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return () if accelerator is None else (accelerator.type,)
