"""Send what a forward does to the recorder: calls of modules, autograd functions, changes of random state."""
from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import torch

from pipeengine.tracing.recorder import NotTraceable, Recorder


@contextlib.contextmanager
def intercepted(model: torch.nn.Module, recorder: Recorder) -> Iterator[None]:
    """Send module calls, autograd functions and changes of random state to the recorder; put everything back after."""
    with contextlib.ExitStack() as stack:
        classes = {cls for module in model.modules() for cls in type(module).__mro__ if "__call__" in vars(cls)}
        for cls in classes:
            if issubclass(cls, torch.nn.Module):
                _set(stack, cls, "__call__", _through(recorder, vars(cls)["__call__"]))
        base = torch.autograd.function._SingleLevelFunction
        original_apply = base.apply.__func__ if hasattr(base.apply, "__func__") else None
        _set(stack, base, "apply", classmethod(_apply_through(recorder, original_apply)))
        for owner, name in ((torch, "manual_seed"), (torch, "set_rng_state"), (torch, "seed"),
                            (torch.random, "manual_seed"), (torch.random, "set_rng_state"), (torch.random, "fork_rng")):
            _set(stack, owner, name, _refuse(recorder, getattr(owner, name), "sets the state of the random numbers"))
        for name in ("from_numpy", "frombuffer"):
            _set(stack, torch, name, _refuse(recorder, getattr(torch, name), f"calls torch.{name}"))
        hub = sys.modules.get("transformers.utils.import_utils")
        if hub is not None and hasattr(hub, "is_fake_tensor"):
            # It takes other paths for fake tensors than for real ones; the recording must take the real ones' path.
            _set(stack, hub, "is_fake_tensor", lambda tensor: False)
        if "torch._dynamo" in sys.modules:
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


def _apply_through(recorder: Recorder, original: Callable | None) -> Callable:
    def call(cls, *args, **kwargs):
        if original is not None:
            return original(cls, *args, **kwargs)
        return super(torch.autograd.function._SingleLevelFunction, cls).apply(*args, **kwargs)

    def apply(cls, *args, **kwargs):
        return recorder.apply_function(call, cls, args, kwargs)
    return apply


def _refuse(recorder: Recorder, original: Callable, what: str) -> Callable:
    def stand_in(*args, **kwargs):
        if recorder._suspended:
            return original(*args, **kwargs)
        raise NotTraceable(recorder._path(), what)
    return stand_in
