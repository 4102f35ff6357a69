"""Every byte counts: one changed value is seen, wherever it is, in whatever dtype; equal tensors agree wherever they
lie."""
import pytest
import torch

from pipeengine.data.checksum import _sums, _sums_on_cpu, checksum, combine

SIZES = (0, 1, 7, 8, 9, 1000, 16384, 16385, 3 * 16384 + 5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16, torch.uint8, torch.bool,
                                   torch.complex64])
def test_one_changed_value_is_seen(size, dtype):
    chance = torch.Generator().manual_seed(size)
    tensor = torch.randint(0, 2, (size,), generator=chance).to(dtype)
    first = checksum(tensor)
    assert first == checksum(tensor.clone()) and 0 <= first < 1 << 64
    for place in {0, size // 2, size - 1} if size else ():
        other = tensor.clone()
        other[place] = 1 - other[place].to(torch.int64) if not dtype.is_complex else other[place] + 1j
        assert checksum(other) != first


def test_the_highest_bit_of_a_word_is_seen():
    words = torch.zeros(40_000, dtype=torch.int64)
    for place in (0, 20_000, 39_999):
        other = words.clone()
        other[place] = -(1 << 63)
        assert checksum(other) != checksum(words)
        assert combine("", [checksum(other)]) != combine("", [checksum(words)])


def test_places_and_lengths_count():
    assert checksum(torch.tensor([1, 2])) != checksum(torch.tensor([2, 1]))
    assert checksum(torch.zeros(3)) != checksum(torch.zeros(4))
    long = torch.zeros(2 * 16384, dtype=torch.int64)
    long[0] = 5
    assert checksum(long) != checksum(long.roll(16384))


def test_where_it_lies_does_not_count():
    base = torch.arange(24, dtype=torch.uint8)
    assert checksum(base[1:17]) == checksum(base[1:17].clone())
    square = torch.arange(12.0).reshape(3, 4)
    assert checksum(square.T) == checksum(square.T.contiguous())


def test_random_batches_are_told_apart():
    chance = torch.Generator().manual_seed(0)
    tensor = torch.randint(0, 50_000, (300, 512), generator=chance)
    sums = {checksum(tensor)}
    for _ in range(300):
        other = tensor.clone()
        places = torch.randint(0, tensor.numel(), (2,), generator=chance)
        other.view(-1)[places] += torch.tensor([1, -1])
        sums.add(checksum(other))
    assert len(sums) == 301


@pytest.mark.parametrize("words", (0, 5, 16384, 16389, 70 * 16384 + 3))
def test_an_accelerator_adds_up_as_the_processor_does(words):
    tensor = torch.randint(-2**62, 2**62, (words,), generator=torch.Generator().manual_seed(0))
    assert _sums(tensor.view(torch.uint8)) == _sums_on_cpu(tensor.numpy())
