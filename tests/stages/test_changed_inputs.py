"""Inputs that the forward changes in place, and what it draws where fakes cannot run."""
import copy

import pytest
import torch
import torch.nn.functional as F
from reference import assert_same_step, gradients, reference_step
from torch import nn

import pipeengine as pe
from pipeengine.tracing import analyse, node_refs

WIDTH = 16
pytestmark = pytest.mark.usefixtures("quiet_and_seeded")


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(20, WIDTH) for _ in range(4))
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))


class Shifts(Blocks):
    """Every block looks up ids that the forward has moved on before."""

    def forward(self, ids, y):
        ids += 1
        ids.masked_fill_(ids > 18, 3)
        x = 0
        for embedding, block in zip(self.embeddings, self.blocks, strict=True):
            x = torch.tanh(block(x + embedding(ids)))
        return F.mse_loss(x, y)


class Gathers(Blocks):
    """An input collects activations, and is read at the end."""

    def forward(self, ids, memory, y):
        x = self.embeddings[0](ids)
        for number, block in enumerate(self.blocks):
            x = torch.tanh(block(x))
            if number == 0:
                memory.add_(x.detach())
        return F.mse_loss(x * memory, y)


def batch(**more) -> dict:
    return dict(ids=torch.randint(0, 15, (4, 5)), y=torch.randn(4, 5, WIDTH)) | more


@pytest.mark.parametrize("kind", (Shifts, Gathers))
def test_every_stage_sees_the_changes_once(kind):
    """Stages of one process share the batch: each changes a copy of its own, and the user's stays as it is."""
    more = dict(memory=torch.randn(4, 5, WIDTH)) if kind is Gathers else {}
    model = kind()
    plain = copy.deepcopy(model)
    pipe = pe.Pipeline(model, batch(**more), num_stages=3, num_microbatches=2, costs="analytic")
    for _ in range(2):
        model.zero_grad()
        given = batch(**more)
        before = copy.deepcopy(given)
        found = pipe.step(**given), gradients(model)
        assert all(torch.equal(given[name], before[name]) for name in given)
        assert_same_step(reference_step(plain, given, 2, [0.5, 0.5]), found, 1e-6)


def test_a_changed_input_does_not_leave_the_stage_of_its_change():
    """Another worker has a copy of its own, which would not see the change."""
    recording = pe.capture(Gathers(), batch(memory=torch.randn(4, 5, WIDTH)))
    (group,) = analyse(recording, outputs=False).groups
    (changed,) = {storage for node in recording.nodes for storage in node.writes}
    readers = {n for n, node in enumerate(recording.nodes)
               if changed in {recording.values[v].storage for v in node_refs(node)}}
    assert len(readers) == 2 and readers <= group


class Picks(Blocks):
    """Draws as many rows as a tensor says; a fake cannot tell that it draws at all."""

    def forward(self, ids, y):
        chosen = torch.multinomial(torch.ones(len(ids)), (ids >= 0).all(1).sum())
        x = 0
        for embedding, block in zip(self.embeddings, self.blocks, strict=True):
            x = torch.tanh(block(x + embedding(ids[chosen])))
        return F.mse_loss(x, y[chosen])


def test_what_draws_unseen_by_fakes_has_its_own_random_numbers():
    """Nothing moves the global state, and every stage draws the same rows."""
    model, given = Picks(), batch()
    state = torch.get_rng_state()
    pipe = pe.Pipeline(model, given, num_stages=3, costs="analytic", num_microbatches=1)
    assert torch.equal(torch.get_rng_state(), state)
    found = pipe.step(**given)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(found, reference_step(model, given, 1)[0])      # the same rows in another order
