"""The check refuses what is wrong, and never what is right: judged against the model's own rounding."""

import pytest
import torch
import torch.nn.functional as F
from reference import assert_same_step, gradients, reference_step
from torch import nn

import pipeengine as pe
from pipeengine.stages import check_recording
from pipeengine.tracing import Inputs, analyse, capture

WIDTH, WORDS = 8, 20


pytestmark = pytest.mark.usefixtures("quiet_and_seeded")


class Words(nn.Module):
    """An embedding, four blocks, a loss; takes ids, and labels that may be the same tensor."""

    def __init__(self, **options):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH, **options)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, WORDS)
        self.alpha = 1.0

    def forward(self, ids, labels, extra=None):
        x = self.embed(ids) if extra is None else self.embed(ids) + extra[..., None]
        for block in self.blocks:
            x = x + self.alpha * torch.tanh(block(x))
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class Empty(Words):
    """With a parameter of no entries."""

    def __init__(self):
        super().__init__()
        self.registers = nn.Parameter(torch.empty(0, WIDTH))

    def forward(self, ids, labels, extra=None):
        return super().forward(ids, labels, extra) + self.registers.sum()


class Cancels(nn.Module):
    """Three readers on three stages whose gradients cancel but for rounding: their sum depends on the order."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.plus, self.minus = nn.Parameter(torch.tensor(3e7 / 7)), nn.Parameter(torch.tensor(-3e7 / 7))

    def forward(self, x):
        first = h = self.first(x)
        total = (first * self.plus).sum()
        for number, block in enumerate(self.blocks):
            h = torch.tanh(block(h))
            total = total + (first * (number + 0.3) / 7).sum() + h.sum()
        return total + (first * self.minus).sum() + self.last(h).sum()


def ids(seed: int, rows: int = 4) -> torch.Tensor:
    return torch.randint(0, WORDS, (rows, 5), generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, plain: nn.Module, batches, tolerance: float = 1e-6) -> None:
    """Two batches on three stages against one process."""
    plain.load_state_dict(model.state_dict())
    pipe = pe.Pipeline(model, batches[0], num_stages=3, num_microbatches=2, costs="analytic")
    for batch in batches:
        model.zero_grad()
        expected = reference_step(plain, batch, 2)
        loss = pipe.step(**batch)
        found = {name: grad.to_dense() for name, grad in gradients(model).items()}
        assert_same_step((expected[0], {n: g.to_dense() for n, g in expected[1].items()}), (loss, found), tolerance)


def test_one_tensor_under_two_names_with_another_behind_it():
    """The second, shuffled batch of the check must share what the first one shares."""
    def batch(seed):
        words = ids(seed)
        return dict(ids=words, labels=words, extra=torch.randn(4, 5))
    train(Words(), Words(), [batch(0), batch(1)])


def test_sparse_gradients():
    train(Words(sparse=True), Words(sparse=True), [dict(ids=ids(s), labels=ids(s + 1)) for s in (0, 1)])


def test_parameters_without_entries():
    train(Empty(), Empty(), [dict(ids=ids(s), labels=ids(s + 1)) for s in (0, 1)])


def flow_of(model: nn.Module, inputs: Inputs):
    flow = analyse(capture(model, inputs), outputs=False)
    length = len(flow.placed)
    return flow, {n: min(2, 3 * i // length) for i, n in enumerate(flow.placed)}


def test_what_cancels_is_judged_by_its_own_rounding():
    model, inputs = Cancels(), Inputs((torch.randn(4, WIDTH),), {})
    flow, stage_of = flow_of(model, inputs)
    versions = [p._version for p in model.parameters()]
    check_recording(model, flow, stage_of, 3, inputs, None)
    assert versions == [p._version for p in model.parameters()] and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("factor", (1.001, 1.01))
def test_what_is_wrong_is_refused(factor):
    """A coefficient that is a thousandth off is no rounding."""
    words = ids(0)
    model, inputs = Words(), Inputs((words, ids(1)), {})
    flow, stage_of = flow_of(model, inputs)
    check_recording(model, flow, stage_of, 3, inputs, None)
    model.alpha = factor
    model.blocks[0].register_forward_hook(lambda *_: None)      # so that no block is called as the module that it is
    with pytest.raises(pe.CaptureError, match="does not do what the model does"):
        check_recording(model, flow, stage_of, 3, inputs, None)


class OwnNoise(Words):
    """Draws from a generator of its own, which no two runs leave alike: that is not its rounding."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def embed_noise(self, x):
        return x + torch.randn(x.shape, generator=self.generator)

    def forward(self, ids, labels, extra=None):
        return super().forward(ids, labels) + self.embed_noise(self.embed.weight).square().mean()


class AroundNoise(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = OwnNoise(), nn.Linear(1, 1)

    def forward(self, ids, labels):
        return self.outer(self.inner(ids, labels)[None])[0]


def test_a_model_that_does_not_repeat_itself_is_refused():
    with pytest.raises(pe.CaptureError, match="does not do what the model does"):
        pe.Pipeline(AroundNoise(), dict(ids=ids(0), labels=ids(1)), num_stages=2, costs="analytic")


class Diffusion(nn.Module):
    """A random time that the first and the last stage read."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.register_buffer("alpha", torch.linspace(1, 0.1, 10))

    def forward(self, x):
        time = torch.randint(0, 10, (len(x),))
        noise, alpha = torch.randn_like(x), self.alpha[time][:, None]
        h = x * alpha + noise * (1 - alpha)
        for block in self.blocks:
            h = h + torch.tanh(block(h))
        return F.mse_loss(h / (alpha + 0.5), noise)


def test_a_random_time_that_two_stages_read():
    """Each stage draws it for itself, and both draw the same: the loss is that of one stage."""
    state, x, losses = Diffusion().state_dict(), torch.randn(8, WIDTH), []
    for num_stages in (1, 3):
        model = Diffusion()
        model.load_state_dict(state)
        pipe = pe.Pipeline(model, (x,), num_stages=num_stages, num_microbatches=2, costs="analytic")
        losses.append((pipe.step(x), {n: g.clone() for n, g in gradients(model).items()}, pipe.step(x)))
    assert_same_step(losses[0][:2], losses[1][:2], 1e-6)
    assert losses[0][0] != losses[0][2]
