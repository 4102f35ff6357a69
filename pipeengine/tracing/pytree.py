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
    kind = type(value)
    if kind in (tuple, torch.Size):
        return tuple([tree_encode(item, leaf) for item in value])
    if kind is list:
        return [tree_encode(item, leaf) for item in value]
    if kind is dict:
        return {key: tree_encode(item, leaf) for key, item in value.items()}
    if kind is slice:
        return slice(tree_encode(value.start, leaf), tree_encode(value.stop, leaf), tree_encode(value.step, leaf))
    if isinstance(value, ATOMS):
        return value
    if isinstance(value, torch.Tensor):
        return leaf(value)
    parts = _parts(value)
    if parts is None:
        return leaf(value)
    build, items = parts
    return Rebuilt(build, tuple([tree_encode(item, leaf) for item in items]))


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


def tree_map(value: object, leaf: Callable[[object], object]) -> object:
    """``value`` made again with ``leaf`` applied to every tensor and unknown object."""
    kind = type(value)
    if isinstance(value, ATOMS):
        return value
    if kind in (tuple, torch.Size):
        return tuple([tree_map(item, leaf) for item in value])
    if kind is list:
        return [tree_map(item, leaf) for item in value]
    if kind is dict:
        return {key: tree_map(item, leaf) for key, item in value.items()}
    if kind is slice:
        return slice(tree_map(value.start, leaf), tree_map(value.stop, leaf), tree_map(value.step, leaf))
    parts = None if isinstance(value, torch.Tensor) else _parts(value)
    if parts is None:
        return leaf(value)
    build, items = parts
    return build([tree_map(item, leaf) for item in items])
