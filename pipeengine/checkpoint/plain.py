"""Values as JSON, and the tensors among them apart: what state dicts hold, without anything that could run.

``Packer.pack`` turns a value into JSON and sets its tensors aside by name; ``unpack`` turns it back. What JSON has no
form for is a dict with one key that says what it is: ``{"tuple": [...]}``, ``{"float": "nan"}``, ``{"tensor": name}``.
"""
from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping

import numpy
import torch

from pipeengine.checkpoint.tensor_file import dtype_name
from pipeengine.distributed import own_part
from pipeengine.errors import InputError

_DEEPEST = 64           # levels of nesting; a state dict that goes deeper holds itself


class Packer:
    """Packs the values of one part; ``tensors`` are those that it has met, by the name that their place gives them.
    With ``sharded`` they may be rows of tensors that are put together before they are written."""

    def __init__(self, part: str, sharded: bool = False) -> None:
        self._part, self._sharded = part, sharded
        self.tensors: dict[str, torch.Tensor] = {}

    def pack(self, value: object, path: str) -> object:
        """``value`` as JSON. Raises ``InputError`` that names the part and the path of what has no form."""
        return self._pack(value, path, 0)

    def _pack(self, value: object, path: str, depth: int) -> object:
        if depth > _DEEPEST:
            raise InputError(f"the state of {self._part} is nested deeper than {_DEEPEST} levels at {path[:80]}; give "
                             "a state_dict of plain values and tensors")
        if value is None or type(value) in (bool, int, str):
            return value
        if isinstance(value, torch.Tensor):
            return {"tensor": self._set_aside(value, path)}
        if type(value) is float:
            return value if math.isfinite(value) else {"float": str(value)}
        for kind, (type_, form) in _FORMS.items():
            if type(value) is type_:
                return {kind: form(value)}
        if isinstance(value, numpy.ndarray):
            if value.dtype.hasobject or value.dtype.kind not in "biufc":
                raise self._refusal(value, path)
            return {"array": self._set_aside(torch.from_numpy(numpy.ascontiguousarray(value)), path)}
        if isinstance(value, numpy.generic):
            return self._pack(value.item(), path, depth)
        return self._pack_nested(value, path, depth)

    def _pack_nested(self, value: object, path: str, depth: int) -> object:
        def inside(values: object) -> list:
            return [self._pack(one, f"{path}.{i}", depth + 1) for i, one in enumerate(values)]      # type: ignore
        if isinstance(value, Mapping):
            kind = {Counter: "counter", OrderedDict: "ordered"}.get(type(value))
            if kind is None and all(type(key) is str for key in value):
                return {"dict": {key: self._pack(one, f"{path}.{key}", depth + 1) for key, one in value.items()}}
            pairs = [[self._pack(key, f"{path} (a key)", depth + 1), self._pack(one, f"{path}.{key}", depth + 1)]
                     for key, one in value.items()]
            return {kind or "pairs": pairs}
        if type(value) is list:
            return inside(value)
        for kind, type_ in (("tuple", tuple), ("set", set), ("frozenset", frozenset), ("deque", deque)):
            if type(value) is type_ or kind == "tuple" and isinstance(value, torch.Size):
                return {kind: inside(value)}
        raise self._refusal(value, path)

    def _set_aside(self, tensor: torch.Tensor, path: str) -> str:
        try:
            dtype_name(path, own_part(tensor) if self._sharded else tensor)
        except InputError as error:
            raise InputError(f"the state of {self._part} cannot be written: {error}") from error
        name = path if path not in self.tensors else f"{path}#{len(self.tensors)}"
        self.tensors[name] = tensor.detach()
        return name

    def _refusal(self, value: object, path: str) -> InputError:
        return InputError(f"the state of {self._part} cannot be written: {path} is a {type(value).__name__}; give "
                          "numbers, texts, tensors, and lists and dicts of them, or leave the part out")


_FORMS: dict[str, tuple[type, Callable]] = {
    "bytes": (bytes, lambda value: base64.b64encode(value).decode()),
    "complex": (complex, lambda value: [str(value.real), str(value.imag)]),
    "dtype": (torch.dtype, str),
    "device": (torch.device, str),
}


def unpack(packed: object, tensor: Callable[[str], torch.Tensor]) -> object:
    """The value that ``packed`` was made of; ``tensor`` gives the tensor of a name. Raises ``InputError`` for what no
    ``Packer`` writes."""
    if packed is None or isinstance(packed, (bool, int, float, str)):
        return packed
    if isinstance(packed, list):
        return [unpack(one, tensor) for one in packed]
    if isinstance(packed, dict) and len(packed) == 1:
        (kind, inner), = packed.items()
        try:
            return _READERS[kind](inner, lambda value: unpack(value, tensor), tensor)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"it holds {kind!r} with {str(inner)[:60]!r}, which no checkpoint has: {error}") from error
    raise InputError(f"it holds {str(packed)[:60]!r}, which no checkpoint has")


def _dtype(name: str) -> torch.dtype:
    value = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(value, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return value


_READERS: dict[str, Callable] = {
    "tensor": lambda inner, inside, tensor: tensor(inner),
    "array": lambda inner, inside, tensor: tensor(inner).numpy(),
    "float": lambda inner, inside, tensor: float(inner),
    "bytes": lambda inner, inside, tensor: base64.b64decode(inner),
    "complex": lambda inner, inside, tensor: complex(float(inner[0]), float(inner[1])),
    "dtype": lambda inner, inside, tensor: _dtype(inner),
    "device": lambda inner, inside, tensor: torch.device(inner),
    "dict": lambda inner, inside, tensor: {key: inside(value) for key, value in inner.items()},
    "pairs": lambda inner, inside, tensor: {inside(key): inside(value) for key, value in inner},
    "ordered": lambda inner, inside, tensor: OrderedDict((inside(key), inside(value)) for key, value in inner),
    "counter": lambda inner, inside, tensor: Counter({inside(key): inside(value) for key, value in inner}),
    "tuple": lambda inner, inside, tensor: tuple(inside(one) for one in inner),
    "set": lambda inner, inside, tensor: {inside(one) for one in inner},
    "frozenset": lambda inner, inside, tensor: frozenset(inside(one) for one in inner),
    "deque": lambda inner, inside, tensor: deque(inside(one) for one in inner),
}
