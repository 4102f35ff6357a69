"""The tensors of a recording as numbered values, each with its fake and, where it follows from the inputs, its real
one.
"""
from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from pipeengine.errors import CaptureError
from pipeengine.torch_private import FakeTensor, FakeTensorMode, storage_number
from pipeengine.tracing.born_objects import NotReturnable, empty_cache, is_cache, object_parts
from pipeengine.tracing.meter import tensor_bytes
from pipeengine.tracing.open_calls import CallStack, NotTraceable
from pipeengine.tracing.pytree import leaves, tensors, tree_encode, tree_map
from pipeengine.tracing.recording import OPAQUE, Missing, Rebuilt, Ref, TensorSpec, Value, encoded_leaves

REAL_SIDE_LIMIT_BYTES = 1 << 28
_SHAREABLE = (torch.dtype, torch.device, type, torch.Generator, range, frozenset, torch.Size)


@dataclass(slots=True)
class TableEntry:
    """One value while it is recorded.

    ``kind``, ``name`` and ``node`` as in ``Value``. ``tensor`` is what the user's code holds: a fake, or for a
    constant the tensor itself. ``fake`` is what functions run on; ``real`` the tensor with the true numbers, where
    they are known.
    """

    kind: str
    name: str
    node: int
    tensor: torch.Tensor
    fake: torch.Tensor
    real: torch.Tensor | None = None


