"""Notes what is read from Python while a model is recorded.

Attributes of modules, and of objects that are found through them, are noted as they are read. Globals, closures and
defaults are read from the code of the functions that may run: there is no moment at which they could be seen.
"""
from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

from pipeengine.torch_private import FakeTensor
from pipeengine.tracing.python_reads import (
    MISSING,
    Absent,
    Attribute,
    Cell,
    Entry,
    Identity,
    InContext,
    Length,
    OfClass,
    Place,
    identity,
)
from pipeengine.tracing.recording import ATOMS

# What every module has, besides what its author gave it. ``training`` is part of a recording's key.
_OWN_NAMES = frozenset(vars(torch.nn.Module())) | {
    "_compiled_call_impl", "_version", "call_super_init", "_flat_weights", "_flat_weights_names", "_flat_weight_refs"}
_CONTAINERS = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential)
# Whose functions read no global that a training loop changes.
_LIBRARIES = frozenset({"torch", "transformers", "numpy", "timm", "diffusers", "torchvision", "einops", "peft",
                        "accelerate", "safetensors", "networkx", "pipeengine"}) | sys.stdlib_module_names - {"__main__"}
_NAMESPACES = ("argparse.Namespace", "types.SimpleNamespace")
_MOST_ENTRIES, _DEEPEST = 1024, 5


