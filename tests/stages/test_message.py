"""How tensors lie in one message: whatever their shapes, dtypes and memory orders, they come back as they went."""
import itertools
import random

import pytest
import torch

from pipeengine.errors import WorkerError
from pipeengine.stages.message import (
    ACTIVATION,
    GRADIENT,
    HEADER_BYTES,
    allocate,
    check_header,
    has_arrived,
    header,
    layout,
    pack,
    unpack,
)
from pipeengine.tracing import TensorSpec

CPU = torch.device("cpu")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.int64,
          torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)
SHAPES = ((), (1,), (0,), (3,), (2, 0, 4), (5, 7), (1, 3, 1), (2, 3, 4), (2, 3, 2, 5))
FIELDS = dict(step=7, microbatch=3, kind=ACTIVATION, source=1, target=2, digest=99)


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), tensor.dtype, tuple(tensor.stride()), False)


def noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Small whole numbers, which every dtype holds."""
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().reshape(-1).view(torch.uint8),
                                                                     b.contiguous().reshape(-1).view(torch.uint8))


def sent(tensors: list[torch.Tensor], recorded: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    """``tensors`` through a message whose layout was recorded from ``recorded``, as the receiver sees them."""
    form = layout([spec_of(tensor) for tensor in recorded or tensors])
    head = header(size=form.bytes, **FIELDS)
    buffer = pack(tensors, form, head, CPU)
    return unpack(buffer, form, check_header(buffer, form, head))


# -- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape_arrives(dtype):
    tensors = [noise(shape, dtype, seed) for seed, shape in enumerate(SHAPES)]
    for arrived, tensor in zip(sent(tensors), tensors, strict=True):
        assert same_bits(arrived, tensor) and (arrived.stride() == tensor.stride() or not tensor.numel())


@pytest.mark.parametrize("seed", range(40))
def test_any_mixture_arrives_and_nothing_overlaps(seed):
    """Slots lie behind the header and the orders, aligned for any dtype, before the byte that arrives last."""
    draw = random.Random(seed)
    tensors = [noise(draw.choice(SHAPES), draw.choice(DTYPES), seed + i) for i in range(draw.randrange(6))]
    form = layout([spec_of(tensor) for tensor in tensors])
    end = HEADER_BYTES + 8 * len(tensors)
    for slot, tensor in zip(form.slots, tensors, strict=True):
        start = slot.offset * slot.dtype.itemsize
        assert start >= end and start % 64 == 0
        end = start + tensor.numel() * tensor.element_size()
    assert form.bytes > end and form.payload_bytes == sum(t.numel() * t.element_size() for t in tensors)
    assert all(same_bits(arrived, tensor) for arrived, tensor in zip(sent(tensors), tensors, strict=True))


@pytest.mark.parametrize("axes", [axes for n in range(1, 5) for axes in itertools.permutations(range(n))], ids=str)
def test_the_receiver_has_the_strides_of_the_sender(axes):
    """A gradient's memory order is known only when it is there: it rides behind the header."""
    tensor = noise((2, 3, 4, 5)[:len(axes)], torch.float32).permute(axes)
    plain = torch.empty(tensor.shape)
    for recorded in (tensor, plain):
        arrived, = sent([tensor], [recorded])
        assert torch.equal(arrived, tensor) and arrived.stride() == tensor.stride()
    arrived, = sent([plain.zero_()], [tensor])
    assert arrived.is_contiguous(), "the order of what is sent counts, not the recorded one"


def test_without_a_header_values_lie_in_the_recorded_order():
    tensor = noise((2, 3, 4), torch.float32).permute(2, 0, 1)
    form = layout([spec_of(tensor)])
    arrived, = unpack(pack([tensor], form, None, CPU), form)
    assert torch.equal(arrived, tensor) and arrived.stride() == tensor.stride()


@pytest.mark.parametrize("make", (lambda t: t.expand(4, 3), lambda t: t.as_strided((2, 2), (1, 1)),
                                  lambda t: t.as_strided((2,), (2,))), ids=("expanded", "overlapping", "with gaps"))
def test_what_is_not_dense_arrives_dense(make):
    """Strides that no dense tensor has do not travel; the numbers do."""
    tensor = make(torch.arange(3.0))
    arrived, = sent([tensor])
    assert torch.equal(arrived, tensor) and arrived.is_contiguous()


@pytest.mark.parametrize("field", FIELDS)
def test_a_wrong_header_is_refused_with_both_numbers(field):
    form = layout([spec_of(torch.zeros(2))])
    words = {"microbatch": "micro-batch", "source": "source stage", "target": "target stage", "digest": "batch digest"}
    other = GRADIENT if field == "kind" else 1234
    buffer = pack([torch.zeros(2)], form, header(size=form.bytes, **{**FIELDS, field: other}), CPU)
    with pytest.raises(WorkerError, match=f"{words.get(field, field)} is {other}, expected {FIELDS[field]}"):
        check_header(buffer, form, header(size=form.bytes, **FIELDS))


def test_a_message_of_another_size_is_refused():
    form = layout([spec_of(torch.zeros(2))])
    buffer = pack([torch.zeros(2)], form, header(size=form.bytes + 8, **FIELDS), CPU)
    with pytest.raises(WorkerError, match=f"bytes is {form.bytes + 8}, expected {form.bytes}"):
        check_header(buffer, form, header(size=form.bytes, **FIELDS))


# -- stories ----------------------------------------------------------------------------------------------------------


def test_a_buffer_says_when_it_is_full():
    form = layout([spec_of(torch.zeros(2))])
    buffer = allocate(form, CPU)
    assert buffer.numel() == form.bytes and not has_arrived(buffer)
    buffer.copy_(pack([torch.zeros(2)], form, header(size=form.bytes, **FIELDS), CPU))
    assert has_arrived(buffer)


def test_unpacked_values_are_views():
    form = layout([spec_of(torch.zeros(2))])
    buffer = pack([torch.zeros(2)], form, None, CPU)
    unpack(buffer, form)[0].fill_(3)
    assert unpack(buffer, form)[0].tolist() == [3, 3]


def test_the_picture_of_a_message():
    """A header of eight numbers, an order per value, values from multiples of 64 bytes, 64 bytes for the last one."""
    form = layout([TensorSpec((3,), torch.float32, (1,), True), TensorSpec((2, 2), torch.int64, (1, 2), False)])
    assert HEADER_BYTES == 64
    assert [(slot.offset, slot.stride, slot.order) for slot in form.slots] == [(32, (1,), None), (24, (2, 1), (1, 0))]
    assert (form.bytes, form.payload_bytes, form.orders, form.no_orders) == (320, 44, (None, (1, 0)), bytes(16))
