"""How the tensors of one message lie in memory.

A message is one buffer: a header that says what it is, the values of a boundary in order, and a byte that arrives last.
Both sides compute the same layout from the same recording, so nothing but the buffer travels.
"""
from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeengine.errors import WorkerError
from pipeengine.tracing import TensorSpec

ACTIVATION, GRADIENT = 0, 1
_FIELDS = ("format", "step", "micro-batch", "kind", "source stage", "target stage", "bytes", "batch digest")
_FORMAT = 0x70697065
_HEADER = struct.Struct(f"<{len(_FIELDS)}q")
HEADER_BYTES = _HEADER.size
_ALIGNMENT = 64
_MOST_AXES = 14
Order = tuple[int, ...] | None


@dataclass(frozen=True)
class Slot:
    """Where one value lies: a view of the buffer as ``dtype``, from its element (not byte) ``offset`` on.

    ``order`` tells the axes from slowest to fastest in memory, as recorded; ``stride`` is that of the order of the
    axes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    order: Order


@dataclass(frozen=True)
class Layout:
    """The layout of one message of ``bytes`` in all, of which ``payload_bytes`` are the values."""

    slots: tuple[Slot, ...]
    bytes: int
    payload_bytes: int
    orders: tuple[Order, ...]
    no_orders: bytes                            # behind a header when every value lies in the order of its axes


def layout(specs: Sequence[TensorSpec]) -> Layout:
    """Lay the values of a message out one after the other, each aligned for any dtype."""
    slots, offset = [], _aligned(HEADER_BYTES + 8 * len(specs))
    for spec in specs:
        slots.append(Slot(spec.dtype, spec.shape, _strides(spec.shape, range(len(spec.shape))),
                          offset // spec.dtype.itemsize, _memory_order(spec.shape, spec.stride)))
        offset += _aligned(spec.bytes)
    return Layout(tuple(slots), offset + _ALIGNMENT, sum(spec.bytes for spec in specs),
                  tuple(slot.order for slot in slots), bytes(8 * len(slots)))


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


def _strides(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense tensor whose axes lie in ``order``."""
    strides, step = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = step
        step *= shape[axis]
    return tuple(strides)


def _encode(order: Order) -> int:
    """An order as a number of 4-bit digits, from the fastest axis up; 0 is the order of the axes."""
    if order is None:
        return 0
    return sum(axis << 4 * place for place, axis in enumerate(reversed(order))) | 1 << 4 * len(order)


def _decode(number: int, num_axes: int) -> Order:
    return None if number == 0 else tuple(number >> 4 * place & 15 for place in reversed(range(num_axes)))


def pack(tensors: Sequence[torch.Tensor], layout: Layout, header: bytes | None, device: torch.device) -> torch.Tensor:
    """One buffer, uint8 of shape (``layout.bytes``,), that holds ``tensors`` behind ``header`` and their memory orders.

    A receiver computes with the strides that one process would have, and so gets the same bits; those of a gradient are
    known when it is there. Without a header values travel in the recorded order. A header needs a buffer on the CPU.
    """
    buffer = torch.empty(layout.bytes, dtype=torch.uint8, device=device)
    orders: Sequence[Order] = layout.orders
    if header is not None:
        orders = [None if t.is_contiguous() else _memory_order(t.shape, t.stride()) for t in tensors]
        numbers = struct.pack(f"<{len(orders)}q", *map(_encode, orders)) if any(orders) else layout.no_orders
        memory = buffer.numpy()
        memory[:HEADER_BYTES + len(numbers)] = np.frombuffer(header + numbers, np.uint8)
        memory[-1] = 1
    for value, tensor in zip(unpack(buffer, layout, orders), tensors):
        value.copy_(tensor)
    return buffer


def allocate(layout: Layout, device: torch.device) -> torch.Tensor:
    """A buffer for a message to come: uint8 of shape (``layout.bytes``,)."""
    buffer = torch.empty(layout.bytes, dtype=torch.uint8, device=device)
    if device.type == "cpu":
        buffer.numpy()[-1] = 0
    return buffer


def has_arrived(buffer: torch.Tensor) -> bool:
    """Whether the last byte of a message is here, so that waiting for the rest takes no time. Only with headers."""
    return bool(buffer.numpy()[-1])


def unpack(buffer: torch.Tensor, layout: Layout, orders: Sequence[Order] | None = None) -> list[torch.Tensor]:
    """The values inside ``buffer``, without a copy, in the shapes of ``layout``; ``orders`` are those of
    ``check_header``, if there is a header."""
    return [buffer.view(slot.dtype).as_strided(slot.shape, _strides(slot.shape, order) if order else slot.stride,
                                               slot.offset)
            for slot, order in zip(layout.slots, layout.orders if orders is None else orders)]


def header(step: int, microbatch: int, kind: int, source: int, target: int, size: int, digest: int) -> bytes:
    """What a message says of itself; ``kind`` is ACTIVATION or GRADIENT, ``size`` the bytes of its buffer.

    A gradient's ``source`` and ``target`` are those of its boundary, so it travels from ``target`` to ``source``.
    """
    return _HEADER.pack(_FORMAT, step, microbatch, kind, source, target, size, digest)


def check_header(buffer: torch.Tensor, layout: Layout, expected: bytes) -> Sequence[Order]:
    """The memory orders of the values. Raises ``WorkerError`` unless the message is the one we wait for."""
    found = buffer.numpy()[:HEADER_BYTES + len(layout.no_orders)].tobytes()
    if found.startswith(expected):
        return _orders(found[HEADER_BYTES:], layout)
    wrong = [f"{name} is {got}, expected {want}"
             for name, got, want in zip(_FIELDS, _HEADER.unpack(found[:HEADER_BYTES]), _HEADER.unpack(expected))
             if got != want]
    raise WorkerError("a message is not the one this worker waits for: " + "; ".join(wrong)
                      + ". Every worker must pass the same batch to the same sequence of calls.")


def _orders(numbers: bytes, layout: Layout) -> Sequence[Order]:
    if numbers == layout.no_orders:
        return (None,) * len(layout.slots)
    encoded = struct.unpack(f"<{len(layout.slots)}q", numbers)
    return [_decode(number, len(slot.shape)) for number, slot in zip(encoded, layout.slots)]
