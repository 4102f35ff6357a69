"""What no forward could run is named before the step, as an ``InputError`` that leaves the pipeline usable."""
import copy

import pytest
import torch
import torch.nn.functional as F
from reference import assert_same_step, gradients, reference_step
from torch import nn

import pipeengine as pe

pytestmark = pytest.mark.usefixtures("quiet_and_seeded")
WORDS, CLASSES, WIDTH = 20, 8, 16


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


def flat(output, target):
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def made(loss_fn=flat, **options):
    model = Model()
    ids, target = torch.randint(0, WORDS, (4, 5)), torch.randint(0, CLASSES, (4, 5))
    return pe.Pipeline(model, (ids,), num_stages=3, num_microbatches=2, costs="analytic", loss_fn=loss_fn,
                       target=target, **options), model, ids, target


def with_entry(tensor, value):
    changed = tensor.clone()
    changed[3, 2] = value
    return changed


def test_entries_beyond_a_table_are_named_and_the_next_step_runs():
    pipe, model, ids, target = made()
    plain = copy.deepcopy(model)
    for wrong in (WORDS, -1):
        with pytest.raises(pe.InputError, match=rf"holds {wrong}, and embedding has entries 0 to 19"):
            pipe.step(with_entry(ids, wrong), target=target)
    with pytest.raises(pe.InputError, match="holds 8, and :cross_entropy has entries 0 to 7"):
        pipe.step(ids, target=with_entry(target, CLASSES))
    with pytest.raises(pe.InputError, match="holds 99"):
        pipe.evaluate(with_entry(ids, 99))
    ignored = with_entry(target, -100)
    expected = reference_step(plain, (ids,), 2, loss_fn=flat, target=ignored)
    assert_same_step(expected, (pipe.step(ids, target=ignored), gradients(model)), 1e-6)


def test_what_is_mended_on_the_way_is_not_refused():
    """A forward may clamp its ids, and a loss leave entries out."""
    class Clamps(Model):
        def forward(self, ids):
            return super().forward(ids.clamp(0, WORDS - 1))

    def tail(output, target):
        return F.cross_entropy(output[:, 1:].flatten(0, 1), target[:, 1:].flatten())
    model, ids = Clamps(), torch.randint(0, WORDS, (4, 5))
    target = torch.randint(0, CLASSES, (4, 5))
    pipe = pe.Pipeline(model, (ids,), num_stages=3, num_microbatches=2, costs="analytic", loss_fn=tail, target=target)
    target[0, 0] = 999
    assert pipe.step(with_entry(ids, WORDS + 5), target=target).isfinite()


@pytest.mark.parametrize("check", (True, False))
def test_class_numbers_of_another_type_are_named(check):
    with pytest.raises(pe.InputError, match="Int|int32"):
        made(lambda output, target: flat(output, target.int()), check=check)


class Short(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Model()

    def forward(self, ids):
        if ids.shape[1] > 6:            # as an assert does that nobody has rewritten
            raise AssertionError
        return self.inner(ids)


def test_an_error_without_a_message_is_told_by_its_line():
    ids, target = torch.randint(0, WORDS, (4, 9)), torch.randint(0, CLASSES, (4, 9))
    with pytest.raises(pe.CaptureError, match=r"AssertionError at .*test_lookups.py:\d+, raise AssertionError"):
        pe.Pipeline(nn.Sequential(Short()), (ids,), num_stages=2, costs="analytic", loss_fn=flat, target=target)


class Rotary(nn.Module):
    """A table that grows with the longest batch, registered anew each time."""

    def __init__(self):
        super().__init__()
        self.length = 0
        self.register_buffer("table", torch.zeros(0, WIDTH), persistent=False)

    def forward(self, x):
        if x.shape[1] > self.length:
            self.length = x.shape[1]
            self.register_buffer("table", torch.arange(self.length)[:, None] * torch.linspace(0, 1, WIDTH)[None])
        return x + self.table[:x.shape[1]]


class Rotates(Model):
    def __init__(self):
        super().__init__()
        self.rotary = Rotary()

    def forward(self, ids):
        x = self.embedding(ids)
        x = self.rotary(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


def test_a_table_that_grows_with_longer_batches():
    model = Rotates()
    plain = copy.deepcopy(model)
    ids, target = torch.randint(0, WORDS, (4, 5)), torch.randint(0, CLASSES, (4, 5))
    pipe = pe.Pipeline(model, (ids,), num_stages=3, num_microbatches=2, costs="analytic", loss_fn=flat, target=target)
    for length in (5, 9, 4, 9):
        ids, target = torch.randint(0, WORDS, (4, length)), torch.randint(0, CLASSES, (4, length))
        model.zero_grad()
        expected = reference_step(plain, (ids,), 2, loss_fn=flat, target=target)
        assert_same_step(expected, (pipe.step(ids, target=target), gradients(model)), 1e-6)
