"""What a forward makes for itself besides tensors, and that a recording can make again: caches and mapped functions."""
from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CellType, FunctionType

import torch

from pipeengine.tracing.pytree import tree_map


def tensor_of(data: object, dtype: torch.dtype | None = None, device: torch.device | str | None = None,
              **others: object) -> torch.Tensor:
    """``torch.tensor(data)`` for nested lists that hold tensors, of which torch would read the numbers."""
    made = _stacked(data)
    if device is None:
        device = torch.get_default_device()
    return made.detach().to(device=device, dtype=dtype or made.dtype)


def _stacked(data: object) -> torch.Tensor:
    if isinstance(data, torch.Tensor):
        return data
    if not isinstance(data, (list, tuple)):
        return torch.tensor(data)
    parts = [_stacked(item) for item in data]
    kind = functools.reduce(torch.promote_types, [part.dtype for part in parts])
    device = next((part.device for part, item in zip(parts, data) if isinstance(item, torch.Tensor)), parts[0].device)
    return torch.stack([part.to(device=device, dtype=kind) for part in parts])


# -- caches -----------------------------------------------------------------------------------------------------------


def is_cache(value: object) -> bool:
    """Whether ``value`` is a key-value cache of Hugging Face: empty in the beginning, and read by nobody after its
    layer."""
    return any(cls.__name__ == "Cache" and cls.__module__.startswith("transformers.") for cls in type(value).__mro__)


def is_returned(value: object, caches: bool) -> bool:
    """Whether an evaluation returns such an object of the model's output; ``caches`` says so of caches."""
    return caches or not (is_cache(value) or type(value).__name__.endswith("Cache"))


def empty_cache(kind: Callable[..., object]) -> object:
    """A new cache of this type."""
    if kind.__name__ == "EncoderDecoderCache":
        dynamic = sys.modules[kind.__module__].DynamicCache
        return kind(dynamic(), dynamic())
    return kind()


def with_empty_caches(structure: object) -> object:
    """``structure`` with a new cache in place of every cache."""
    return tree_map(structure, lambda leaf: empty_cache(type(leaf)) if is_cache(leaf) else leaf)


# -- objects in the model's output ------------------------------------------------------------------------------------


class NotReturnable(Exception):
    """An object cannot be taken apart and made again."""


def object_parts(value: object) -> tuple[Callable[[list], object], list]:
    """What an object made in the forward holds, and the function that makes one like it from such parts.

    Raises ``NotReturnable`` where there is more to it than attributes.
    """
    kind = type(value)
    if isinstance(value, torch.nn.Module) or not hasattr(value, "__dict__") or kind.__reduce_ex__ is not \
            object.__reduce_ex__ or any("__slots__" in vars(cls) and vars(cls)["__slots__"] for cls in kind.__mro__):
        raise NotReturnable("it is no plain object of tensors and numbers")
    held = vars(value)
    return functools.partial(_remade, kind, tuple(held)), list(held.values())


def _remade(kind: type, names: tuple[str, ...], parts: list) -> object:
    made: object = object.__new__(kind)
    vars(made).update(zip(names, parts, strict=True))
    return made


# -- functions that vmap has mapped -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Hole:
    """Stands for a tensor in a function's closure."""

    number: int


class MappedFunction:
    """A function that ``torch.vmap`` has mapped, without the tensors of its closure: those are its first argument."""

    __name__ = "vmap"

    def __init__(self, function: Callable):
        self.captured = list({id(tensor): tensor for tensor in _closed_over(function)}.values())
        holes = {id(tensor): _Hole(number) for number, tensor in enumerate(self.captured)}
        self._template: object = _rebound(function, lambda value: holes.get(id(value), value))

    def __call__(self, captured: tuple[torch.Tensor, ...], *args: object, **kwargs: object) -> object:
        function = _rebound(self._template, lambda value: captured[value.number] if isinstance(value, _Hole) else value)
        assert callable(function), "a function stays one"
        return function(*args, **kwargs)


class NotMappable(Exception):
    """The function reads what a recording could not follow."""


def _closed_over(value: object) -> Iterator[torch.Tensor]:
    """Tensors that a function can reach through its closure."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            yield from _closed_over(_contents(cell))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _closed_over(item)
    elif isinstance(value, torch.nn.Module) or isinstance(getattr(value, "__self__", None), torch.nn.Module):
        raise NotMappable(type(value).__name__)


def _rebound(value: object, swap: Callable[[object], object]) -> object:
    """``value`` with ``swap`` applied to what closures hold; the same object where nothing changes."""
    if isinstance(value, FunctionType):
        cells = value.__closure__ or ()
        old = [_contents(cell) for cell in cells]
        new = [_rebound(content, swap) for content in old]
        if all(a is b for a, b in zip(old, new)):
            return value
        function = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__,
                                tuple(map(CellType, new)))
        function.__kwdefaults__ = value.__kwdefaults__
        return function
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        items = [_rebound(item, swap) for item in value]
        if all(a is b for a, b in zip(value, items)):
            return value
        return tuple(items) if isinstance(value, tuple) else items
    return swap(value)


def _contents(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return None
