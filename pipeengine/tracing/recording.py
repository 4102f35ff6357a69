"""A recorded forward pass, as data.

A ``Recording`` is a list of nodes in the order in which eager execution ran them. A node calls one of the user's own
modules or a torch function; tensors are numbered values. Nothing here runs a model.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import NamedTuple

import torch

from pipeengine.tracing.modes import Modes
from pipeengine.tracing.python_reads import PythonReads

ATOMS = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, torch.layout,
         torch.memory_format)
OPAQUE = object()
"""Stands for an object in a module's output that cannot be handed on."""


@dataclass(frozen=True, slots=True)
class Missing:
    """Stands for an object of type ``kind`` in the model's output that is not returned. ``why`` is empty for a cache
    that nobody asked for, and else says what hinders."""

    kind: str
    why: str = ""


class Ref(NamedTuple):
    """Stands for tensor value number ``value`` inside the arguments or the output of a node."""

    value: int


class Rebuilt(NamedTuple):
    """Stands for an object of a registered or dataclass type: ``build(parts)`` makes it again."""

    build: Callable
    parts: tuple


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What two sides must know to exchange a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]
    requires_grad: bool

    @property
    def bytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Value:
    """One tensor of the recording.

    ``kind`` is ``"input"``, ``"attribute"`` (a parameter or buffer, ``name`` is its original name), ``"constant"``
    (any other tensor that existed before), or ``"result"`` (of node number ``node``). Values with equal ``storage``
    alias.
    """

    kind: str
    name: str
    node: int
    spec: TensorSpec
    storage: int


@dataclass(frozen=True, slots=True)
class NodeCost:
    """Counted on fake tensors: floating-point operations, bytes read and written, bytes kept for backward.

    ``scratch``: bytes of the largest tensor that is made inside and neither returned nor kept.
    """

    flops: int = 0
    bytes: int = 0
    saved: tuple[tuple[int, int], ...] = ()     # (storage, bytes) of what autograd keeps
    scratch: int = 0

    @property
    def saved_bytes(self) -> int:
        """Bytes kept for backward."""
        return sum(size for _, size in self.saved)


