"""How the tensors of one message lie in memory.

A message is one buffer: a header that says what it is, then the values of a link in order. Both sides compute the same
layout from the same recording, so nothing but the buffer travels.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeengine.errors import WorkerError
from pipeengine.recording import TensorSpec

ACTIVATION, GRADIENT = 0, 1
_FIELDS = ("format", "step", "micro-batch", "kind", "source stage", "target stage", "bytes", "batch digest")
_FORMAT = 0x70697065
HEADER_BYTES = 8 * len(_FIELDS)
_ALIGNMENT = 64


@dataclass(frozen=True)
class Slot:
    """Where one value lies: byte offset, dtype, and the dense shape it is packed in; ``order`` restores its strides."""

    offset: int
    end: int
    dtype: torch.dtype
    packed_shape: tuple[int, ...]
    order: tuple[int, ...] | None
    inverse: tuple[int, ...] | None


@dataclass(frozen=True)
class Layout:
    """The layout of one message; ``payload_bytes`` counts the values alone."""

    slots: tuple[Slot, ...]
    bytes: int
    payload_bytes: int


def layout(specs: Sequence[TensorSpec]) -> Layout:
    """Lay the values of a message out one after the other, each aligned for any dtype."""
    slots, offset = [], HEADER_BYTES
    for spec in specs:
        order = _memory_order(spec)
        packed = tuple(spec.shape[axis] for axis in order) if order else spec.shape
        inverse = tuple(sorted(range(len(order)), key=order.__getitem__)) if order else None
        slots.append(Slot(offset, offset + spec.bytes, spec.dtype, packed, order, inverse))
        offset += -(-spec.bytes // _ALIGNMENT) * _ALIGNMENT
    return Layout(tuple(slots), offset, sum(spec.bytes for spec in specs))


def _memory_order(spec: TensorSpec) -> tuple[int, ...] | None:
    """Axes from slowest to fastest when a dense tensor is not laid out in the order of its axes, else None.

    The receiver then gets the strides that the sender had, and with them the same arithmetic.
    """
    if len(spec.stride) != len(spec.shape) or 0 in spec.shape:
        return None
    order = tuple(sorted(range(len(spec.shape)), key=lambda axis: (-spec.stride[axis], axis)))
    expected = 1
    for axis in reversed(order):
        if spec.shape[axis] != 1:
            if spec.stride[axis] != expected:
                return None
            expected *= spec.shape[axis]
    return None if order == tuple(range(len(order))) else order


def pack(tensors: Sequence[torch.Tensor], form: Layout, header: Sequence[int] | None, device: torch.device) -> torch.Tensor:
    """One buffer that holds ``header`` and ``tensors``."""
    buffer = torch.empty(form.bytes, dtype=torch.uint8, device=device)
    if header is not None:
        buffer[:HEADER_BYTES].view(torch.int64).copy_(torch.tensor(header))
    for tensor, slot in zip(tensors, form.slots):
        packed = tensor.permute(slot.order) if slot.order else tensor
        buffer[slot.offset:slot.end].view(slot.dtype).view(slot.packed_shape).copy_(packed)
    return buffer


def unpack(buffer: torch.Tensor, form: Layout) -> list[torch.Tensor]:
    """The values inside ``buffer``, without a copy, with the strides the sender had."""
    found = []
    for slot in form.slots:
        value = buffer[slot.offset:slot.end].view(slot.dtype).view(slot.packed_shape)
        found.append(value.permute(slot.inverse) if slot.inverse else value)
    return found


def header(step: int, microbatch: int, kind: int, source: int, target: int, size: int, digest: int) -> tuple[int, ...]:
    """What a message says of itself."""
    return _FORMAT, step, microbatch, kind, source, target, size, digest


def check_header(buffer: torch.Tensor, expected: tuple[int, ...]) -> None:
    """Raise ``WorkerError`` unless the message is the one we wait for."""
    found = tuple(buffer[:HEADER_BYTES].view(torch.int64).tolist())
    if found == expected:
        return
    wrong = [f"{name} is {got}, expected {want}" for name, got, want in zip(_FIELDS, found, expected) if got != want]
    raise WorkerError("a message is not the one this worker waits for: " + "; ".join(wrong)
                      + ". Every worker must pass the same batch to the same sequence of calls.")
