"""Heads that the loss does not use, numbers out of modules kept whole, clamped parameters, lazy and compiled models."""
import copy

import pytest
import torch
import torch.nn.functional as F
from reference import assert_same_step, gradients, reference_step
from torch import nn

import pipeengine as pe

WIDTH = 16


pytestmark = pytest.mark.usefixtures("quiet_and_seeded")


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head, self.aux = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def hidden(self, x):
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x

    def forward(self, x, y):
        hidden = self.hidden(x)
        return F.mse_loss(self.head(hidden), y), self.aux(hidden)


class Early(Blocks):
    """Reads a table at its beginning in evaluation only."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList((nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), *self.blocks))

    def forward(self, x, y):
        if not self.training:
            x = self.blocks[1](x)
        return F.mse_loss(self.head(self.hidden(x)), y), x

    def hidden(self, x):
        for number, block in enumerate(self.blocks):
            x = x if number == 1 else x + torch.tanh(block(x))
        return x


def batch() -> dict:
    return dict(x=torch.randn(4, WIDTH), y=torch.randn(4, WIDTH))


@pytest.mark.parametrize("num_stages", (2, 3, 4))
@pytest.mark.parametrize("kind", (Blocks, Early))
def test_evaluate_runs_what_the_loss_does_not_use(kind, num_stages):
    model, given = kind(), batch()
    plain = copy.deepcopy(model).eval()
    pipe = pe.Pipeline(model, given, num_stages=num_stages, num_microbatches=2, costs="analytic")
    pipe.step(**given)
    pipe.eval()
    found = pipe.evaluate(**given)
    with torch.no_grad():
        expected = plain(**given)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class Counts(nn.Module):
    """Hands its caller a number made from activations."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.linear(x)
        return x, (x > 0).sum().item()


class Caller(Blocks):
    def __init__(self):
        super().__init__()
        self.counts = Counts()

    def forward(self, x, y):
        x, count = self.counts(x)
        return F.mse_loss(self.hidden(x * (count / 100)), y)


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner = nn.Linear(WIDTH, WIDTH), Caller()

    def forward(self, x, y):
        return self.inner(torch.tanh(self.first(x)), y)


@pytest.mark.parametrize("check", (True, False))
def test_a_number_from_a_module_kept_whole_keeps_its_caller_whole(check):
    model = Around()
    plain = copy.deepcopy(model)
    pipe = pe.Pipeline(model, batch(), num_stages=2, num_microbatches=2, costs="analytic", check=check)
    for _ in range(3):
        given = batch()
        model.zero_grad()
        expected = reference_step(plain, given, 2)
        assert_same_step(expected, (pipe.step(**given), gradients(model)), 1e-6)


def test_such_a_number_at_the_root_is_refused_by_name():
    with pytest.raises(pe.CaptureError, match="counts hands it a Python number"):
        pe.Pipeline(Caller(), batch(), num_stages=2, costs="analytic", check=False)


class Clamps(Blocks):
    """Keeps the weights of a block within bounds, as Gemma 3n does."""

    def forward(self, x, y):
        self.blocks[1].weight.data.clamp_(-0.1, 0.1)
        return F.mse_loss(self.hidden(x), y)


def test_a_parameter_clamped_in_place():
    model = Clamps()
    plain = copy.deepcopy(model)
    pipe = pe.Pipeline(model, batch(), num_stages=3, num_microbatches=2, costs="analytic", schedule="1f1b")
    optimizers = [torch.optim.SGD(one.parameters(), lr=1.0) for one in (model, plain)]
    for _ in range(3):
        given = batch()
        model.zero_grad()
        expected = reference_step(plain, given, 2)
        assert_same_step(expected, (pipe.step(**given), gradients(model)), 1e-6)
        for optimizer in optimizers:
            optimizer.step()
    assert float(model.blocks[1].weight.detach().abs().max()) > 0.1, "the optimizer moved it out again"


def test_a_lazy_module_is_named_with_the_way_out():
    model = nn.Sequential(nn.LazyLinear(WIDTH), nn.Linear(WIDTH, WIDTH))
    with pytest.raises(pe.CaptureError, match="module 0 is lazy.*run it once"):
        pe.Pipeline(model, (torch.randn(4, WIDTH),), loss_fn=F.mse_loss, num_stages=2, costs="analytic")


def test_a_compiled_model_is_refused_with_the_way_out():
    with pytest.raises(pe.CaptureError, match="_orig_mod"):
        pe.Pipeline(torch.compile(Blocks(), backend="eager"), batch(), num_stages=2, costs="analytic")
