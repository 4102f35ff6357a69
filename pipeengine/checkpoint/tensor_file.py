"""Safetensors files, written as they stream from memory and digested on the way, so that nothing is copied twice.

A file is eight bytes with the length of its header, the header (JSON: name to dtype, shape and place), and the tensors'
bytes without a hole between them. https://github.com/huggingface/safetensors
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeengine.checkpoint.disk import write_file
from pipeengine.errors import InputError

CHUNK_BYTES = 1 << 24           # what is digested and written at a time
_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.complex64: "C64", torch.uint64: "U64", torch.uint32: "U32",
    torch.uint16: "U16"}
DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its dtype by safetensors' name, and its bytes' place behind the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class TensorFile:
    """What a file will hold, in the order of its bytes."""

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> TensorFile:
        """The file of ``tensors``, widest elements first and then the largest, so that each is aligned. Raises
        ``InputError`` for a tensor that safetensors has no form for, by name."""
        entries: list[Entry] = []
        place = 0
        largest_first = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), -item[1].numel(), item[0]))
        for name, tensor in largest_first:
            end = place + tensor.numel() * tensor.element_size()
            entries.append(Entry(name, dtype_name(name, tensor), tuple(tensor.shape), place, end))
            place = end
        return cls(tuple(entries))

    @property
    def data_bytes(self) -> int:
        """Bytes behind the header."""
        return self.entries[-1].end if self.entries else 0

    def header(self) -> bytes:
        """The first bytes of the file, up to the data."""
        table: dict[str, object] = {"__metadata__": {"format": "pt"}}
        table |= {e.name: {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [e.start, e.end]}
                  for e in self.entries}
        text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def dtype_name(name: str, tensor: torch.Tensor) -> str:
    """Safetensors' name of a dtype. Raises ``InputError`` for sparse and quantised tensors and for other dtypes."""
    plain = tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type != "meta"
    if not plain or type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) \
            or tensor.dtype not in _DTYPE_NAMES:
        raise InputError(f"{name} is a {type(tensor).__name__} of {tensor.dtype} and {tensor.layout} on "
                         f"{tensor.device}; safetensors holds dense tensors with data only")
    return _DTYPE_NAMES[tensor.dtype]


Source = Iterable[tuple[Entry, Iterable[memoryview]]]
"""Every entry of a file with its bytes, in order."""


def write_tensors(path: Path, file: TensorFile, source: Source) -> dict:
    """Write a file; what a manifest says of it: ``bytes``, ``header`` (digest), and of each tensor dtype, shape, place
    and digest."""
    header = file.header()
    tensors: dict[str, dict] = {}

    def chunks() -> Iterator[bytes | memoryview]:
        yield header
        for entry, pieces in source:
            digest = hashlib.sha256()
            for piece in pieces:
                digest.update(piece)
                yield piece
            tensors[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "start": entry.start,
                                   "end": entry.end, "digest": digest.hexdigest()}
    write_file(path, chunks())
    return {"bytes": len(header) + file.data_bytes, "header": hashlib.sha256(header).hexdigest(), "tensors": tensors}


def stream(file: TensorFile, tensors: Mapping[str, torch.Tensor]) -> Source:
    """The bytes of ``tensors`` straight from where they are, at most ``CHUNK_BYTES`` of them copied at a time."""
    for entry in file.entries:
        flat = tensors[entry.name].detach().reshape(-1)
        step = max(1, CHUNK_BYTES // flat.element_size())
        yield entry, (bytes_of(flat[at:at + step].cpu()) for at in range(0, len(flat), step))


def bytes_of(flat: torch.Tensor) -> memoryview:
    """The bytes of a tensor of one dimension on the CPU: its memory, or a copy where its elements lie apart, as
    those of a column do."""
    return flat.resolve_conj().resolve_neg().contiguous().view(torch.uint8).numpy().data
