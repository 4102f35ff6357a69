"""The code of a stage: lines that one could have written, which do what the nodes say and let go of what is done."""
import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from pipeengine.autograd import find_deferrable, run
from pipeengine.rng import RngStreams
from pipeengine.stages.codegen import Compiled, compile_part
from pipeengine.stages.splitting import split
from pipeengine.tracing import Inputs, analyse, capture

CPU = torch.device("cpu")
X = torch.linspace(-1, 1, 24).reshape(2, 3, 4)


@dataclass
class Pair:
    left: torch.Tensor
    right: torch.Tensor


class Calls(nn.Module):
    """A linear layer, and ``then``, which makes of its result something with a mean."""

    def __init__(self, then):
        super().__init__()
        self.layer, self.then = nn.Linear(4, 4), then
        self.register_buffer("scale", torch.tensor(3.0))

    def forward(self, x):
        return self.then(self, self.layer(x)).square().mean()


FORMS = {
    "a method": lambda m, h: h.view(2, -1),
    "a keyword": lambda m, h: h.sum(dim=1, keepdim=True),
    "several results": lambda m, h: torch.cat(h.chunk(2, dim=-1)[::-1], 0),
    "a named tuple": lambda m, h: h.sort(-1).values + h.max(1).values[:, None],
    "a slice": lambda m, h: h[:, 1:, ::2],
    "an index tensor": lambda m, h: h[:, torch.tensor([2, 0])],
    "a mask": lambda m, h: h.masked_fill(torch.tensor([True, False, False, True]), 2.0),
    "a list": lambda m, h: torch.stack([h, h * 2, h + m.scale]),
    "infinity": lambda m, h: h.clamp(-float("inf"), 0.25),
    "a dtype": lambda m, h: h.to(torch.float64),
    "a negative zero": lambda m, h: h + -0.0,
    "in place": lambda m, h: (h * 1).mul_(2).add_(h),
    "slice assignment": lambda m, h: write_into(h.clone()),
    "no gradient": lambda m, h: no_gradient(h) + h,
    "einsum": lambda m, h: torch.einsum("abc,adc->abd", h, h),
    "the weight itself": lambda m, h: nn.functional.linear(h, m.layer.weight),
}


def write_into(h: torch.Tensor) -> torch.Tensor:
    h[:, 0] = h[:, 1] * 2
    return h


def no_gradient(h: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return h.exp()


def compiled(model: nn.Module, **options) -> Compiled:
    flow = analyse(capture(model, Inputs((X,), {})), outputs=False)
    part, = split(flow, dict.fromkeys(flow.placed, 0), 1, outputs=False, keep_apart=lambda node: True).parts
    return compile_part(part, flow.recording, model, RngStreams(CPU), **{name: make(flow.recording, model)
                                                                         for name, make in options.items()})


def loss_and_gradients(forward, model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    loss = forward()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("form", FORMS)
def test_the_code_does_what_the_forward_does(form):
    model = Calls(FORMS[form])
    code = compiled(model)
    mine = loss_and_gradients(lambda: code.run(X.clone())[0], model)
    theirs = loss_and_gradients(lambda: model(X.clone()), model)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)), code.source


@pytest.mark.parametrize("form", FORMS)
def test_running_twice_or_later_changes_nothing(form):
    """Whole module recomputed, and weight gradients put off: the same loss and gradients."""
    model = Calls(FORMS[form])
    expected = loss_and_gradients(lambda: model(X.clone()), model)
    twice = compiled(model, recompute_spans=lambda recording, model: ((0, len(recording.nodes)),))
    assert all(torch.equal(a, b) for a, b in zip(
        loss_and_gradients(lambda: twice.run(X.clone())[0], model), expected, strict=True)), twice.source
    later = compiled(model, deferrable=find_deferrable)
    model.zero_grad()
    queue = later.deferral.begin()
    loss, = later.run(X.clone())
    loss.backward()
    run(queue)
    assert all(torch.equal(a, p.grad) for a, p in zip(expected[1:], model.parameters(), strict=True)), later.source


def test_parameters_are_read_when_the_code_runs():
    """Another tensor in the place of a parameter is the one that counts, as in eager execution."""
    model = Calls(FORMS["the weight itself"])
    code = compiled(model)
    model.layer.weight = nn.Parameter(torch.zeros(4, 4))
    assert torch.equal(code.run(X)[0], model(X)) and "_parameters['weight']" in code.source


def test_nothing_lives_longer_than_it_is_needed():
    """Without gradients, at the third layer the first one's result is gone."""
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            return self.c(self.b(self.a(x))).mean()
    model, results, alive = Three(), [], []
    code = compiled(model)
    for layer in (model.a, model.b, model.c):
        real = layer.forward

        def forward(x, real=real):
            gc.collect()
            alive.append([ref() is not None for ref in results])
            out = real(x)
            results.append(weakref.ref(out))
            return out
        layer.forward = forward
    with torch.no_grad():
        code.run(X)
    assert alive == [[], [True], [False, True]]


def test_the_picture_of_a_stage():
    """A call per node, and a name is let go of after its last use."""
    code = compiled(Calls(lambda m, h: h.relu()))
    assert [line.partition(" = ")[0].strip() for line in code.source.splitlines()][0].startswith("def run(v")
    assert code.source.count("del ") == 3 and not code.random and code.deferral is None and code.inputs == (0,)
    assert code.source.splitlines()[-1].startswith("    return (v")
