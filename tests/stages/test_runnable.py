"""Positions: what the executor will look up is where the code that it runs has put it."""
import itertools

import pytest
import torch
from torch import nn

from pipeengine.rng import RngStreams
from pipeengine.stages.codegen import compile_part
from pipeengine.stages.runnable import Runnable, make_runnable
from pipeengine.stages.splitting import Split, split
from pipeengine.tracing import Dataflow, Inputs, analyse, capture

X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Skips(nn.Module):
    """Every layer reads all results before it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        results = [x]
        for layer in self.layers:
            results.append(layer(sum(results[1:], results[0])).tanh())
        return results[-1].square().mean()


MODEL = Skips()


def runnables(model: nn.Module, cuts: tuple[int, ...], *,
              outputs: bool = False) -> tuple[Dataflow, Split, list[Runnable]]:
    """The stages of ``model`` cut before each of these positions among its placed nodes."""
    flow = analyse(capture(model, Inputs((X,), {})), outputs=outputs)
    stages = {n: sum(position >= cut for cut in cuts) for position, n in enumerate(flow.placed)}
    cut = split(flow, stages, len(cuts) + 1, outputs=outputs)
    kept = (flow.recording.loss,) if outputs else None
    return flow, cut, [make_runnable(compile_part(part, flow.recording, model, RngStreams(torch.device("cpu"))), cut,
                                     outputs=kept, recompute=part.stage == 0) for part in cut.parts]


def forward_and_backward(stages: list[Runnable]) -> torch.Tensor:
    """As an executor does it, with plain autograd, by nothing but the positions of the runnables. Returns the loss."""
    sent, saved, loss = {}, [], None
    for runnable in stages:
        received = []
        for boundary in runnable.receives:
            received += [value.clone() for value in sent[boundary.source, boundary.target]]
        for value, wants in zip(received, runnable.wants, strict=True):
            value.requires_grad_(wants)
        out = runnable.run(*(X for _ in runnable.inputs), *received)
        for boundary in runnable.sends:
            sent[boundary.source, boundary.target] = [out[i].detach() for i in boundary.positions]
            assert [tuple(out[i].shape) for i in boundary.positions] == [slot.shape for slot in boundary.layout.slots]
        saved.append((received, [out[i] for i in runnable.roots] + [received[i] for i in runnable.relays]))
        loss = out[runnable.loss] if runnable.loss is not None else loss
    returned = {}
    for runnable, (received, starts) in reversed(list(zip(stages, saved, strict=True))):
        gradients = [None] * len(starts)
        for boundary in runnable.sends:
            for position, gradient in zip(boundary.gradient_positions, returned[boundary.source, boundary.target]):
                gradients[position] = gradient if gradients[position] is None else gradients[position] + gradient
        if runnable.loss_root is not None:
            gradients[runnable.loss_root] = torch.ones(())
        torch.autograd.backward(starts, gradients)
        for boundary in runnable.receives:
            returned[boundary.source, boundary.target] = [received[i].grad for i in boundary.received]
    return loss.detach()


@pytest.mark.parametrize("cuts",
                         [cuts for n in range(4) for cuts in itertools.combinations(range(1, 9, 2), n)], ids=str)
def test_positions_lead_to_the_gradients_of_one_process(cuts):
    """Loss and gradients to the bit, whatever is cut: values with several readers relay their gradients in order."""
    _, _, stages = runnables(MODEL, cuts)
    MODEL.zero_grad()
    loss = forward_and_backward(stages)
    mine = [p.grad.clone() for p in MODEL.parameters()]
    MODEL.zero_grad()
    expected = MODEL(X)
    expected.backward()
    assert torch.equal(loss, expected)
    assert all(torch.allclose(a, p.grad, rtol=0, atol=1e-6 * float(p.grad.abs().max()))
               for a, p in zip(mine, MODEL.parameters(), strict=True))


@pytest.mark.parametrize("cuts", ((), (2,), (2, 5), (1, 3, 6)), ids=str)
def test_both_sides_of_a_boundary_have_one_layout(cuts):
    _, cut, stages = runnables(MODEL, cuts)
    for boundary in cut.boundaries:
        out = next(b for b in stages[boundary.source].sends if b.target == boundary.target)
        back = next(b for b in stages[boundary.target].receives if b.source == boundary.source)
        assert out.layout == back.layout and out.gradient_layout == back.gradient_layout
        assert len(out.positions) == len(out.layout.slots) == len(boundary.values) and not back.positions
        assert len(out.gradient_positions) == len(back.received) == len(boundary.gradients) and not out.received


def test_only_training_has_roots_and_recomputes():
    _, _, training = runnables(MODEL, (3,))
    _, _, evaluation = runnables(MODEL, (3,), outputs=True)
    assert [r.recompute for r in training] == [True, False] and [bool(r.roots) for r in training] == [True, True]
    assert not any(r.recompute or r.roots or r.relays or r.loss_root is not None for r in evaluation)
    assert [r.keeps for r in evaluation][0] == () and len(evaluation[1].keeps) == 1
    assert [r.loss for r in training] == [None, 0] and training[1].loss_root == 0
