"""The Python side of a model's state: attributes of its modules, Python's random numbers, global switches."""
from __future__ import annotations

import contextlib
import functools
import gc
import logging
import random
import types
from collections.abc import Iterator

import numpy
import torch

from pipeengine.torch_private import FAKE_TENSOR_LOGGER, FakeTensor

TENSOR_TABLES = ("_parameters", "_buffers", "_modules", "_flat_weights", "_non_persistent_buffers_set")


def shallow(value: object) -> list:
    """``value`` and, for a plain container, what it holds."""
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple, set)) else [value]


def python_state(module: torch.nn.Module) -> dict[str, tuple]:
    """The Python state of a module: every attribute, with the contents of plain containers."""
    return {name: (value, _contents(value)) for name, value in vars(module).items() if name not in TENSOR_TABLES}


def _contents(value: object) -> object:
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, (list, set)) or type(value).__name__ == "deque":
        return list(value)
    return None


def difference(before: dict[str, tuple], after: dict[str, tuple]) -> str:
    """Name of the first attribute that is not what it was, or an empty text. Tensors are data, not state."""
    for name in {**before, **after}:
        if name not in after:
            return name
        value, contents = after[name]
        if all(isinstance(leaf, FakeTensor) or leaf is None for leaf in shallow(value)) and name not in before:
            continue
        old, old_contents = before.get(name, (None, None))
        if isinstance(value, torch.Tensor) or isinstance(old, torch.Tensor):
            continue
        same = value is old or (_is_number(value) and type(value) is type(old) and value == old)
        if not same or not _same_contents(old_contents, contents):
            return name
    return ""


def _same_contents(before: object, after: object) -> bool:
    if isinstance(before, dict) and isinstance(after, dict):
        return list(before) == list(after) and all(
            before[k] is after[k] or _is_number(before[k]) and before[k] == after[k] or isinstance(after[k], FakeTensor)
            for k in after)
    if isinstance(before, list) and isinstance(after, list):
        return len(before) == len(after) and all(a is b or isinstance(b, FakeTensor) for a, b in zip(before, after))
    return before is None and after is None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, bool, str))


def restore(module: torch.nn.Module, before: dict[str, tuple]) -> None:
    """Put all attributes of ``module`` back to what ``python_state`` saw."""
    for name in [name for name in vars(module) if name not in TENSOR_TABLES]:
        restore_attribute(module, name, before)
    for name in before:
        if name not in vars(module):
            restore_attribute(module, name, before)


def restore_attribute(module: torch.nn.Module, name: str, before: dict[str, tuple]) -> None:
    """Put one attribute back, the contents of plain containers included."""
    if name not in before:
        del vars(module)[name]
        return
    value, contents = before[name]
    vars(module)[name] = value
    if contents is None or _same_contents(contents, _contents(value)):
        return
    value.clear()
    (value.update if isinstance(value, (dict, set)) else value.extend)(contents)


def restore_children(module: torch.nn.Module, before: dict[str, torch.nn.Module | None]) -> None:
    """Put the submodules back as they were."""
    if not isinstance(module, torch.jit.ScriptModule) and dict(module._modules) != before:
        module._modules.clear()
        module._modules.update(before)


def python_random() -> tuple:
    """The states of Python's and NumPy's random numbers."""
    kind, keys, position, has_gauss, cached = numpy.random.get_state()
    return random.getstate(), (kind, keys.tobytes(), position, has_gauss, cached)


def look_or_set(state: tuple | None = None) -> tuple | None:
    """The present random state without an argument; with one, set it."""
    return python_random() if state is None else set_python_random(state)


def set_python_random(state: tuple) -> None:
    """Go back to a state that ``python_random`` returned."""
    random.setstate(state[0])
    kind, keys, position, has_gauss, cached = state[1]
    numpy.random.set_state((kind, numpy.frombuffer(keys, dtype=numpy.uint32), position, has_gauss, cached))


@contextlib.contextmanager
def quiet_globals() -> Iterator[None]:
    """Random states and the autocast cache come out as they went in."""
    python = python_random()
    cache = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    log = logging.getLogger(FAKE_TENSOR_LOGGER)    # a kernel that cannot be faked is no news here
    level = log.level
    log.setLevel(logging.CRITICAL)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = [] if accelerator is None else list(range(torch.accelerator.device_count()))
    try:
        with torch.random.fork_rng(devices, device_type=accelerator.type if accelerator else "cuda"):
            yield
    finally:
        log.setLevel(level)
        set_python_random(python)
        torch.set_autocast_cache_enabled(cache)


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Whatever runs inside leaves no trace in submodules, buffers, attributes or random states."""
    modules = dict(model.named_modules())
    children = {path: dict(module._modules) for path, module in modules.items()}
    attributes = {path: python_state(module) for path, module in modules.items()}
    buffers = {path: {name: (tensor, tensor.detach().clone())
                      for name, tensor in module._buffers.items() if tensor is not None}
               for path, module in modules.items()}
    with quiet_globals():
        try:
            yield
        finally:
            for path, module in modules.items():
                restore(module, attributes[path])
                restore_children(module, children[path])
                for name, (tensor, value) in buffers[path].items():
                    with torch.no_grad():
                        tensor.copy_(value)
                    module._buffers[name] = tensor


def empty_caches() -> None:
    """A cached function of the user's may have kept a fake tensor; it shall make a real one next time."""
    for found in gc.get_objects():
        if type(found) is functools._lru_cache_wrapper and found.cache_info().currsize and _holds_fakes(found):
            found.cache_clear()


def _holds_fakes(cache: object) -> bool:
    """Whether an ``lru_cache`` holds fakes: in its links, their contents, or what those hold directly."""
    layer = [cache]
    for _ in range(5):
        layer = [x for x in gc.get_referents(*layer) if type(x) not in (type, types.ModuleType, types.FunctionType)]
        if any(type(x) is FakeTensor for x in layer):
            return True
    return False
