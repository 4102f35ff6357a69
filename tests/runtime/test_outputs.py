"""What evaluate returns for the whole batch is what the model itself returns for it."""

import pytest
import torch
from torch import nn

import pipeengine as pe


class Returns(nn.Module):
    """Returns its loss and what ``answers`` make of (its hidden values, its inputs, itself), under their names."""

    def __init__(self, answers):
        super().__init__()
        self.below, self.above = nn.Linear(6, 8), nn.Linear(8, 16)
        self.register_buffer("table", torch.randn(8, 16))
        self.folded = nn.Flatten(0, 1)
        self.answers = answers

    def forward(self, x, y):
        out = self.above(torch.tanh(self.below(x)))
        loss = (out - y).pow(2).mean()
        return {"loss": loss, **{name: answer(out, x, y, self) for name, answer in self.answers.items()}}


# Of values (rows, 5, 16). Two rows to a micro-batch and a table of 8: sizes that are multiples of rows by chance.
RIGHT = {
    "rows": lambda out, x, y, model: out,
    "rows second": lambda out, x, y, model: out.transpose(0, 1),
    "rows last": lambda out, x, y, model: out.permute(2, 1, 0).contiguous(),
    "one number a row": lambda out, x, y, model: out.sum((1, 2)),
    "rows and positions in one": lambda out, x, y, model: out.flatten(0, 1),
    "positions and rows in one": lambda out, x, y, model: out.transpose(0, 1).reshape(-1, 16),
    "positions and rows in one, by a module": lambda out, x, y, model: model.folded(out.transpose(0, 1)),
    "folded and unfolded": lambda out, x, y, model: out.transpose(0, 1).flatten(0, 1).unflatten(0, (5, -1)),
    "two sets of rows": lambda out, x, y, model: torch.cat([out, 2 * out]),
    "the second of two sets": lambda out, x, y, model: torch.cat([out, 2 * out]).chunk(2)[1],
    "sets stacked": lambda out, x, y, model: torch.stack([out, -out]),
    "rows repeated": lambda out, x, y, model: out.repeat(3, 1, 1),
    "each row repeated": lambda out, x, y, model: out.repeat_interleave(3, 0),
    "a table": lambda out, x, y, model: model.table * 2,
    "a vector as long as the batch": lambda out, x, y, model: model.table[:, 0],
    "positions": lambda out, x, y, model: torch.arange(x.shape[1]),
    "a table for every row": lambda out, x, y, model: model.table.expand(len(x), 8, 16),
    "zeros for every row": lambda out, x, y, model: torch.zeros(x.shape[0], 3) + 1,
    "zeros like": lambda out, x, y, model: torch.zeros_like(out),
    "a total": lambda out, x, y, model: out.pow(2).sum(),
    "totals": lambda out, x, y, model: out.sum(0),
    "a mean": lambda out, x, y, model: out.mean(),
    "means": lambda out, x, y, model: out.mean(0),
    "a mean of chosen ones": lambda out, x, y, model: (out * (y > 0)).sum() / (y > 0).sum(),
    "a count": lambda out, x, y, model: (out > 0).sum(),
    "counts": lambda out, x, y, model: (out > -100).sum(0),
    "chosen": lambda out, x, y, model: out[y > 0],
    "an entry of every row": lambda out, x, y, model: out[torch.arange(len(x)), y[:, :, 0].argmax(-1)],
    "gathered": lambda out, x, y, model: out.gather(1, y.argsort(1)),
    "softmax": lambda out, x, y, model: out.softmax(-1),
    "sorted within rows": lambda out, x, y, model: out.sort(1)[0],
    "overlapping windows": lambda out, x, y, model: out.contiguous().as_strided((len(x), 4, 2, 16), (80, 16, 16, 1)),
    "windows of what has rows second in memory": lambda out, x, y, model: out.transpose(0, 1).contiguous()
        .transpose(0, 1).as_strided((len(x), 4, 2, 16), (16, len(x) * 16, len(x) * 16, 1)),
    "length": lambda out, x, y, model: x.shape[1],
    "nested": lambda out, x, y, model: (out[:, 0], [{"a": out[:, 1]}, None, "text"]),
}
WRONG = {
    "the first row": lambda out, x, y, model: out[0],
    "largest": lambda out, x, y, model: out.amax(0),
    "a largest number": lambda out, x, y, model: out.max(),
    "spread": lambda out, x, y, model: out.std(0),
    "root of a mean": lambda out, x, y, model: out.pow(2).mean().sqrt(),
    "backwards": lambda out, x, y, model: out.flip(0),
    "sorted": lambda out, x, y, model: out[y[:, 0, 0].argsort()],
    "added up along rows": lambda out, x, y, model: out.cumsum(0),
    "shares of rows": lambda out, x, y, model: out.softmax(0),
    "less the mean": lambda out, x, y, model: out - out.mean(0),
    "variance": lambda out, x, y, model: (out - out.mean(0)).pow(2).sum(),
    "pairs of rows": lambda out, x, y, model: out[:, 0] @ out[:, 0].T,
    "numbers of rows": lambda out, x, y, model: torch.arange(len(x)),
    "by how many rows": lambda out, x, y, model: out / len(x),
    "how many rows": lambda out, x, y, model: len(x),
    "how many rows in a tensor": lambda out, x, y, model: torch.full((3,), len(x)),
    "part of a table": lambda out, x, y, model: model.table[: len(x)],
    "rows and a table": lambda out, x, y, model: torch.cat([out[:, 0], model.table]),
    "halves of rows": lambda out, x, y, model: out.chunk(2)[0],
    "windows across rows": lambda out, x, y, model: out.contiguous().as_strided((len(x) - 1, 6, 16), (80, 16, 1)),
    "windows of the next row": lambda out, x, y, model: out.transpose(0, 1).contiguous().transpose(0, 1)
        .as_strided((len(x), 4, 16), (16, 16, 1)),
    "windows with gaps": lambda out, x, y, model: out.contiguous().as_strided((len(x), 4), (40, 1)),
    "rows in two dimensions": lambda out, x, y, model: out.unflatten(0, (2, -1)),
    "a mean and a total": lambda out, x, y, model: out.mean() + out.sum(),
    "written in place": lambda out, x, y, model: out.clone().sub_(out.mean(0)),
}