@dataclass(frozen=True, slots=True)
class Node:
    """One step of the recording.

    ``target`` is a function, or the path of a module when ``is_module``. ``results`` are the values it makes, in the
    order in which ``flatten`` meets them in what it returns. ``writes`` are storages it changes in place.
    """

    name: str
    target: Callable | str
    is_module: bool
    args: tuple
    kwargs: dict
    results: tuple[int, ...]
    picks: tuple[str, ...]              # how to take each result from what the target returns: "", "[i]" or "@leaf"
    call: int
    modes: Modes
    writes: frozenset[int]
    attributes: tuple[int, ...]         # parameters and buffers a module call reads
    random: bool
    effect: bool                        # keeps its place though nobody reads its results
    recompute: bool
    cost: NodeCost


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module that was opened: its nodes are ``start <= index < end``."""

    path: str
    scope: str
    parent: int
    start: int
    end: int
    args: tuple
    kwargs: dict
    output: object
    modes: Modes
    plain_arguments: bool               # no argument is an object that we cannot make again


@dataclass(frozen=True, slots=True)
class Guard:
    """A Python value that the forward took from a tensor; the recording holds only while it is the same.

    ``target(*args, **kwargs)`` gives ``expected``; with ``target`` None the shape of ``args[0]`` is meant.
    """

    target: Callable | None
    args: tuple
    kwargs: dict
    expected: object
    position: int                       # number of nodes recorded before it
    path: str                           # of the module that took it
    where: str


@dataclass(frozen=True)
class Recording:
    """One eager forward, with everything that was burnt into it."""

    values: tuple[Value, ...]
    nodes: tuple[Node, ...]
    calls: tuple[Call, ...]
    guards: tuple[Guard, ...]
    inputs: tuple[int, ...]             # value of every tensor leaf of the inputs, in order
    output: object                      # structure with Refs
    loss: int | None
    constants: Mapping[int, torch.Tensor] = field(repr=False)
    leaf_modules: Mapping[str, str] = field(default_factory=dict)     # module path -> why it was not opened
    buffers: frozenset[str] = frozenset()
    modes: Modes = Modes(True, False, ())
    python: PythonReads = field(default=PythonReads(), repr=False)    # what it read besides tensors
    reshaped: frozenset[str] = frozenset()      # modules whose first forward swapped modules, and what it changed so

    @cached_property
    def _index(self) -> dict[int, int]:
        return {id(node): index for index, node in enumerate(self.nodes)}

    def index_of(self, node: Node) -> int:
        """Where ``node`` stands."""
        return self._index[id(node)]

    def __repr__(self) -> str:
        return (f"<Recording of {len(self.nodes)} nodes, {len(self.inputs)} inputs, {len(self.guards)} guards, "
                f"{len(self.leaf_modules)} modules kept whole>")

    def __str__(self) -> str:
        return "\n".join(f"{index:5} {node.name} -> {', '.join(str(v) for v in node.results)}"
                         for index, node in enumerate(self.nodes))


def refs(structure: object) -> Iterator[int]:
    """Every value that ``structure`` mentions, in order, repeats included."""
    if isinstance(structure, Ref):
        yield structure.value
    elif isinstance(structure, Rebuilt):
        for part in structure.parts:
            yield from refs(part)
    elif isinstance(structure, (tuple, list)):
        for item in structure:
            yield from refs(item)
    elif isinstance(structure, dict):
        for item in structure.values():
            yield from refs(item)
    elif isinstance(structure, slice):
        yield from refs((structure.start, structure.stop, structure.step))


def node_refs(node: Node) -> Iterator[int]:
    """Every value that ``node`` reads, attributes of its module included."""
    yield from refs(node.args)
    yield from refs(node.kwargs)
    yield from node.attributes


def encoded_leaves(structure: object) -> list:
    """Refs and other objects inside an encoded structure, in the order of ``structure.leaves`` on the real one."""
    if isinstance(structure, Ref):
        return [structure]
    if isinstance(structure, Rebuilt):
        return [leaf for part in structure.parts for leaf in encoded_leaves(part)]
    if isinstance(structure, (tuple, list)):
        return [leaf for item in structure for leaf in encoded_leaves(item)]
    if isinstance(structure, dict):
        return [leaf for item in structure.values() for leaf in encoded_leaves(item)]
    if isinstance(structure, slice):
        return encoded_leaves((structure.start, structure.stop, structure.step))
    return [] if isinstance(structure, ATOMS) else [structure]


def picks(structure: object, wanted: Iterable[int]) -> tuple[str, ...]:
    """How to take the values ``wanted`` out of an object of this (encoded) structure."""
    if isinstance(structure, Ref):
        return ("",)
    if isinstance(structure, (tuple, list)) and not isinstance(structure, (Ref, Rebuilt)) \
            and all(isinstance(item, (Ref, *ATOMS)) for item in structure):
        index_of = {item.value: f"[{index}]" for index, item in enumerate(structure) if isinstance(item, Ref)}
    else:
        index_of = {leaf.value: f"@{index}" for index, leaf in enumerate(encoded_leaves(structure))
                    if isinstance(leaf, Ref)}
    return tuple(index_of[value] for value in wanted)


def fill(structure: object, value_of: Callable[[int], object]) -> object:
    """``structure`` with every Ref replaced by ``value_of(number)`` and every rebuilt object made; None for what is
    missing."""
    if isinstance(structure, Ref):
        return value_of(structure.value)
    if isinstance(structure, Rebuilt):
        return structure.build([fill(part, value_of) for part in structure.parts])
    if isinstance(structure, tuple):
        return tuple(fill(item, value_of) for item in structure)
    if isinstance(structure, list):
        return [fill(item, value_of) for item in structure]
    if isinstance(structure, dict):
        return {key: fill(item, value_of) for key, item in structure.items()}
    if isinstance(structure, slice):
        return slice(*fill((structure.start, structure.stop, structure.step), value_of))
    return None if isinstance(structure, Missing) else structure
