"""The ways to write a loss function: each is the full batch's in one process, or named before the first step."""
import collections
import copy
import math
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from reference import gradients, worst_difference
from torch import nn

import pipeengine as pe

pytestmark = pytest.mark.usefixtures("quiet_and_seeded")
ROWS, LENGTH, CLASSES = 6, 4, 8


class Model(nn.Module):
    """Scores of each class at each position; from ids, so that the rows differ."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


def flat(output, target, **options):
    return F.cross_entropy(output.flatten(0, 1), target.flatten(), **options)


def onehot(target):
    return F.one_hot(target.clamp(min=0), CLASSES).float()


class Focal(nn.Module):
    """A loss as a module, with settings."""

    def __init__(self, gamma=2.0):
        super().__init__()
        self.gamma = gamma

    def forward(self, output, target):
        nll = F.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="none")
        return ((1 - torch.exp(-nll)) ** self.gamma * nll).mean()


class Callable:
    def __call__(self, output, target):
        return flat(output, target)

    def method(self, output, target):
        return flat(output, target)


def branch(output, target):
    loss = flat(output, target)
    return 2 * loss if loss > 0.1 else loss


def selected(output, target):
    """As detection losses do: where the model is sure, by activations."""
    found = (output.detach().amax(-1) > 0).nonzero()
    rows = output[found[:, 0], found[:, 1]]
    return F.cross_entropy(rows, target[found[:, 0], found[:, 1]])


def matched(output, target):
    """As DETR does: pairs that NumPy chooses."""
    order = output.detach().square().sum(-1).numpy().argsort(1)
    return F.mse_loss(torch.take_along_dim(output, torch.from_numpy(order.copy())[..., None], 1), onehot(target))


def looped(output, target):
    total = 0
    for scores, classes in zip(output, target, strict=True):
        total = total + F.cross_entropy(scores, classes)
    return total / len(output)


def python_number(output, target):
    loss = flat(output, target)
    return loss / max(loss.item(), 1e-3)


def in_a_dict(output, target):
    return {"loss": flat(output, target), "accuracy": (output.argmax(-1) == target).float().mean()}


def refused_count():
    calls = []

    def loss(output, target):
        calls.append(1)
        return flat(output, target) * len(calls)
    return loss


Result = collections.namedtuple("Result", "loss scores")
FULL = {
    "cross_entropy": flat,
    "ignored targets": partial(flat, ignore_index=3),
    "label smoothing": partial(flat, label_smoothing=0.1),
    "sum": partial(flat, reduction="sum"),
    "class weights": partial(flat, weight=torch.linspace(0.5, 2, CLASSES)),
    "module": nn.Sequential(),
    "module of one's own": Focal(),
    "object": Callable(),
    "method": Callable().method,
    "lambda": lambda o, t: flat(o, t),
    "other names": lambda logits, labels: flat(logits, labels),
    "keyword with default": lambda o, t, scale=2.0: scale * flat(o, t),
    "positional only": (lambda o, t, /: flat(o, t)),
    "any arguments": lambda *given: flat(*given),
    "nll of log_softmax": lambda o, t: F.nll_loss(F.log_softmax(o, -1).flatten(0, 1), t.flatten()),
    "gather by hand": lambda o, t: -o.log_softmax(-1).gather(-1, t[..., None]).mean(),
    "logsumexp by hand": lambda o, t: (o.logsumexp(-1) - o.gather(-1, t[..., None])[..., 0]).mean(),
    "none, then mean": lambda o, t: flat(o, t, reduction="none").mean(),
    "none, then sum over count": lambda o, t: flat(o, t, reduction="none").sum() / t.numel(),
    "masked mean": lambda o, t: ((flat(o, t, reduction="none") * (t.flatten() != 3)).sum() / (t != 3).sum()),
    "mean of rows' means": lambda o, t: flat(o, t, reduction="none").view(t.shape).mean(1).mean(),
    "mean of rows' sums": lambda o, t: flat(o, t, reduction="none").view(t.shape).sum(1).mean(),
    "mse": lambda o, t: F.mse_loss(o, onehot(t)),
    "l1": lambda o, t: F.l1_loss(o, onehot(t)),
    "huber": lambda o, t: F.huber_loss(o, onehot(t)),
    "bce": lambda o, t: F.binary_cross_entropy_with_logits(o, onehot(t)),
    "bce of sigmoid": lambda o, t: F.binary_cross_entropy(o.sigmoid(), onehot(t)),
    "kl": lambda o, t: F.kl_div(o.log_softmax(-1), onehot(t) * 0.9 + 0.0125, reduction="batchmean"),
    "gaussian nll": lambda o, t: F.gaussian_nll_loss(o[..., 0], t.float(), o[..., 1].exp()),
    "poisson nll": lambda o, t: F.poisson_nll_loss(o[..., 0], t.float()),
    "hinge": lambda o, t: F.multi_margin_loss(o.flatten(0, 1), t.flatten()),
    "two terms": lambda o, t: flat(o, t) + 0.1 * o.square().mean(),
    "penalty of the sum": lambda o, t: flat(o, t) + 1e-3 * o.square().sum(),
    "scaled": lambda o, t: 3 * flat(o, t) / math.sqrt(CLASSES),
    "soft targets": lambda o, t: -(onehot(t) * o.log_softmax(-1)).sum(-1).mean(),
    "loop over rows": looped,
    "under autocast off": torch.autocast("cpu", enabled=False)(flat),
    "in double": lambda o, t: flat(o.double(), t),
    "dict": in_a_dict,
    "tuple": lambda o, t: (flat(o, t), o.argmax(-1)),
    "named tuple": lambda o, t: Result(flat(o, t), o),
    "namespace": lambda o, t: types.SimpleNamespace(loss=flat(o, t), note="text"),
    "output alone": lambda o: o.square().mean(),
    "no target needed": lambda o, t=None: o.square().mean(),
    "branch on its value": branch,
}
TOLD = {"selection by activations": selected, "a Python number": python_number,
        "quotient of two means": lambda o, t: flat(o, t) / o.square().mean(),
        "square root of a mean": lambda o, t: F.mse_loss(o, onehot(t)).sqrt(),
        "contrast between rows": lambda o, t: F.cross_entropy(o[:, 0] @ o[:, 1].T, torch.arange(len(o)))}
OWN = {"numpy on the way": matched}
REFUSED = {"counts its calls": (refused_count(), "changes|does not do what the model does"),
           "dict without loss": (lambda o, t: {"total": flat(o, t)}, "total, in which there is no loss"),
           "none": (lambda o, t: None, "NoneType"),
           "a float": (lambda o, t: flat(o, t).item(), "float"),
           "one number each": (lambda o, t: flat(o, t, reduction="none"), "shape .*return one number")}
FULL["module"] = type("Flat", (nn.CrossEntropyLoss,), {"forward": lambda self, o, t: nn.CrossEntropyLoss.forward(
    self, o.flatten(0, 1), t.flatten())})()


def judged(loss_fn, capfd):
    """What was said at construction, and loss and gradients with those of the full batch in one process."""
    model, ids = Model(), torch.randint(0, 20, (ROWS, LENGTH))
    target = torch.randint(0, CLASSES, (ROWS, LENGTH))
    plain = copy.deepcopy(model)
    needs = loss_fn not in (FULL["output alone"], FULL["no target needed"])
    given = {"target": target} if needs else {}
    pipe = pe.Pipeline(model, (ids,), num_stages=3, num_microbatches=2, costs="analytic", loss_fn=loss_fn, **given)
    said = capfd.readouterr().err
    ids = torch.randint(0, 20, (ROWS, LENGTH))
    found = pipe.step(ids, **given)
    loss = loss_fn(plain(ids), target) if needs else loss_fn(plain(ids))
    loss = loss if isinstance(loss, torch.Tensor) else loss["loss"] if isinstance(loss, dict) else \
        loss[0] if isinstance(loss, tuple) else loss.loss
    loss.backward()
    return said, abs(float(found - loss)), worst_difference(gradients(plain), gradients(model), 1e-3)[0]


@pytest.mark.parametrize("name", FULL)
def test_is_the_full_batchs(name, capfd):
    said, loss, worst = judged(FULL[name], capfd)
    assert loss < 2e-5 and worst < 2e-6, (loss, worst)
    assert "loss of the full batch" not in said


@pytest.mark.parametrize("name", TOLD)
def test_is_told(name, capfd):
    said, loss, worst = judged(TOLD[name], capfd)
    assert "loss of the full batch" in said or "each micro-batch counts by its rows" in said, (loss, worst)


@pytest.mark.parametrize("name", OWN)
def test_is_called_as_it_is(name, capfd):
    assert judged(OWN[name], capfd)[2] < 2e-6


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_by_name(name, capfd):
    loss_fn, why = REFUSED[name]
    with pytest.raises(pe.PipeEngineError, match=why):
        judged(loss_fn, capfd)