def batch_of(rows):
    return {"x": torch.randn(rows, 5, 6), "y": torch.randn(rows, 5, 16)}


def assert_same(found, expected, name):
    if not isinstance(expected, torch.Tensor):
        assert type(found) is type(expected), name
        if isinstance(expected, (tuple, list, dict)):
            assert len(found) == len(expected)
            keys = expected if isinstance(expected, dict) else range(len(expected))
            for key in keys:
                assert_same(found[key], expected[key], f"{name}[{key}]")
        else:
            assert found == expected, name
        return
    assert found.shape == expected.shape and found.dtype == expected.dtype, name
    assert torch.allclose(found.double(), expected.double(), rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("rows", [8, 7])
def test_outputs_are_the_models_own(rows):
    torch.manual_seed(0)
    model, batch = Returns(RIGHT), batch_of(rows)
    with torch.no_grad():
        expected = model(**batch)
    ours = pe.Pipeline(model, batch, num_stages=2, num_microbatches=4, costs="analytic", seed=0).evaluate(**batch)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert_same(ours[name], value, name)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_rows_is_refused_by_name(name):
    torch.manual_seed(0)
    batch = batch_of(8)
    model = Returns({name: WRONG[name]})
    pipe = pe.Pipeline(model, batch, num_stages=2, num_microbatches=4, costs="analytic")
    with pytest.raises(pe.InputError, match=f"output {name} cannot be merged"):
        pipe.evaluate(**batch)
    assert torch.isfinite(pipe.step(**batch)), "nothing has run"


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


class Routed(torch.nn.Module):
    """Adds to its loss, and returns, a term over all tokens of the batch, as a router of experts has."""

    def __init__(self):
        super().__init__()
        self.below, self.above = torch.nn.Linear(5, 4), torch.nn.Linear(4, 5)

    def forward(self, x):
        scores = self.below(x)
        share = scores.softmax(-1)
        balance = (share / len(x)).sum(0) @ (share > 0.25).float().mean(0)
        loss = self.above(scores).square().mean() + 0.1 * balance
        return {"loss": loss, "balance": balance, "scores": scores}


def test_a_term_of_the_loss_is_put_together_as_the_loss_is():
    model, x = Routed(), torch.randn(5, 5)
    pipe = pe.Pipeline(model, (x,), num_stages=2, num_microbatches=2, costs="analytic")
    with torch.no_grad():
        parts = [model(x[:3]), model(x[3:])]
        found = pipe.evaluate(x)
    for name in ("loss", "balance"):
        torch.testing.assert_close(found[name], 0.6 * parts[0][name] + 0.4 * parts[1][name])
    torch.testing.assert_close(found["scores"], model.below(x))
