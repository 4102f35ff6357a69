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
_MOST_AXES = 14

Order = tuple[int, ...] | None


@dataclass(frozen=True)
class Slot:
    """Where one value lies: byte offset, dtype, shape, and ``order``, the axes from slowest to fastest in memory."""

    offset: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    order: Order


@dataclass(frozen=True)
class Layout:
    """The layout of one message; ``payload_bytes`` counts the values alone."""

    slots: tuple[Slot, ...]
    bytes: int
    payload_bytes: int

    @property
    def orders(self) -> list[Order]:
        """The memory order of each value as it was recorded."""
        return [slot.order for slot in self.slots]


def layout(specs: Sequence[TensorSpec]) -> Layout:
    """Lay the values of a message out one after the other, each aligned for any dtype."""
    slots, offset = [], _aligned(HEADER_BYTES + 8 * len(specs))
    for spec in specs:
        slots.append(Slot(offset, offset + spec.bytes, spec.dtype, spec.shape, _memory_order(spec.shape, spec.stride)))
        offset += _aligned(spec.bytes)
    return Layout(tuple(slots), offset, sum(spec.bytes for spec in specs))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _memory_order(shape: Sequence[int], stride: Sequence[int]) -> Order:
    """Axes from slowest to fastest when a dense tensor is not laid out in the order of its axes, else None."""
    if len(stride) != len(shape) or 0 in shape or len(shape) > _MOST_AXES:
        return None
    order = tuple(sorted(range(len(shape)), key=lambda axis: (-stride[axis], axis)))
    expected = 1
    for axis in reversed(order):
        if shape[axis] != 1:
            if stride[axis] != expected:
                return None
            expected *= shape[axis]
    return None if order == tuple(range(len(order))) else order


def _encode(order: Order) -> int:
    """An order as a number of 4-bit digits, from the fastest axis up; 0 is the order of the axes."""
    return 0 if order is None else sum(axis << 4 * place for place, axis in enumerate(reversed(order))) | 1 << 4 * len(order)


def _decode(number: int, num_axes: int) -> Order:
    return None if number == 0 else tuple(number >> 4 * place & 15 for place in reversed(range(num_axes)))


def pack(tensors: Sequence[torch.Tensor], form: Layout, header: Sequence[int] | None, device: torch.device) -> torch.Tensor:
    """One buffer that holds ``tensors`` behind ``header`` and their memory orders.

    A receiver computes with the strides that one process would have, and so gets the same bits; those of a gradient are known
    when it is there. Without a header values travel in the recorded order.
    """
    buffer = torch.empty(form.bytes, dtype=torch.uint8, device=device)
    orders = form.orders
    if header is not None:
        orders = [None if t.is_contiguous() else _memory_order(t.shape, t.stride()) for t in tensors]
        numbers = [*header, *map(_encode, orders)]
        buffer[:8 * len(numbers)].view(torch.int64).copy_(torch.tensor(numbers))
    for tensor, slot, order in zip(tensors, form.slots, orders):
        _dense(buffer, slot, order).copy_(tensor)
    return buffer


def unpack(buffer: torch.Tensor, form: Layout, orders: Sequence[Order] | None = None) -> list[torch.Tensor]:
    """The values inside ``buffer``, without a copy; ``orders`` are those that ``check_header`` found, if there is a header."""
    return [_dense(buffer, slot, order) for slot, order in zip(form.slots, form.orders if orders is None else orders)]


def _dense(buffer: torch.Tensor, slot: Slot, order: Order) -> torch.Tensor:
    """The slot as a tensor of its shape, in the given memory order."""
    flat = buffer[slot.offset:slot.end].view(slot.dtype)
    if order is None:
        return flat.view(slot.shape)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return flat.view([slot.shape[axis] for axis in order]).permute(inverse)


def header(step: int, microbatch: int, kind: int, source: int, target: int, size: int, digest: int) -> tuple[int, ...]:
    """What a message says of itself."""
    return _FORMAT, step, microbatch, kind, source, target, size, digest


def check_header(buffer: torch.Tensor, form: Layout, expected: tuple[int, ...]) -> list[Order]:
    """The memory orders of the values. Raises ``WorkerError`` unless the message is the one we wait for."""
    numbers = buffer[:HEADER_BYTES + 8 * len(form.slots)].view(torch.int64).tolist()
    found = tuple(numbers[:len(_FIELDS)])
    if found == expected:
        return [_decode(number, len(slot.shape)) for number, slot in zip(numbers[len(_FIELDS):], form.slots)]
    wrong = [f"{name} is {got}, expected {want}" for name, got, want in zip(_FIELDS, found, expected) if got != want]
    raise WorkerError("a message is not the one this worker waits for: " + "; ".join(wrong)
                      + ". Every worker must pass the same batch to the same sequence of calls.")
