"""Values as bytes, to travel between workers: JSON and the raw bytes of tensors. Nothing that arrives can run code.

What can travel: None, bool, int, float, str, bytes, complex, tuples, lists, dicts (with such keys), dtypes, sizes and
dense tensors. A named tuple or a model's output arrives as what it is only where the receiver makes it again, as
``evaluate`` does from its own recording.
"""
from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable

import torch

from pipeengine.errors import InputError, WorkerError

_LENGTH = struct.Struct("<q")
_ALIGNMENT = 64
_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_PLAIN = (type(None), bool, int, float, str)


def encode(value: object) -> torch.Tensor:
    """``value`` as a tensor of bytes on the CPU. Raises ``InputError`` that names what cannot travel."""
    tensors: list[torch.Tensor] = []
    text = json.dumps(_to_json(value, "value", tensors)).encode()
    head = _LENGTH.pack(len(text)) + text
    sizes = [tensor.numel() for tensor in tensors]
    start = _aligned(len(head))
    whole = torch.empty(start + sum(map(_aligned, sizes)), dtype=torch.uint8)
    whole[:len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    for tensor, size in zip(tensors, sizes):
        whole[start:start + size] = tensor
        start += _aligned(size)
    return whole


def decode(data: torch.Tensor) -> object:
    """The value that ``encode`` was given; tensors on the CPU, as views of ``data``. Raises ``WorkerError``."""
    try:
        (length,) = _LENGTH.unpack(data[:_LENGTH.size].numpy().tobytes())
        if not 0 < length <= data.numel() - _LENGTH.size:
            raise ValueError(f"it tells of {length} bytes and has {data.numel() - _LENGTH.size}")
        structure = json.loads(data[_LENGTH.size:_LENGTH.size + length].numpy().tobytes())
        return _Reader(data, _aligned(_LENGTH.size + length)).value(structure)
    except (ValueError, KeyError, TypeError, IndexError, RuntimeError, struct.error) as error:
        raise WorkerError(f"what another worker has sent cannot be read: {type(error).__name__}: {error}") from error


def encode_or_tell(value: object) -> torch.Tensor:
    """``value`` as bytes (uint8, 1-dimensional) for ``decode_or_raise``; what cannot travel becomes its error, so that
    nobody waits for the value."""
    try:
        return encode([True, value])
    except InputError as error:
        return encode([False, str(error)])


def decode_or_raise(data: torch.Tensor, rank: int) -> object:
    """What ``encode_or_tell`` was given on worker ``rank``; raises its ``InputError`` where it could not travel."""
    content = decode(data)
    if not (isinstance(content, list) and len(content) == 2 and isinstance(content[0], bool)):
        raise WorkerError(f"what worker {rank} has sent is not a value and a flag")
    if not content[0]:
        raise InputError(f"{content[1]} (on worker {rank})")
    return content[1]


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _to_json(value: object, path: str, tensors: list[torch.Tensor]) -> object:
    """Plain values as they are; everything else as a dict of its kind and content. ``path`` is for errors."""
    kind: type = type(value)
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, torch.Tensor):
        return {"tensor": _tensor_to_json(value, path, tensors)}
    if isinstance(value, list):
        return [_to_json(item, f"{path}[{i}]", tensors) for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"tuple": [_to_json(item, f"{path}[{i}]", tensors) for i, item in enumerate(value)]}
    if isinstance(value, dict):
        return {"dict": [[_to_json(key, f"the key {key!r} of {path}", tensors),
                          _to_json(item, f"{path}[{key!r}]", tensors)] for key, item in value.items()]}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value)}
    raise InputError(f"{path} is a {kind.__module__}.{kind.__qualname__}, which cannot travel between workers; "
                     "numbers, texts, tensors, tuples, lists and dicts of them can")


def _tensor_to_json(tensor: torch.Tensor, path: str, tensors: list[torch.Tensor]) -> list:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise InputError(f"{path} is a tensor of {tensor.layout} on {tensor.device}, which cannot travel between "
                         "workers; make it dense first")
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    tensors.append(flat.view(torch.uint8))
    return [str(tensor.dtype), list(tensor.shape)]


class _Reader:
    """Makes values again from their JSON; tensors follow one another in ``data`` from ``start`` on."""

    def __init__(self, data: torch.Tensor, start: int):
        self._data, self._start = data, start
        self._make: dict[str, Callable] = {
            "tensor": self._tensor,
            "tuple": lambda items: tuple(self.value(item) for item in items),
            "dict": lambda pairs: {self.value(key): self.value(item) for key, item in pairs},
            "bytes": base64.b64decode,
            "complex": lambda parts: complex(*parts),
            "dtype": _DTYPES.__getitem__,
        }

    def value(self, structure: object) -> object:
        """One value and all inside it, in the order in which it was written."""
        if isinstance(structure, list):
            return [self.value(item) for item in structure]
        if isinstance(structure, dict):
            ((kind, content),) = structure.items()
            return self._make[kind](content)
        return structure

    def _tensor(self, content: list) -> torch.Tensor:
        dtype, shape = _DTYPES[content[0]], tuple(content[1])
        size = dtype.itemsize
        for length in shape:
            if length < 0:
                raise ValueError(f"a tensor of shape {shape}")
            size *= length
        if size > self._data.numel() - self._start:
            raise ValueError(f"a tensor of {size} bytes where {self._data.numel() - self._start} are left")
        flat = self._data[self._start:self._start + size]
        self._start += _aligned(size)
        return flat.view(dtype).reshape(shape)
