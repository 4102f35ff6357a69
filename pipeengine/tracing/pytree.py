"""Tensors inside nested Python objects: find them, replace them, put them back.

Understood are tuples, lists, dicts, slices, named tuples, dataclasses, everything registered with torch's pytree (model
outputs of Hugging Face among them). Any other object is a leaf.
"""
from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial

import torch

from pipeengine.torch_private import PYTREE_NODES
from pipeengine.tracing.recording import ATOMS, Rebuilt


def tree_encode(value: object, leaf: Callable[[object], object]) -> object:
    """A picture of ``value`` in plain containers, with ``leaf`` applied to tensors and unknown objects."""
    return _walked(value, leaf, lambda build, items: Rebuilt(build, tuple(items)))


def tree_map(value: object, leaf: Callable[[object], object]) -> object:
    """``value`` made again with ``leaf`` applied to every tensor and unknown object."""
    return _walked(value, leaf, lambda build, items: build(items))


def _walked(value: object, leaf: Callable[[object], object], rebuild: Callable[[Callable, list], object]) -> object:
    kind = type(value)
    if isinstance(value, ATOMS):
        return value
    if kind in (tuple, torch.Size):
        return tuple([_walked(item, leaf, rebuild) for item in value])
    if kind is list:
        return [_walked(item, leaf, rebuild) for item in value]
    if kind is dict:
        return {key: _walked(item, leaf, rebuild) for key, item in value.items()}
    if kind is slice:
        return slice(*[_walked(bound, leaf, rebuild) for bound in (value.start, value.stop, value.step)])
    parts = None if isinstance(value, torch.Tensor) else _parts(value)
    if parts is None:
        return leaf(value)
    build, items = parts
    return rebuild(build, [_walked(item, leaf, rebuild) for item in items])


def _parts(value: object) -> tuple[Callable, list] | None:
    """How to take an object of a known type apart, and the function that makes it again."""
    kind = type(value)
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return partial(tuple.__new__, kind), list(value)
    if kind in PYTREE_NODES:
        items, context = PYTREE_NODES[kind].flatten_fn(value)
        return partial(_unflatten, kind, context), list(items)
    if isinstance(value, dict):
        return partial(_fill_dict, kind, tuple(value)), list(value.values())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = tuple(f.name for f in dataclasses.fields(value) if hasattr(value, f.name))
        return partial(_fill_fields, value, names), [getattr(value, name) for name in names]
    return None


def _unflatten(kind: type, context: object, items: list) -> object:
    return PYTREE_NODES[kind].unflatten_fn(items, context)


def _fill_dict(kind: type, keys: tuple, items: list) -> object:
    return kind(zip(keys, items))


def _fill_fields(template: object, names: tuple[str, ...], items: list) -> object:
    made = copy.copy(template)
    for name, item in zip(names, items):
        object.__setattr__(made, name, item)
    return made


def leaves(value: object) -> list:
    """The tensors and unknown objects inside ``value``, in a fixed order."""
    found: list = []
    tree_encode(value, found.append)
    return found


def tensors(value: object) -> list[torch.Tensor]:
    """The tensors inside ``value``, in the order of ``leaves``."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, torch.Tensor)]
