"""Guards: a micro-batch is said to take the recorded path exactly when it does."""
import pytest
import torch
from torch import nn

from pipeengine.rng import RngStreams
from pipeengine.stages.guards import guard_check, guard_nodes, needed_nodes
from pipeengine.tracing import Dataflow, Inputs, analyse, capture, refs

CPU = torch.device("cpu")


class Branch(nn.Module):
    """Takes one path or another by what ``reads(x)`` gives, a Python value."""

    def __init__(self, reads):
        super().__init__()
        self.a, self.b, self.reads = nn.Linear(3, 3), nn.Linear(3, 3), reads

    def forward(self, x):
        return (self.a(x) if self.reads(x) else self.b(x)).square().mean()


def flow_of(model: nn.Module, x: torch.Tensor) -> Dataflow:
    return analyse(capture(model, Inputs((x,), {})), outputs=False)


READS = {
    "bool": lambda x: bool((x > 0).any()),
    "item": lambda x: x.sum().item() > 0,
    "int": lambda x: int(x.sum()) > 0,
    "tolist": lambda x: x[0].tolist()[0] > 0,
    "all": lambda x: torch.all(x > 0),
    "shape": lambda x: x[x[:, 0] > 0].shape[0] > 0,
    "numpy": lambda x: (x > 0).numpy().any(),
}
BATCHES = [sign * value * torch.ones(2, 3) for sign in (1, -1) for value in (1., 2., 3.)]
BATCHES += [torch.tensor([[1., -1, 1], [-1, 1, -1]]), torch.zeros(2, 3), -torch.eye(3)[:2]]


@pytest.mark.parametrize("recorded", range(len(BATCHES)))
@pytest.mark.parametrize("name", READS)
def test_a_guard_never_lets_another_path_through(name, recorded):
    """It may ask for a recording that would have been the same; never keep one that is another; and knows its own."""
    model = Branch(READS[name])
    holds = guard_check(flow_of(model, BATCHES[recorded]), model, RngStreams(CPU))
    assert holds is not None and holds([BATCHES[recorded].clone()], None)
    for batch in BATCHES:
        assert not holds([batch], None) or bool(READS[name](batch)) == bool(READS[name](BATCHES[recorded]))


def test_a_guard_of_a_truth_holds_for_every_batch_with_that_truth():
    model = Branch(READS["bool"])
    holds = guard_check(flow_of(model, BATCHES[0]), model, RngStreams(CPU))
    assert [holds([batch], None) for batch in BATCHES] == [bool((batch > 0).any()) for batch in BATCHES]


def test_no_guards_no_check():
    model = nn.Sequential(nn.Linear(3, 3), nn.Flatten(0), nn.Flatten(0))

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x).mean()
    loss = Loss()
    assert guard_check(flow_of(loss, torch.ones(2, 3)), loss, RngStreams(CPU)) is None


def test_a_check_changes_neither_the_batch_nor_random_numbers():
    """The forward adds to its input in place before it looks, and looks at random numbers too."""
    class Model(Branch):
        def forward(self, x):
            x.add_(1)
            return super().forward(x * (torch.rand(3) >= 0))
    model, x = Model(READS["bool"]), torch.ones(2, 3)
    holds = guard_check(flow_of(model, x.clone()), model, RngStreams(CPU))
    state = torch.get_rng_state()
    assert holds([x], 7) and torch.equal(x, torch.ones(2, 3)) and torch.equal(state, torch.get_rng_state())
    assert not holds([-3 * x], 7)


def test_a_batch_that_cannot_take_the_path_does_not():
    """The nodes before a guard fail on these shapes: another path, not an error."""
    model = Branch(lambda x: bool(x[:, 2].sum() > 0))
    holds = guard_check(flow_of(model, torch.ones(2, 3)), model, RngStreams(CPU))
    assert not holds([torch.ones(2, 2)], None)


def test_only_what_a_guard_needs_is_run():
    """Nodes up to the guard that lead to it; no layer of the model."""
    flow = flow_of(Branch(READS["bool"]), torch.ones(2, 3))
    nodes = guard_nodes(flow)
    assert nodes and not any(flow.recording.nodes[n].is_module for n in nodes)
    guard, = flow.recording.guards
    assert nodes == needed_nodes(flow, set(refs(guard.args)), guard.position) and max(nodes) < guard.position
