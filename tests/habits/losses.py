"""Habits around losses, inputs and what surrounds a step."""
import contextvars
import random

import torch
import torch.nn.functional as F
from torch import nn, optim

from habits import WIDTH, Net, batch, habit, train

GAIN = contextvars.ContextVar("GAIN", default=1.0)


def with_loss(name: str, make, change=lambda loss, number: None, **options):
    """A loop with a loss function ``make()``, which is changed before each step."""
    def loop(start):
        loss = make()
        trainer = start(Net(), {"x": batch(0)["x"]}, loss_fn=loss, target=batch(0)["y"])
        optimizer = optim.SGD(trainer.parameters(), 0.1)
        for number in range(3):
            change(loss, number)
            optimizer.zero_grad()
            trainer.step(x=batch(number)["x"], target=batch(number)["y"])
            optimizer.step()
    habit(name, **options)(loop)


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.ones(WIDTH))
        self.plain, self.held = torch.ones(WIDTH), [torch.ones(WIDTH)]

    def forward(self, output, target):
        return ((output - target).square() * self.weight * self.plain * self.held[0]).mean()


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, output, target):
        return F.mse_loss(output, target) * torch.exp(-self.log_scale) + self.log_scale


with_loss("a buffer of the loss filled", Weighted, lambda loss, n: loss.weight.fill_(1 + n))
with_loss("a buffer of the loss replaced", Weighted, lambda loss, n: setattr(
    loss, "weight", torch.full((WIDTH,), 1.0 + n)))
with_loss("a tensor of the loss filled", Weighted, lambda loss, n: loss.plain.fill_(1 + n))
with_loss("a tensor of the loss replaced", Weighted, lambda loss, n: setattr(
    loss, "plain", torch.full((WIDTH,), 1.0 + n)))
with_loss("a tensor in a list of the loss replaced", Weighted, lambda loss, n: loss.held.__setitem__(
    0, torch.full((WIDTH,), 1.0 + n)))
with_loss("a loss that learns", Learned, refused="loss")


@habit("a context variable read by the forward")
def context_variable(start):
    class Gained(Net):
        def forward(self, x, y=None):
            return super().forward(x * GAIN.get(), y)
    trainer = start(Gained())
    for gain in (1.0, 0.5, 2.0):
        token = GAIN.set(gain)
        train(trainer, steps=1)
        GAIN.reset(token)


class Slotted:
    __slots__ = ("gain",)

    def __init__(self):
        self.gain = 1.0


@habit("an object with slots behind the model")
def slotted(start):
    class Reads(Net):
        def __init__(self):
            super().__init__()
            self.settings = Slotted()

        def forward(self, x, y=None):
            return super().forward(x * self.settings.gain, y)
    trainer = start(Reads())
    for gain in (1.0, 0.5, 2.0):
        trainer.model.settings.gain = gain
        train(trainer, steps=1)


@habit("a number given to every step")
def given_number(start):
    class Blended(Net):
        def forward(self, x, y, beta=1.0):
            return beta * super().forward(x, y)
    trainer = start(Blended(), {**batch(0), "beta": 1.0})
    for number in range(3):
        trainer.step(**batch(number), beta=1.0 - 0.3 * number)


@habit("batches of changing size")
def sizes(start):
    trainer = start(Net())
    for number, rows in enumerate((4, 3, 6, 1, 4)):
        trainer.step(**batch(number, rows))


@habit("mixup")
def mixup(start):
    trainer = start(Net())
    for number in range(3):
        one, two, share = batch(number), batch(number + 10), random.Random(number).random()
        trainer.step(**{name: share * one[name] + (1 - share) * two[name] for name in one})


@habit("anomaly detection around a step")
def anomaly(start):
    trainer = start(Net())
    with torch.autograd.detect_anomaly(check_nan=True):
        trainer.step(**batch(0))
    trainer.step(**batch(1))


@habit("a profiler around a step")
def profiled(start):
    trainer = start(Net())
    with torch.profiler.profile():
        trainer.step(**batch(0))
    trainer.step(**batch(1))


@habit("activations saved on the CPU around a step")
def saved_on_cpu(start):
    trainer = start(Net())
    with torch.autograd.graph.save_on_cpu():
        trainer.step(**batch(0))
    trainer.step(**batch(1))


@habit("autocast around some steps", dtype=torch.float32, tolerance=2e-2)
def autocast(start):
    trainer = start(Net())
    for number in range(4):
        with torch.autocast("cpu", enabled=bool(number % 2)):
            trainer.step(**batch(number))


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, strength):
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.strength * gradient, None


@habit("gradient reversal annealed")
def reversal(start):
    class Adversarial(Net):
        strength = 1.0

        def forward(self, x, y):
            return super().forward(Reversed.apply(self.blocks[0](x), self.strength), y)
    trainer = start(Adversarial())
    for number in range(3):
        trainer.model.strength = 0.3 * number
        train(trainer, steps=1)