class ReadLog:
    """The entries that one recording depends on, by identity of place and key."""

    def __init__(self, names: dict[torch.nn.Module, str]):
        """``names``: paths of the modules of the model."""
        self._names = names
        self._entries: dict[Identity, Entry] = {}
        self._seen: set[tuple[int, str]] = set()
        self._objects: dict[int, tuple[str, object]] = {}
        self._followed: dict[int, object] = {}
        self._logged: set[type] = set()
        self._stack = contextlib.ExitStack()
        self._keep: list[object] = []               # so that no id is used twice
        self._paused = 0

    def entries(self) -> Iterable[Entry]:
        """What was read, and what could have been; without what the forward itself has made."""
        return self._entries.values()

    @contextlib.contextmanager
    def watching(self, functions: Iterable[object]) -> Iterator[None]:
        """Note what is read inside; ``functions`` are those that may run there besides methods of the modules."""
        with self._stack:
            self._log_class(torch.nn.Module)
            for module in {type(module): module for module in self._names}.values():
                for cls in type(module).__mro__:
                    if not _is_library(cls):
                        self._scan_class(cls)
            for function in functions:
                self._follow("loss_fn", function, 0)
            yield

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing inside is noted: it will run as it is."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    # -- attributes ---------------------------------------------------------------------------------------------------

    def _log_class(self, cls: type) -> bool:
        """Note reads from instances of ``cls`` from now on; False where that cannot be."""
        if cls in self._logged:
            return True
        original: Any = cls.__getattribute__
        own = "__getattribute__" in vars(cls)

        def __getattribute__(owner: object, name: str) -> object:
            try:
                value = original(owner, name)
            except AttributeError:
                self._note(owner, name, MISSING)
                raise
            self._note(owner, name, value)
            return value
        try:
            cls.__getattribute__ = __getattribute__         # type: ignore[method-assign,assignment]
        except TypeError:
            return False
        self._stack.callback(setattr, cls, "__getattribute__", original) if own else \
            self._stack.callback(delattr, cls, "__getattribute__")
        self._logged.add(cls)
        return True

    def _note(self, owner: object, name: str, value: object) -> None:
        """``owner.name`` was read, and is ``value``."""
        if self._paused or (id(owner), name) in self._seen or name.startswith("__"):
            return
        self._paused += 1                           # what follows reads attributes too
        try:
            self._seen.add((id(owner), name))
            self._keep.append(owner)
            if isinstance(owner, torch.nn.Module):
                self._note_of_module(owner, name, value)
            elif id(owner) in self._objects:
                self._note_of_object(self._objects[id(owner)][0], owner, name, value)
        finally:
            self._paused -= 1

    def _note_of_module(self, module: torch.nn.Module, name: str, value: object) -> None:
        path = self._names.get(module)
        if path is None:
            if id(module) not in self._objects:         # born in the forward
                return
            path = self._objects[id(module)][0]
        if name == "_modules" and isinstance(module, _CONTAINERS):
            self._follow(f"{path}.children", value, 1)
        if name in _OWN_NAMES:
            return
        label, own = f"{path}.{name}", vars(module)
        if value is MISSING:
            if name in module._modules:
                self._add(label, module._modules, name, module._modules[name], 0)
            elif name not in module._parameters and name not in module._buffers:
                self._add(label, Absent(own), name, MISSING, 0)
            elif module not in self._names and name in module._buffers:     # of a loss: no stage takes it by name
                self._add(label, module._buffers, name, module._buffers[name], 0)
        elif name in own:
            self._add(label, own, name, value, 0)
        else:
            self._note_of_class(label, module, name, value)

    def _note_of_class(self, label: str, owner: object, name: str, value: object) -> None:
        """A value that stands in the class, until the object gets one of its own."""
        for cls in type(owner).__mro__:
            if name in vars(cls):
                if isinstance(value, ATOMS) and not hasattr(vars(cls)[name], "__get__"):
                    self._add(label, OfClass(cls), name, value, 0)
                    self._add(label, Absent(vars(owner)), name, MISSING, 0)
                return

    def _note_of_object(self, label: str, owner: object, name: str, value: object) -> None:
        own = getattr(owner, "__dict__", {})
        if value is MISSING:
            self._add(f"{label}.{name}", Absent(own), name, MISSING, 0)
        elif name in own:
            self._add(f"{label}.{name}", own, name, value, 0)
        elif hasattr(type(owner), name):
            if hasattr(getattr(type(owner), name), "__set__"):              # a slot; of a property the parts are noted
                self._add(f"{label}.{name}", Attribute(owner), name, value, 0)
            else:
                self._note_of_class(f"{label}.{name}", owner, name, value)
        elif isinstance(value, ATOMS):
            self._add(f"{label}.{name}", Attribute(owner), name, value, 0)

    # -- entries ------------------------------------------------------------------------------------------------------

    def _add(self, label: str, place: Place, key: object, value: object, depth: int) -> None:
        if isinstance(value, FakeTensor) or identity(place, key) in self._entries:
            return
        self._entries[identity(place, key)] = Entry(label, place, key, value)
        self._follow(label, value, depth)

    def _follow(self, label: str, value: object, depth: int) -> None:
        """Note what stands behind ``value``: the contents of containers, what functions read, what objects tell."""
        if depth > _DEEPEST or isinstance(value, (*ATOMS, type, torch.Tensor)) or value is MISSING:
            return
        if isinstance(value, (list, tuple, dict)):
            self._follow_container(label, value, depth)
        elif isinstance(value, ContextVar):
            self._add(f"{label}.get()", InContext(value), None, value.get(MISSING), depth + 1)
        elif isinstance(value, (FunctionType, MethodType, functools.partial, staticmethod, classmethod, property)):
            self._scan(label, value, depth)
        elif not isinstance(value, (torch.nn.Module, ModuleType)):
            self._follow_object(label, value, depth)
        elif isinstance(value, torch.nn.Module) and value not in self._names:
            for path, module in value.named_modules(prefix=label):
                self._objects.setdefault(id(module), (path, module))

    def _follow_container(self, label: str, value: list | tuple | dict, depth: int) -> None:
        if len(value) > _MOST_ENTRIES or id(value) in self._followed:
            return
        self._followed[id(value)] = value
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        if isinstance(value, tuple):
            for key, item in items:
                self._follow(f"{label}[{key!r}]", item, depth + 1)
            return
        self._add(f"len({label})", Length(value), len(value), True, depth)
        for key, item in items:
            if isinstance(key, (str, int)):
                self._add(f"{label}[{key!r}]", value, key, item, depth + 1)

    def _follow_object(self, label: str, value: object, depth: int) -> None:
        kind = type(value)
        if id(value) in self._objects:
            return
        if f"{kind.__module__}.{kind.__name__}" in _NAMESPACES:
            self._follow_container(label, vars(value), depth)
        elif _root(kind) not in ("torch", "numpy") and _root(kind) not in sys.stdlib_module_names - {"__main__"} \
                and not issubclass(kind, BaseException):
            self._objects[id(value)] = (label, value)
            if not self._log_class(kind) and hasattr(value, "__dict__"):
                self._follow_container(label, vars(value), depth)
            for cls in kind.__mro__:
                if not _is_library(cls):
                    self._scan_class(cls)

    # -- functions ----------------------------------------------------------------------------------------------------

    def _scan_class(self, cls: type) -> None:
        for name, function in list(vars(cls).items()):
            if isinstance(function, (FunctionType, staticmethod, classmethod, property)):
                self._scan(f"{cls.__name__}.{name}", function, 0)

    def _scan(self, label: str, function: object, depth: int) -> None:
        """Note globals, cells and defaults that ``function``, and what it may call, can read."""
        if id(function) in self._followed:
            return
        self._followed[id(function)] = function
        if isinstance(function, MethodType):
            self._follow(label, function.__self__, depth + 1)
            self._scan(label, function.__func__, depth)
        elif isinstance(function, (staticmethod, classmethod)):
            self._scan(label, function.__func__, depth)
        elif isinstance(function, property):
            if function.fget is not None:
                self._scan(label, function.fget, depth)
        elif isinstance(function, functools.partial):
            self._follow(label, function.args, depth + 1)
            self._follow(label, function.keywords, depth + 1)
            self._follow(label, function.func, depth + 1)
        elif isinstance(function, FunctionType) and depth <= _DEEPEST and not _is_library(function):
            self._scan_function(label, function, depth)

    def _scan_function(self, label: str, function: FunctionType, depth: int) -> None:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
            with contextlib.suppress(ValueError):
                self._add(f"{label}.{name}", Cell(cell), None, cell.cell_contents, depth + 1)
        for name in ("__defaults__", "__kwdefaults__"):
            if getattr(function, name):
                self._add(f"{label}.{name}", Attribute(function), name, getattr(function, name), depth + 1)
        names = set(_names(function.__code__))
        for name in sorted(names):
            value = function.__globals__.get(name, MISSING)
            if isinstance(value, ModuleType):
                if not _is_library_name(value.__name__):
                    self._scan_module(name, value, names, depth)
            elif value is not MISSING and not isinstance(value, type):
                self._add(f"global {name}", function.__globals__, name, value, depth + 1)

    def _scan_module(self, label: str, module: ModuleType, names: set[str], depth: int) -> None:
        """What of a Python module a function may read: ``settings.scale``."""
        for name in sorted(names & vars(module).keys()):
            value = vars(module)[name]
            if not isinstance(value, (type, ModuleType)):
                self._add(f"{label}.{name}", vars(module), name, value, depth + 1)


def _names(code: CodeType) -> Iterator[str]:
    """Names of globals and attributes that ``code`` mentions, functions inside it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _root(thing: Callable | type) -> str:
    return (getattr(thing, "__module__", None) or "").partition(".")[0]


def _is_library(thing: Callable | type) -> bool:
    return _root(thing) in _LIBRARIES


def _is_library_name(name: str) -> bool:
    return name.partition(".")[0] in _LIBRARIES