class ValueTable:
    """Numbers every tensor that the forward meets, by identity; the entries keep the tensors alive, so that ids stay
    true.
    """

    def __init__(self, fake_mode: FakeTensorMode, plain_names: Mapping[int, str], calls: CallStack):
        """``plain_names``: id of a tensor that is a plain attribute of a module -> its name, for messages."""
        self._fake_mode, self._plain_names, self._calls = fake_mode, plain_names, calls
        self._entries: list[TableEntry] = []
        self._number_of: dict[int, int] = {}
        self.inputs: list[int] = []
        self.constants: dict[int, torch.Tensor] = {}
        self.attribute_storages: set[int] = set()
        self.emptied: dict[int, str] = {}           # id of a cache that some module did not fill -> why

    # -- entries ----------------------------------------------------------------------------------------------------

    def add(self, kind: str, name: str, node: int, tensor: torch.Tensor, *, fake: torch.Tensor | None = None,
            real: torch.Tensor | None = None) -> int:
        """Enter ``tensor``, and return its number."""
        number = self._number_of[id(tensor)] = len(self._entries)
        self._entries.append(TableEntry(kind, name, node, tensor, tensor if fake is None else fake, real))
        return number

    def add_attributes(self, fakes: Mapping[str, torch.Tensor], real_buffers: Mapping[str, torch.Tensor]) -> None:
        """Enter parameters and buffers by name; a tensor with several names gets one number."""
        for name, fake in fakes.items():
            if not self.knows(fake):
                self.add("attribute", name, -1, fake, real=real_buffers.get(name))
                self.attribute_storages.add(storage_number(fake))

    def add_input(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Make a fake for an input and remember the real one beside it."""
        fake, real = tensor, None
        if not isinstance(tensor, FakeTensor):
            fake = self._fake_mode.from_tensor(tensor.detach(), static_shapes=True)
            real = tensor.detach().clone()          # the forward may write to it; the user's stays as it is
        if self.knows(fake):
            fake = fake.detach()
        self.inputs.append(self.add("input", name, -1, fake, real=real))
        return fake

    def entry(self, number: int) -> TableEntry:
        """Value ``number``."""
        return self._entries[number]

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` has a number."""
        return id(tensor) in self._number_of

    def number_of(self, tensor: torch.Tensor) -> int | None:
        """The number of ``tensor``, None where it has none."""
        return self._number_of.get(id(tensor))

    def entry_of(self, tensor: torch.Tensor) -> TableEntry | None:
        """The entry of ``tensor``, None where it has none."""
        number = self._number_of.get(id(tensor))
        return None if number is None else self._entries[number]

    def lookup(self, tensor: torch.Tensor) -> int:
        """The number of ``tensor``; one that no recorded step made becomes a constant.

        Raises ``NotTraceable`` for a fake that escaped the recorder, ``CaptureError`` for a tensor that must be
        registered.
        """
        number = self._number_of.get(id(tensor))
        return self._add_constant(tensor) if number is None else number

    def _add_constant(self, tensor: torch.Tensor) -> int:
        if isinstance(tensor, FakeTensor):
            raise NotTraceable(self._calls.path, "a tensor was made where the recorder could not see it "
                                                 "(stored by a module that is kept whole, or by code outside torch)")
        name = self._plain_names.get(id(tensor), "")
        if tensor.requires_grad:
            raise CaptureError(
                f"{self._calls.where()}: a tensor of shape {tuple(tensor.shape)} that needs a gradient"
                f"{f' ({name})' if name else ''} is not a registered parameter of the model; register it (nn.Parameter "
                "as an attribute of a module, or nn.ParameterList) or detach it")
        if tensor.device.type == "meta":
            raise CaptureError(f"{self._calls.where()}: the plain tensor attribute {name or 'used here'} is on the "
                               "meta device; register it as a buffer")
        number = self.add("constant", name or f"constant{len(self.constants)}", -1, tensor)
        self.constants[number] = tensor
        entry = self._entries[number]
        entry.fake = self._fake_mode.from_tensor(tensor, static_shapes=True)
        if tensor_bytes(tensor) < REAL_SIDE_LIMIT_BYTES:
            entry.real = tensor.clone()
        return number

    # -- structures of tensors --------------------------------------------------------------------------------------

    def encode(self, structure: object) -> object:
        """``structure`` with a Ref for every tensor, and a new cache for every cache. Raises as ``lookup`` does."""
        def encoded(leaf: object) -> object:
            if isinstance(leaf, torch.Tensor):
                return Ref(self.lookup(leaf))
            return Rebuilt(partial(_make_empty_cache, type(leaf)), ()) if is_cache(leaf) else leaf
        return tree_encode(structure, encoded)

    def encode_shareable(self, structure: object, other: object) -> object:
        """As ``encode``, with ``other`` for objects of the run itself, which are not kept."""
        return tree_encode(structure, lambda leaf: Ref(self.lookup(leaf)) if isinstance(leaf, torch.Tensor)
                           else leaf if is_shareable(leaf) else other)

    def encode_output(self, output: object, returned: Callable[[object], bool]) -> object:
        """The output of the model: as ``encode``, with objects taken apart, and ``Missing`` for those that are not to
        be ``returned`` or cannot be."""
        open_objects: list[int] = []

        def encoded(leaf: object) -> object:
            if isinstance(leaf, torch.Tensor):
                return Ref(self.lookup(leaf))
            if is_shareable(leaf):
                return leaf
            return opened(leaf) if returned(leaf) else Missing(type(leaf).__name__)

        def opened(leaf: object) -> object:
            try:
                if id(leaf) in open_objects:
                    raise NotReturnable("it holds itself")
                if id(leaf) in self.emptied:
                    raise NotReturnable(self.emptied[id(leaf)])
                build, parts = object_parts(leaf)
                open_objects.append(id(leaf))
                made = tuple(tree_encode(part, encoded) for part in parts)
                open_objects.pop()
            except (NotReturnable, NotTraceable, CaptureError) as stop:
                return Missing(type(leaf).__name__, str(stop))
            lost = next((part for part in encoded_leaves(made) if isinstance(part, Missing)), None)
            return Rebuilt(build, made) if lost is None else Missing(type(leaf).__name__, lost.why)
        return tree_encode(output, encoded)

    def note_emptied(self, structure: object, path: str, reason: str) -> None:
        """The module at ``path``, kept whole, is given caches of its own in place of those in ``structure``."""
        for leaf in leaves(structure):
            if is_cache(leaf):
                self.emptied[id(leaf)] = f"module {path} is kept whole ({reason}) and does not hand out its part of it"

    def output_template(self, output: object) -> object:
        """``output`` with Refs for the tensors that are known, and OPAQUE for the others and for objects of the run."""
        def template(leaf: object) -> object:
            if isinstance(leaf, torch.Tensor):
                number = self._number_of.get(id(leaf))
                return OPAQUE if number is None else Ref(number)
            return leaf if is_shareable(leaf) else OPAQUE
        return tree_encode(output, template)

    def fakes(self, structure: object) -> object:
        """``structure`` with constants replaced by their fakes."""
        def fake_of(leaf: object) -> object:
            entry = self.entry_of(leaf) if isinstance(leaf, torch.Tensor) else None
            return leaf if entry is None else entry.fake
        return tree_map(structure, fake_of) if self.constants else structure

    def real_of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The real tensor beside ``tensor``, None where its numbers are unknown."""
        entry = self.entry_of(tensor)
        return None if entry is None else entry.real

    def reals(self, structure: object) -> object | None:
        """``structure`` with real tensors in place of the fakes, or None when some have none."""
        if any(self.real_of(tensor) is None for tensor in tensors(structure)):
            return None
        return tree_map(structure, lambda leaf: self.real_of(leaf) if isinstance(leaf, torch.Tensor) else leaf)

    def forget_reals(self, storages: set[int]) -> None:
        """Unknown numbers were written to ``storages``: drop the real tensors of all values there."""
        for entry in self._entries:
            if entry.real is not None and storage_number(entry.fake) in storages:
                entry.real = None

    # -- the end ----------------------------------------------------------------------------------------------------

    def values(self) -> tuple[Value, ...]:
        """The table as the recording keeps it."""
        return tuple(Value(entry.kind, entry.name, entry.node, _spec(entry.tensor), storage_number(entry.fake))
                     for entry in self._entries)

    def result_traces(self) -> list[weakref.ref]:
        """Weak references to the fakes that nodes made: whoever still holds one afterwards has taken it out of the
        run.
        """
        return [weakref.ref(entry.tensor) for entry in self._entries if entry.kind == "result"]

    def clear(self) -> None:
        """Let go of all tensors."""
        self._entries.clear()
        self._number_of.clear()
        self.constants.clear()


def _make_empty_cache(kind: type, parts: list) -> object:
    return empty_cache(kind)


def _spec(tensor: torch.Tensor) -> TensorSpec:
    stride = tuple(tensor.stride()) if tensor.layout == torch.strided else ()
    return TensorSpec(tuple(tensor.shape), tensor.dtype, stride, tensor.requires_grad)


def is_shareable(leaf: object) -> bool:
    """Objects that mean the same for every micro-batch: functions, types, and settings that live as long as the
    model.
    """
    return (callable(leaf) and not isinstance(leaf, torch.nn.Module)) or isinstance(leaf, _SHAREABLE) \
        or type(leaf).__name__.endswith("Config") or type(leaf).__module__ == "enum" or hasattr(leaf, "_value_")