@habit("checkpointing switched on and off")
def checkpointing(start):
    class Checkpointed(Net):
        recompute = False

        def body(self, x):
            for block in self.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
            return self.head(x)
    trainer = start(Checkpointed())
    for number in range(4):
        trainer.model.recompute = bool(number % 2)
        train(trainer, steps=1)


@habit("deep supervision")
def deep(start):
    class Deep(Net):
        def forward(self, x, y):
            loss = 0
            for depth, block in enumerate(self.blocks):
                x = block(x)
                loss = loss + 0.5 ** depth * F.mse_loss(self.head(x), y)
            return loss
    train(start(Deep()))


@habit("stochastic depth by Python's random numbers", truth="micro", refused="random")
def stochastic_depth(start):
    class Skipping(Net):
        def body(self, x):
            for block in self.blocks:
                if random.random() < 0.5:
                    x = block(x)
            return self.head(x)
    train(start(Skipping()))


@habit("a contrastive loss", told="loss of the full batch is")
def contrastive(start):
    class Contrast(Net):
        def forward(self, x, y):
            a, b = F.normalize(self.body(x), dim=-1), F.normalize(self.body(y), dim=-1)
            return F.cross_entropy(a @ b.T, torch.arange(len(a)))
    train(start(Contrast()), steps=1)


@habit("a gradient penalty", refused="function transform")
def penalty(start):
    class Penalised(Net):
        def forward(self, x, y):
            return super().forward(x, y) + 0.1 * self.slope(x)

        def slope(self, x):
            slopes = torch.func.vmap(torch.func.grad(lambda row: self.head(row).square().sum()))(x)
            return slopes.square().sum(-1).mean()
    train(start(Penalised()), steps=1)


def with_plain_loss(name: str, loss_fn, **options):
    """A loop with a loss function that nothing changes."""
    with_loss(name, lambda: loss_fn, **options)


with_plain_loss("a loss by quantiles", lambda o, t: torch.maximum(0.9 * (t - o), 0.1 * (o - t)).mean())
with_plain_loss("roots of rows, then their mean", lambda o, t: (o - t).square().mean(1).sqrt().mean())
with_plain_loss("an embedding's cosine", lambda o, t: F.cosine_embedding_loss(o, t, torch.ones(len(o))))
with_plain_loss("a triplet's margin", lambda o, t: F.triplet_margin_loss(o, t, t.flip(1)))
with_plain_loss("a Gaussian likelihood", lambda o, t: F.gaussian_nll_loss(o, t, o.exp()))
with_plain_loss("a divergence per row", lambda o, t: F.kl_div(o.log_softmax(-1), t.softmax(-1), reduction="batchmean"))
with_plain_loss("Dice's coefficient of each row", lambda o, t: (1 - 2 * (o.sigmoid() * (t > 0)).sum(1) / (
    o.sigmoid().sum(1) + (t > 0).sum(1))).mean())
with_plain_loss("Dice's coefficient of the batch", lambda o, t: 1 - 2 * (o.sigmoid() * (t > 0)).sum() / (
    o.sigmoid().sum() + (t > 0).sum()), told="loss of the full batch is")
with_plain_loss("a mean weighted by the target", lambda o, t: ((o - t).square() * t.abs()).sum() / t.abs().sum())
with_plain_loss("chosen ones and the others", lambda o, t: (o - t).square()[t > 0].mean() + 0.5 * (
    o - t).square()[t <= 0].mean())
with_plain_loss("a count that is at least one", lambda o, t: ((o - t).square() * (t > 0)).sum() / (
    t > 0).sum().clamp(min=1))
with_plain_loss("a count that is never zero", lambda o, t: ((o - t).square() * (t > 0)).sum() / ((t > 0).sum() + 1e-8))
with_plain_loss("cross-entropy and a z-loss", lambda o, t: F.cross_entropy(
    o, t.argmax(-1)) + 0.01 * o.logsumexp(-1).square().mean())
with_plain_loss("cross-entropy with weights of classes", lambda o, t: F.cross_entropy(
    o, t.argmax(-1), weight=torch.arange(1.0, WIDTH + 1)))
with_plain_loss("the root of a mean", lambda o, t: (o - t).square().mean().sqrt(), told="loss of the full batch is")
with_plain_loss("the hardest half of the rows", lambda o, t: (o - t).square().mean(1).topk(len(o) // 2)[0].mean(),
                told="loss of the full batch is")
with_plain_loss("a variance over the batch", lambda o, t: F.relu(1 - o.std(0)).mean(), told="loss of the full batch is")
with_plain_loss("correlations over the batch", lambda o, t: (o.T @ t / len(o) - torch.eye(WIDTH)).square().sum(),
                told="loss of the full batch is")
with_plain_loss("a median", lambda o, t: (o - t).abs().median(), told="loss of the full batch is")
with_plain_loss("a mean without missing ones", lambda o, t: (o - t).square().where(t > 0, torch.nan).nanmean(),
                told="loss of the full batch is")
