"""A batch, taken apart: every row in exactly one micro-batch, in order, and what has no rows whole in each."""
from dataclasses import dataclass

import pytest
import torch
from reference import split_batch

from pipeengine.data import argument_names, take_apart
from pipeengine.errors import InputError
from pipeengine.tracing import Inputs

CPU = torch.device("cpu")


def apart(*args, target=None, names=("x", "y", "z"), batch_dims=None, **kwargs):
    return take_apart(Inputs(args, kwargs, target), names=names, batch_dims=batch_dims)


def rows(count: int, *shape: int) -> torch.Tensor:
    return torch.arange(count * torch.Size(shape).numel(), dtype=torch.float32).reshape(count, *shape)


# -- laws over many sizes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", (1, 2, 3, 5, 7, 8, 12, 13))
@pytest.mark.parametrize("num_microbatches", (1, 2, 3, 4, 7, 8, 99))
def test_micro_batches_are_the_batch(count, num_microbatches):
    """Sizes differ by one at most, larger ones first; put together again they are the batch; never an empty one."""
    x, table, scale = rows(count, 3), rows(count + 1, 2), torch.tensor(2.0)
    batch = apart(x, table, scale=scale)
    parts, sizes = batch.split(num_microbatches, CPU), batch.sizes(num_microbatches)
    assert len(parts) == len(sizes) == min(num_microbatches, count) and sum(sizes) == count == batch.rows
    assert max(sizes) - min(sizes) <= 1 and list(sizes) == sorted(sizes, reverse=True) and min(sizes) > 0
    assert [len(part[0]) for part in parts] == list(sizes)
    assert torch.equal(torch.cat([part[0] for part in parts]), x)
    assert all(torch.equal(part[1], table) and torch.equal(part[2], scale) for part in parts)
    expected = split_batch({"x": x, "table": table, "scale": scale}, num_microbatches)
    for part, other in zip(parts, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part, other.values(), strict=True))


@pytest.mark.parametrize("dim", (0, 1, 2, -1))
@pytest.mark.parametrize("num_microbatches", (1, 2, 3, 5))
def test_rows_may_lie_in_any_dimension(dim, num_microbatches):
    x = rows(5, 3, 2).movedim(0, dim)
    batch = apart(x, y := rows(5), batch_dims={"x": dim})
    parts = batch.split(num_microbatches, CPU)
    assert batch.rows == 5 and batch.dims == (dim, 0)
    assert torch.equal(torch.cat([part[0] for part in parts], dim), x)
    assert torch.equal(torch.cat([part[1] for part in parts]), y)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64), ids=str)
@pytest.mark.parametrize("shape", ((1,), (7,), (3, 5), (2, 3, 4)), ids=str)
def test_the_digest_sees_every_number(dtype, shape):
    x = torch.zeros(shape, dtype=dtype)
    digest = apart(x).digest()
    assert digest == apart(x.clone()).digest(), "equal batches, wherever they lie, have one digest"
    for position in range(x.numel()):
        other = x.clone()
        other.view(-1)[position] = 1
        assert apart(other).digest() != digest


def test_the_digest_sees_shapes_names_and_order():
    x, y = rows(4, 2), rows(4, 2) + 1
    batches = [apart(x, y), apart(y, x), apart(x, z=y), apart(x, x), apart(x), apart(x.view(2, 4)), apart(x, flag=True),
               apart(x, flag=1), apart(x, flag=1.0), apart(x, target=y), apart(x.double()), apart([x, y]),
               apart((x, [y]))]
    assert len({batch.digest() for batch in batches}) == len(batches)


def test_one_value_of_a_large_tensor_is_seen():
    x = torch.zeros(3 << 20)
    digest = apart(x).digest()
    for place in (0, 1 << 20, (1 << 20) + 12345, (3 << 20) - 1):
        other = x.clone()
        other[place] = 1
        assert apart(other).digest() != digest


