"""What evaluate returns for the whole batch is what the model itself returns for it."""

import pytest
import torch
from torch import nn

import pipeengine as pe
from pipeengine.runtime.outputs import row_dim


class Answers(nn.Module):
    def __init__(self):
        super().__init__()
        self.below, self.above = nn.Linear(6, 8), nn.Linear(8, 16)
        self.register_buffer("table", torch.randn(7, 16))

    def forward(self, x, y):
        out = self.above(torch.tanh(self.below(x)))
        loss = (out - y).pow(2).mean()
        return {
            "loss": loss,
            "rows": out,
            "second": out.transpose(0, 1),
            "flat": out.flatten(0, 1),
            "table": self.table * 2,
            "total": out.pow(2).sum(),
            "mean": out.mean(),
            "count": (out > 0).sum(),
            "chosen": out[y > 0],
        }


@pytest.mark.parametrize("rows", [8, 7])
def test_outputs_are_the_models_own(rows):
    torch.manual_seed(0)
    model, batch = Answers(), {"x": torch.randn(rows, 5, 6), "y": torch.randn(rows, 5, 16)}
    with torch.no_grad():
        expected = model(**batch)
    ours = pe.Pipeline(model, batch, num_stages=2, num_microbatches=4, costs="analytic").evaluate(**batch)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name].shape == value.shape, name
        assert torch.allclose(ours[name].double(), value.double(), rtol=1e-5, atol=1e-6), name


class Mixes(nn.Module):
    """Returns the mean over rows of each entry: no micro-batches' outputs tell it, and it has no row dimension."""

    def __init__(self):
        super().__init__()
        self.below, self.above = nn.Linear(6, 8), nn.Linear(8, 16)

    def forward(self, x):
        out = self.above(self.below(x))
        return out.mean(), out.mean(0)


def test_what_cannot_be_merged_is_refused_by_name():
    batch = {"x": torch.randn(8, 6)}
    pipe = pe.Pipeline(Mixes(), batch, num_stages=2, num_microbatches=2, costs="analytic", seed=0)
    with pytest.raises(pe.InputError, match="cannot be merged.*no dimension holds rows"):
        pipe.evaluate(x=torch.randn(6, 6))


class LossLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.below, self.above = nn.Linear(6, 8), nn.Linear(8, 16)

    def forward(self, x):
        out = self.above(self.below(x))
        return out, out.pow(2).mean()


def test_loss_may_come_after_the_logits():
    model, batch = LossLast(), {"x": torch.randn(8, 6)}
    with torch.no_grad():
        logits, loss = model(**batch)
    pipe = pe.Pipeline(model, batch, num_stages=2, num_microbatches=4, costs="analytic")
    torch.testing.assert_close(pipe.step(**batch), loss)
    ours = pipe.evaluate(**batch)
    torch.testing.assert_close(ours[0], logits)
    torch.testing.assert_close(ours[1], loss)


@pytest.mark.parametrize(
    ("shapes", "rows", "dim"),
    [
        ([(5, 4, 16), (5, 4, 16)], [4, 4], 1),
        ([(7, 16), (7, 16)], [4, 4], None),
        ([(7, 16), (7, 16)], [4, 3], None),
        ([(20, 16), (15, 16)], [4, 3], 0),
        ([(3, 16), (9, 16)], [4, 4], 0),
        ([(4, 9), (4, 7)], [4, 4], None),
    ],
)
def test_row_dimension(shapes, rows, dim):
    assert row_dim(shapes, rows) == dim


class Chooses(torch.nn.Module):
    """Answers with the largest entry of every column, over the rows of a micro-batch."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(5, 5) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean(), x.amax(0)


def test_an_output_that_cannot_be_merged_leaves_the_pipeline_usable():
    model, x = Chooses(), torch.randn(4, 5)
    pipe = pe.Pipeline(model, (x,), num_stages=2, num_microbatches=2, costs="analytic")
    for _ in range(2):
        with pytest.raises(pe.InputError, match="cannot be merged"):
            pipe.evaluate(x)
    assert torch.isfinite(pipe.step(x))
