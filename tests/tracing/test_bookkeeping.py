"""What recording keeps books of: calls and their names, what operators cost, state that is put back, structures."""
import collections
import random

import numpy
import pytest
import torch
from torch import nn

from pipeengine.torch_private import FakeTensorMode, storage_number
from pipeengine.tracing.meter import Meter, kept_bytes, tensor_bytes
from pipeengine.tracing.module_state import (
    difference,
    python_random,
    python_state,
    restore,
    set_python_random,
    undisturbed,
)
from pipeengine.tracing.node_writer import WriteWatch
from pipeengine.tracing.open_calls import CallStack
from pipeengine.tracing.pytree import tree_encode
from pipeengine.tracing.recording import OPAQUE, Rebuilt, Ref, TensorSpec, encoded_leaves, fill, picks, refs

# -- calls ------------------------------------------------------------------------------------------------------------


def test_calls_are_numbered_named_and_nested():
    """A block that is called twice has two scopes; steps are named in the scope that they run in."""
    calls, block = CallStack(), nn.Linear(1, 1)
    assert (calls.path, calls.index, calls.innermost) == ("", -1, None)
    with calls.opened(nn.Module(), "", 0, []) as root:
        for turn in range(2):
            with calls.opened(block, "block", turn, []) as call:
                assert (calls.path, calls.index, call.parent) == ("block", 1 + turn, root.index)
                assert calls.innermost is call and call.scope == ("block", "block#1")[turn]
                assert [calls.next_name("add") for _ in range(3)] == [
                    f"{call.scope}:add", f"{call.scope}:add.1", f"{call.scope}:add.2"]
        assert calls.next_name("add") == ":add" and calls.index == 0
    assert calls.next_name("add") == ":add.1" and len(calls.calls) == 3
    assert [calls.next_scope("block"), calls.next_scope("other")] == ["block#2", "other"]


def test_what_is_hidden_stays_hidden_until_the_outermost_ends():
    calls = CallStack()
    with pytest.raises(KeyError), calls.hide():
        with calls.hide():
            assert calls.hidden
        assert calls.hidden
        raise KeyError
    assert not calls.hidden


def test_a_call_that_raises_is_no_longer_open():
    calls = CallStack()
    with pytest.raises(KeyError), calls.opened(nn.Module(), "block", 0, []):
        raise KeyError
    assert calls.innermost is None and calls.calls == [None]


def test_where_tells_module_and_line():
    calls = CallStack()
    assert calls.where().startswith("module (root), ") and __file__ in calls.where()
    with calls.opened(nn.Module(), "a.b", 0, []):
        assert calls.where().startswith("module a.b, ")


# -- what operators cost ----------------------------------------------------------------------------------------------


def metered(what, *shapes):
    """What ``what`` does with fakes of these shapes."""
    with FakeTensorMode():
        fakes = [torch.ones(shape) for shape in shapes]
        with Meter() as meter:
            what(*fakes)
    return meter


def test_a_product_of_matrices_is_two_operations_per_number_that_meets_another():
    meter = metered(torch.matmul, (3, 4), (4, 5))
    assert meter.flops == 2 * 3 * 4 * 5 and meter.bytes == 4 * (12 + 20 + 15) and not meter.random
    assert list(meter.made.values()) == [4 * 15]
    meter.clear()
    assert (meter.flops, meter.bytes, meter.random, meter.made) == (0, 0, False, {})


def test_a_view_moves_nothing_and_keeps_all_of_what_it_views():
    """Every view used to count as read once: the fake of its result is asked for its device, which is an operator."""
    for view in (lambda a: a[:2].t(), lambda a: a.view(-1), lambda a: a.unbind(), lambda a: a.expand(3, 6, 4)):
        assert metered(view, (6, 4)).bytes == 0
    assert metered(lambda a: a[:2] + 1, (6, 4)).bytes == 64
    a = torch.ones(6, 4)
    assert tensor_bytes(a[:2]) == 32 and kept_bytes(a[:2]) == 96
    assert kept_bytes(torch.eye(3).to_sparse()) == 36