@pytest.mark.parametrize("num_microbatches", (1, 2, 3))
def test_again_puts_the_parts_where_the_whole_was(num_microbatches):
    """Nested structures keep their kind; a tensor that stands at two places stays one tensor."""
    @dataclass
    class Pair:
        left: torch.Tensor
        right: torch.Tensor
    x, y = rows(6, 2), rows(6)
    batch = apart([x, {"a": y}], Pair(x, y), target=(y, None), flag=3)
    assert len(batch.tensors) == 2
    for part in batch.split(num_microbatches, CPU):
        inputs = batch.again(part)
        assert type(inputs.args[0]) is list and isinstance(inputs.args[1], Pair) and inputs.kwargs == {"flag": 3}
        assert inputs.args[0][0] is part[0] is inputs.args[1].left
        assert inputs.args[0][1]["a"] is part[1] is inputs.args[1].right is inputs.target[0]
        assert inputs.target[1] is None


# -- keys: everything but the numbers ---------------------------------------------------------------------------------


def test_a_tensor_under_two_names_is_another_batch_than_two_tensors():
    x = rows(4, 2)
    tied, two = apart(x, x), apart(x, x.clone())
    assert len(tied.tensors) == 1 and len(two.tensors) == 2 and tied.key != two.key
    first, second = tied.again(tied.split(2, CPU)[1]).args
    assert first is second and torch.equal(first, x[2:])


def test_keys_tell_kinds_of_batches_apart_and_nothing_else():
    x = rows(4, 2)
    key = apart(x, flag=True).key
    assert key == apart(x + 1, flag=True).key and hash(key) == hash(apart(x, flag=True).key)
    others = [apart(x, flag=False), apart(x, flag=1), apart(x.double(), flag=True), apart(rows(5, 2), flag=True),
              apart(rows(2, 4).t(), flag=True), apart(x, flag=True, more=None), apart([x], flag=True)]
    assert key not in {batch.key for batch in others} and len({batch.key for batch in others}) == len(others)


# -- stories ----------------------------------------------------------------------------------------------------------


def test_what_goes_whole():
    batch = apart(rows(4, 2), rows(4), rows(3), torch.tensor(1.0), batch_dims={"y": None})
    assert batch.dims == (0, None, None, None) and batch.sizes(3) == (2, 1, 1)


def test_a_target_of_one_row_goes_whole():
    assert apart(rows(4, 2), target=rows(1, 2)).dims == (0, None)


@pytest.mark.parametrize(("make", "words"), [
    (lambda: apart(3, flag=True), "holds 0 tensors and none with rows"),
    (lambda: apart(torch.tensor(1.0)), "holds 1 tensors and none with rows"),
    (lambda: apart(rows(0, 3)), r"shape \(0, 3\), 0 rows"),
    (lambda: apart(rows(4, 2), batch_dims={"w": 0}), r"batch_dims names \['w'\], the inputs are \['x', 'target'\]"),
    (lambda: apart(rows(4, 2), target=rows(3, 2)), "target has 3 rows, the batch has 4"),
    (lambda: apart(rows(4, 2).requires_grad_()), "input x needs a gradient.*pass x.detach"),
])
def test_refused_with_numbers(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_dimensions_that_disagree_are_refused():
    with pytest.raises(InputError, match="dimension 1, which has 5 entries; the batch has 2 rows"):
        apart(rows(4, 2), rows(3, 5), batch_dims={"x": 1, "y": 1})


def test_argument_names():
    class Model(torch.nn.Module):
        def forward(self, x, /, y, *rest, z=3, **others):
            return x
    assert argument_names(Model()) == ("x", "y")


@pytest.mark.parametrize("num_microbatches", (1, 2, 3))
def test_joining_undoes_splitting(num_microbatches):
    """Along whatever dimension; what goes whole to each comes back once."""
    batch = apart(rows(6, 2), time=torch.randn(3, 6), mask=torch.randn(4, 4), batch_dims={"time": 1})
    parts = batch.split(num_microbatches, torch.device("cpu"))
    assert all(map(torch.equal, batch.join(parts), batch.tensors))


def test_the_whole_batch_is_moved_once_and_only_when_asked_for():
    whole = apart(rows(6, 2)).on(torch.device("cpu"))
    assert whole() is whole()
