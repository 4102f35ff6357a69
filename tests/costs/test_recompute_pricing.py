"""What recomputation changes: forward once more in backward, and only what is read from outside is kept."""
import itertools

import pytest
import torch
from torch import nn

from partitioners import partition
from pipeengine.autograd import Recompute
from pipeengine.costs import analytic, cost_graph, price_modules, price_stages
from pipeengine.tracing import Inputs, analyse, capture


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(3))

    def forward(self, x):
        return self.c(self.b(self.a(x))).square().mean()


FLOW = analyse(capture(Chain(), Inputs((torch.ones(5, 8),), {})), outputs=False)


def graph():
    return cost_graph(FLOW, analytic(FLOW))


@pytest.mark.parametrize("paths", [paths for n in range(4) for paths in itertools.combinations("abc", n)], ids=str)
def test_modules(paths):
    """Inside: backward plus forward, what one micro-batch keeps is what comes in; outside: nothing changes."""
    before, after = graph(), graph()
    price_modules(after, FLOW, Recompute(modules=frozenset(paths)).spans(FLOW.recording))
    for name, data in before.nodes(data=True):
        now = after.nodes[name]
        assert now["forward"] == data["forward"]
        assert now["backward"] == data["backward"] + (data["forward"] if name[0] in paths else 0)
        if name[0] not in paths:
            assert now == data
    for path in paths:
        inside = [n for n in after if n[0] == path]
        kept = sum(after.nodes[n]["activation_bytes"] for n in inside)
        assert kept == (0 if path == "a" else 5 * 8 * 4), "an input of the model is there anyway"
        grown = sum(after.nodes[n]["workspace_bytes"] - before.nodes[n]["workspace_bytes"] for n in inside)
        assert grown == sum(before.nodes[n]["activation_bytes"] for n in inside), "all of it, while backward runs"


@pytest.mark.parametrize("stages",
                         [stages for n in range(4) for stages in itertools.combinations(range(3), n)], ids=str)
def test_stages(stages):
    plan = partition(graph(), 3)
    priced = price_stages(plan, stages)
    for stage, (before, after) in enumerate(zip(plan.stages, priced.stages, strict=True)):
        if stage not in stages:
            assert after == before
            continue
        assert after.forward == before.forward and after.backward == before.backward + before.forward
        assert after.activation_bytes == sum(b.bytes for b in plan.boundaries if b.target == stage)
        assert after.workspace_bytes == before.workspace_bytes + before.activation_bytes
    assert priced.stage_of == plan.stage_of and priced.boundaries == plan.boundaries
