"""The thread-wide switches that change what an operator does: told, and set again."""
from __future__ import annotations

import contextlib
import zlib
from operator import attrgetter, getitem, is_not, itemgetter
from typing import NamedTuple

import torch
from torch.utils.hooks import RemovableHandle

from pipeengine.torch_private import DropoutModule, global_module_hooks

_HOOKS = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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
    """What a loop may switch on modules and parameters, told in one pass over what the model holds now.

    ``replaced``: whether at the last ``now`` other parameters stood in the places of the call before.
    """

    def __init__(self, model: torch.nn.Module):
        self._model, self.replaced = model, False
        self._find()

    def _find(self) -> None:
        model = self._model
        self._modules = [vars(module) for module in model.modules()]
        self._trained = all("training" in attributes for attributes in self._modules)   # elsewhere in TorchScript
        # Every name of a shared parameter: where it is not held its names are not one object, and workers compare this.
        places = [(module._parameters, name) for module in model.modules()
                  for name, parameter in module._parameters.items() if parameter is not None]
        self._tables, self._names = [table for table, _ in places], [name for _, name in places]
        self._parameters = list(map(getitem, self._tables, self._names))
        self._types, self._types_told = list[torch.dtype](), b""
        self._last_hook, self._hooked = -1, b""         # nothing is known of these modules
        self._forget_hooked_parameters()

    def _forget_hooked_parameters(self) -> None:
        self._last_parameter_hook, self._hooked_parameters = -1, list[torch.nn.Parameter]()

    def hooked_parameters(self) -> list[torch.nn.Parameter]:
        """Those that stand in the model now and have hooks of their own, each once.

        Looked for again where any hook was put on anything since, or other parameters have been seen.
        """
        if RemovableHandle.next_id != self._last_parameter_hook:
            self._last_parameter_hook = RemovableHandle.next_id
            standing = {id(one): one for one in map(getitem, self._tables, self._names)}
            self._hooked_parameters = list(filter(_has_own_hooks, standing.values()))
        return list(filter(_has_own_hooks, self._hooked_parameters))

    def now(self) -> tuple[bytes, bytes, tuple]:
        """One byte for each module that says whether it trains, one for each parameter that says whether it wants a
        gradient, and the rest: of which type parameters are, and which modules have hooks."""
        training = map(itemgetter("training"), self._modules) if self._trained else \
            (module.training for module in self._model.modules())
        try:
            parameters = list(map(getitem, self._tables, self._names))
            self.replaced = any(map(is_not, parameters, self._parameters))
            self._parameters = parameters
            if self.replaced:
                self._forget_hooked_parameters()
            return (bytes(training), bytes(map(attrgetter("requires_grad"), parameters)),
                    (self._types_of(parameters), self._with_hooks()))
        except (LookupError, AttributeError):       # a parameter was taken out
            self._find()
            found = self.now()
            self.replaced = True
            return found

    def _types_of(self, parameters: list[torch.nn.Parameter]) -> bytes:
        """Made anew only where a type has changed: recordings are looked up by it, and bytes keep their hash."""
        types = list(map(attrgetter("dtype"), parameters))
        if types != self._types:
            self._types, self._types_told = types, repr(types).encode()
        return self._types_told

    def _with_hooks(self) -> bytes:
        """Looked at again where any hook was put on anything since; a recording without one that is taken off holds."""
        if RemovableHandle.next_id != self._last_hook:
            self._last_hook = RemovableHandle.next_id
            self._hooked = bytes([*map(_has_hooks, self._modules), any(global_module_hooks)])
        return self._hooked


def settings_digest(flags: tuple[bytes, bytes, tuple], autocast: tuple) -> int:
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


def _has_own_hooks(parameter: torch.nn.Parameter) -> bool:
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def _has_hooks(attributes: dict) -> bool:
    return any(_HOOKS(attributes)) if "_forward_hooks" in attributes else False


def _accelerators() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return () if accelerator is None else (accelerator.type,)