@pytest.mark.parametrize("draws, is_random", [
    (lambda x: torch.rand_like(x), True), (lambda x: nn.functional.dropout(x, 0.5), True), (lambda x: x + 1, False),
    (lambda x: nn.functional.dropout(x, 0.5, training=False), False),
    (lambda x: nn.functional.scaled_dot_product_attention(x, x, x), False), (lambda x: torch.bernoulli(x), True)])
def test_who_draws_random_numbers_is_seen(draws, is_random):
    """Attention carries the mark for its dropout's sake: without any it draws nothing."""
    assert metered(draws, (1, 2, 3, 4)).random == is_random


@pytest.mark.parametrize("change, seen", [
    (lambda x: x.add_(1), True), (lambda x: x[0].zero_(), True), (lambda x: x.t().mul_(2), True),
    (lambda x: x + 1, False), (lambda x: x.view(-1), False), (lambda x: x.requires_grad_(), True),
    (lambda x: x.copy_(x), True)])
def test_writes_are_seen_through_views(change, seen):
    x, other = torch.ones(2, 3), torch.ones(2)
    watch = WriteWatch([x, other, x])
    change(x)
    assert watch.written() == ({storage_number(x)} if seen else set())


# -- state that is put back -------------------------------------------------------------------------------------------


class Untidy(nn.Module):
    """A forward that leaves traces of every kind."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.count, self.seen, self.table, self.names = 0, [1], {"a": 1}, {"x"}
        self.queue = collections.deque([1, 2])
        self.register_buffer("mean", torch.zeros(2))


TRACES = {
    "a number": lambda m: setattr(m, "count", m.count + 1),
    "a list": lambda m: m.seen.append(2),
    "a dict's value": lambda m: m.table.update(a=2),
    "a dict's key": lambda m: m.table.pop("a"),
    "a set": lambda m: m.names.add("y"),
    "a queue": lambda m: m.queue.append(3),
    "a new attribute": lambda m: setattr(m, "late", object()),
    "one that is gone": lambda m: delattr(m, "count"),
    "another list": lambda m: setattr(m, "seen", [1]),
}


@pytest.mark.parametrize("name", TRACES)
def test_a_trace_is_named_and_wiped_out(name):
    module = Untidy()
    before = python_state(module)
    kept = {key: value for key, value in vars(module).items()}
    assert difference(before, python_state(module)) == ""
    TRACES[name](module)
    told = difference(before, python_state(module))
    assert told in ("count", "seen", "table", "names", "queue", "late") and told
    restore(module, before)
    assert difference(before, python_state(module)) == "" and all(vars(module)[key] is kept[key] for key in kept)
    assert (module.count, module.seen, module.table, module.names) == (0, [1], {"a": 1}, {"x"})
    assert list(module.queue) == [1, 2] and not hasattr(module, "late")


def test_an_equal_number_is_the_same_one_of_another_type_is_not_and_tensors_are_data():
    module = Untidy()
    module.count = 1000
    before = python_state(module)
    module.count = int("1000")
    assert difference(before, python_state(module)) == ""
    module.count = 1000.0
    assert difference(before, python_state(module)) == "count"
    module.count, module.seen[0] = 1000, True
    assert difference(before, python_state(module)) == "seen", "what a list holds is told by identity"
    module.seen[0], module.kept = 1, None
    assert difference(before, python_state(module)) == "", "an attribute that holds nothing says nothing"
    module.mean_before = torch.ones(2)
    assert difference(before, python_state(module)) == "", "a tensor is data"


def test_nothing_that_runs_undisturbed_leaves_a_trace():
    """Attributes, children, buffers by value and by identity, all random numbers; after an error too."""
    model = Untidy()
    mean, inner, training = model.mean, model.inner, model.inner.training
    torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
    expected = torch.rand(2), random.random(), numpy.random.rand()
    torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
    with pytest.raises(KeyError), undisturbed(model):
        for trace in TRACES.values():
            trace(model) if trace is not TRACES["one that is gone"] else None
        model.mean.add_(1)
        model.mean = torch.ones(2)
        model.inner = nn.Identity()
        inner.eval()
        torch.rand(5), random.random(), numpy.random.rand(5)
        raise KeyError
    assert model.mean is mean and not mean.any() and model.inner is inner and inner.training == training
    assert model.count == 0 and model.seen == [1] and not hasattr(model, "late")
    assert torch.equal(torch.rand(2), expected[0]) and (random.random(), numpy.random.rand()) == expected[1:]


def test_pythons_random_numbers_go_back():
    random.seed(3), numpy.random.seed(3)
    numpy.random.standard_normal()              # leaves half of a pair behind
    state = python_random()
    first = random.random(), numpy.random.standard_normal(), numpy.random.rand()
    set_python_random(state)
    assert (random.random(), numpy.random.standard_normal(), numpy.random.rand()) == first


# -- structures with numbers in place of tensors ---------------------------------------------------------------------


def drawn(draw, depth=3):
    """Nested containers of tensors (as numbers), settings and slices."""
    kind = draw.choice(("ref", "ref", "atom")) if depth == 0 else draw.choice(
        ("ref", "atom", "tuple", "list", "dict", "slice", "rebuilt"))
    if kind == "ref":
        return Ref(draw.randrange(9))
    if kind == "atom":
        return draw.choice((1, 2.5, "text", None, True, torch.float32))
    if kind == "slice":
        return slice(*(drawn(draw, 0) for _ in range(3)))
    items = [drawn(draw, depth - 1) for _ in range(draw.randint(0, 3))]
    if kind == "dict":
        return dict(zip("abc", items))
    return Rebuilt(list, tuple(items)) if kind == "rebuilt" else (tuple if kind == "tuple" else list)(items)


@pytest.mark.parametrize("seed", range(40))
def test_filling_puts_a_value_where_each_number_stands(seed):
    """In the order in which they are told, repeats included."""
    structure = drawn(random.Random(seed))
    met = []
    filled = fill(structure, lambda number: met.append(number) or f"value {number}")
    assert met == list(refs(structure)) == [leaf.value for leaf in encoded_leaves(structure) if isinstance(leaf, Ref)]
    assert str(filled).count("value ") == len(met)
    assert not list(refs(filled)), "no number is left"


@pytest.mark.parametrize("structure, wanted, expected", [
    (Ref(4), (4,), ("",)), ((Ref(1), Ref(2), None), (2, 1), ("[1]", "[0]")), ([Ref(1), 5, Ref(2)], (2,), ("[2]",)),
    ({"a": Ref(7), "b": (Ref(8), 1)}, (8, 7), ("@1", "@0")), ((Ref(1), (Ref(2),)), (2,), ("@1",)),
    (Rebuilt(list, (Ref(1), OPAQUE, Ref(3))), (3,), ("@2",)), ((), (), ())])
def test_results_are_picked_by_place_or_by_leaf(structure, wanted, expected):
    assert picks(structure, wanted) == expected


@pytest.mark.parametrize("seed", range(20))
def test_encoded_leaves_are_those_of_the_real_structure(seed):
    """A structure of tensors, encoded, has a number where each tensor was, in the same order."""
    tensors = [torch.full((), float(number)) for number in range(9)]
    real = fill(drawn(random.Random(seed)), tensors.__getitem__)
    encoded = tree_encode(real, lambda leaf: Ref(int(leaf)) if isinstance(leaf, torch.Tensor) else leaf)
    again = fill(encoded, tensors.__getitem__)
    assert str(again) == str(real)
    found = [leaf.value for leaf in encoded_leaves(encoded) if isinstance(leaf, Ref)]
    assert found == list(refs(encoded))


def test_bytes_of_a_value_are_those_of_its_elements():
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2), (torch.bool, 1), (torch.complex128, 16)):
        assert TensorSpec((3, 0, 2), dtype, (), False).bytes == 0
        assert TensorSpec((3, 5), dtype, (), False).bytes == 15 * size == torch.zeros(3, 5, dtype=dtype).nbytes
        assert TensorSpec((), dtype, (), False).bytes == size
