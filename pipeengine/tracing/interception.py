"""Send what a forward does to the recorder: calls of modules, autograd functions, changes of random state."""
from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import BuiltinMethodType, ModuleType

import torch

from pipeengine.torch_private import APPLY_IS_IN_C, DYNAMO_MODULE, AutogradFunctionBase, apply_in_c
from pipeengine.tracing.nested_encoder import with_zeroed_padding
from pipeengine.tracing.recorder import Recorder


@contextlib.contextmanager
def intercepted(model: torch.nn.Module, recorder: Recorder) -> Iterator[None]:
    """Send module calls, autograd functions and changes of random state to the recorder; put everything back after."""
    with contextlib.ExitStack() as stack:
        classes = {cls for module in model.modules() for cls in type(module).__mro__ if "__call__" in vars(cls)}
        for cls in classes:
            if issubclass(cls, torch.nn.Module):
                _set(stack, cls, "__call__", _through(recorder, vars(cls)["__call__"]))
        _set(stack, AutogradFunctionBase, "apply", classmethod(_apply_through(recorder)))
        if APPLY_IS_IN_C:
            for names, name, apply in _bound_earlier(model):
                stack.callback(names.__setitem__, name, apply)
                names[name] = _bound(recorder, apply)
        encoder = torch.nn.TransformerEncoder
        _set(stack, encoder, "forward", _unpacked(recorder, encoder.forward))
        for owner, name in ((torch, "manual_seed"), (torch, "set_rng_state"), (torch, "seed"),
                            (torch.random, "manual_seed"), (torch.random, "set_rng_state"), (torch.random, "fork_rng")):
            _set(stack, owner, name, _refuse(recorder, getattr(owner, name), "sets the state of the random numbers"))
        for owner in (torch, torch.func):
            _set(stack, owner, "vmap", _mapping(recorder, owner.vmap))
        for name in ("from_numpy", "frombuffer"):
            _set(stack, torch, name, _refuse(recorder, getattr(torch, name), f"calls torch.{name}"))
        hub = sys.modules.get("transformers.utils.import_utils")
        if hub is not None and hasattr(hub, "is_fake_tensor"):
            # It takes other paths for fake tensors than for real ones; the recording must take the real ones' path.
            _set(stack, hub, "is_fake_tensor", lambda tensor: False)
        if DYNAMO_MODULE in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _set(stack: contextlib.ExitStack, owner: object, name: str, value: object) -> None:
    inherited = isinstance(owner, type) and name not in vars(owner)
    old = None if inherited else (vars(owner)[name] if isinstance(owner, type) else getattr(owner, name))
    setattr(owner, name, value)
    stack.callback(delattr, owner, name) if inherited else stack.callback(setattr, owner, name, old)


def _through(recorder: Recorder, original: Callable) -> Callable:
    def __call__(module, *args, **kwargs):
        return recorder.call_module(original, module, args, kwargs)
    return __call__


def _apply_through(recorder: Recorder) -> Callable:
    def apply(cls, *args, **kwargs):
        own_apply = apply_in_c.__get__(None, cls)
        # The node calls what the user would have called; where that is this stand-in, the one that it stands for.
        target = own_apply if APPLY_IS_IN_C else cls.apply
        return recorder.call_autograd_function(own_apply, target, cls, args, kwargs)
    return apply


def _unpacked(recorder: Recorder, original: Callable) -> Callable:
    def forward(encoder, *args, **kwargs):
        if recorder.hidden:
            return original(encoder, *args, **kwargs)
        return with_zeroed_padding(original, recorder.ask, encoder, *args, **kwargs)
    return forward


def _bound_earlier(model: torch.nn.Module) -> Iterator[tuple[dict, str, Callable]]:
    """Where ``apply = Square.apply`` of an autograd function lies: (names, name, apply) of the modules of Python and of
    ``model``. What such an ``apply`` does cannot be changed from outside where it is torch's own in C."""
    places = [vars(module) for name, module in list(sys.modules.items())
              if isinstance(module, ModuleType) and not name.startswith("torch.")]
    for names in (*places, *(vars(module) for module in model.modules())):
        for name, value in list(names.items()):
            if type(value) is BuiltinMethodType and value.__name__ == "apply" and isinstance(value.__self__, type) \
                    and issubclass(value.__self__, torch.autograd.Function):
                yield names, name, value


def _bound(recorder: Recorder, apply: BuiltinMethodType) -> Callable:
    def stand_in(*args, **kwargs):
        return recorder.call_autograd_function(apply, apply, apply.__self__, args, kwargs)
    return stand_in


def _mapping(recorder: Recorder, original: Callable) -> Callable:
    """``vmap`` whose result, where no other transform runs, is one node."""
    def vmap(function, *args, **kwargs):
        mapped = original(getattr(function, "mapped", function), *args, **kwargs)

        def stand_in(*inputs, **others):
            return recorder.call_mapped(mapped, inputs, others)
        stand_in.mapped = mapped
        return stand_in
    return vmap


def _refuse(recorder: Recorder, original: Callable, what: str) -> Callable:
    def stand_in(*args, **kwargs):
        recorder.refuse(what)
        return original(*args, **kwargs)
    return stand_in
