"""What no weights of micro-batches can mend is said at construction, once, with both numbers and the way out."""
import pytest
import torch
from torch import nn

import pipeengine as pe

X = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 4, (12,), generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    def __init__(self, norm: bool = False, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.last(self.dropout(self.norm(self.first(x)).relu()))


def contrastive(output, target):
    return nn.functional.cross_entropy(output @ output.T, torch.arange(len(output)))


def told(capsys, loss_fn, model=None, **options) -> str:
    pe.Pipeline(model or Model(), (X,), num_stages=2, num_microbatches=4, loss_fn=loss_fn, target=Y, costs="analytic",
                **options)
    return capsys.readouterr().err


@pytest.mark.parametrize("loss_fn", [
    nn.functional.cross_entropy, lambda o, t: nn.functional.cross_entropy(o, t, reduction="sum"),
    lambda o, t: nn.functional.cross_entropy(o, t.where(t > 0, -100)), lambda o, t: o.square().mean() + o.abs().sum(),
    lambda o, t: (o.logsumexp(1) * (t > 1)).sum() / (t > 1).sum()])
def test_what_can_be_weighed_is_not_told(capsys, loss_fn):
    assert "micro-batches give" not in told(capsys, loss_fn)


def test_contrastive_losses_are_told(capsys):
    text = told(capsys, contrastive)
    assert "the loss of the full batch is" in text and "its 2 micro-batches give" in text
    assert "Pass loss_weight=" in text and text.count("the loss of the full batch") == 1


def test_batch_norm_is_told(capsys):
    model = Model(norm=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert "its 2 micro-batches give" in told(capsys, nn.functional.cross_entropy, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("options", [dict(check=False), dict(loss_weight=lambda x: 1.0)])
def test_who_says_so_is_left_alone(capsys, options):
    assert "micro-batches give" not in told(capsys, contrastive, **options)


def test_random_models_are_not_compared(capsys):
    assert "micro-batches give" not in told(capsys, contrastive, Model(dropout=0.5))
