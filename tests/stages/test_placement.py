"""Where nodes go: as the plan says, never before what they read, and, once settled, where their parameters are."""
import itertools
import random

import pytest
import torch
from torch import nn

from pipeengine.errors import PlanError
from pipeengine.stages.placement import Placement, SettledPlacement
from pipeengine.tracing import Dataflow, Inputs, analyse, capture, node_refs


class Chain(nn.Module):
    """Linear layers; ``order`` says which of them a batch takes, one after the other."""

    def __init__(self, depth: int = 4):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
        self.unused = nn.Linear(4, 4)

    def forward(self, x, order):
        for index in order:
            x = self.layers[index](x)
        return x.square().mean()


def flow_of(*order: int) -> Dataflow:
    return analyse(capture(Chain(), Inputs((torch.ones(3, 4), order), {})), outputs=False)


WHOLE = flow_of(0, 1, 2, 3)
NAMES = [WHOLE.recording.nodes[n].name for n in WHOLE.placed]
PARAMETERS = [name for name, _ in Chain().named_parameters()]


def placement(stages: dict[str, int], num_stages: int) -> Placement:
    return Placement(stages, num_stages, {})


def in_runs(cuts: tuple[int, ...]) -> dict[str, int]:
    """The chain's nodes, cut before each of ``cuts``."""
    return {name: sum(position >= cut for cut in cuts) for position, name in enumerate(NAMES)}


def read_by(flow: Dataflow, index: int) -> set[str]:
    values = flow.recording.values
    return {values[v].name for v in node_refs(flow.recording.nodes[index]) if values[v].kind == "attribute"}


# -- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts",
                         [cuts for k in range(4) for cuts in itertools.combinations(range(1, len(NAMES)), k)], ids=str)
def test_the_plan_is_done(cuts):
    """Every node where the plan has it, before it is settled and after; each parameter is held where it is read."""
    plan = placement(in_runs(cuts), len(cuts) + 1)
    stages = plan.assign(WHOLE)
    assert {WHOLE.recording.nodes[n].name: stage for n, stage in stages.items()} == in_runs(cuts)
    settled = plan.settle(WHOLE, stages, PARAMETERS)
    assert settled.assign(WHOLE) == stages and settled.num_stages == len(cuts) + 1
    for index, stage in stages.items():
        assert all(stage in settled.holders[name] for name in read_by(WHOLE, index))
    assert set(settled.holders) == set(PARAMETERS) and all(settled.holders.values())


@pytest.mark.parametrize("seed", range(30))
def test_nothing_runs_before_what_it_reads(seed):
    """Whatever the plan says, also with half of the names unknown to it."""
    draw = random.Random(seed)
    plan = placement({name: draw.randrange(3) for name in NAMES if draw.random() < .5}, 3)
    stages = plan.assign(WHOLE)
    assert set(stages) == set(WHOLE.placed) and set(stages.values()) <= {0, 1, 2}
    assert all(stages[before] <= stages[n] for n in WHOLE.placed for before in WHOLE.before[n] if before in stages)


@pytest.mark.parametrize("order",
                         [order for n in range(1, 4) for order in itertools.permutations(range(4), n)], ids=str)
def test_another_path_finds_its_parameters_or_is_refused(order):
    """Layers 0 and 1 on stage 0, layers 2 and 3 on stage 1: a batch that would have to go back is refused by name."""
    settled = two_stages()
    flow = flow_of(*order)
    if any(a >= 2 > b for a, b in zip(order, order[1:])):
        with pytest.raises(PlanError, match=r"reads layers\.[23]\.\w+ on stage 0, which is held by stage \[1\] only"):
            settled.assign(flow)
        return
    for index, stage in settled.assign(flow).items():
        assert all(stage in settled.holders[name] for name in read_by(flow, index))


def two_stages() -> SettledPlacement:
    plan = placement({name: int(name.startswith(("layers.2", "layers.3", ":"))) for name in NAMES}, 2)
    return plan.settle(WHOLE, plan.assign(WHOLE), PARAMETERS)


# -- stories ----------------------------------------------------------------------------------------------------------


def test_who_holds_what():
    holders = two_stages().holders
    assert {name: sorted(stages) for name, stages in holders.items() if name.endswith("weight")} == {
        "layers.0.weight": [0], "layers.1.weight": [0], "layers.2.weight": [1], "layers.3.weight": [1],
        "unused.weight": [1]}


def test_a_parameter_of_two_stages_is_held_by_both():
    """The one layer of ``(0, 0)``, called on either side of a cut."""
    flow = flow_of(0, 0)
    first, second, *rest = flow.placed
    names = {n: flow.recording.nodes[n].name for n in flow.placed}
    plan = placement({names[n]: int(n != first) for n in flow.placed}, 2)
    settled = plan.settle(flow, plan.assign(flow), PARAMETERS)
    assert settled.holders["layers.0.weight"] == {0, 1} and settled.assign(flow)[second] == 1


def test_unread_parameters_go_to_their_neighbours():
    """Those of a path that this batch does not take stay with the rest of their module; else with what is before."""
    flow = flow_of(0, 1)
    plan = placement({flow.recording.nodes[n].name: 1 for n in flow.placed}, 2)
    holders = plan.settle(flow, plan.assign(flow), PARAMETERS).holders
    assert holders["layers.3.weight"] == {1} and holders["unused.weight"] == {1}


def test_a_plan_is_not_changed_from_outside_or_by_settling():
    stages = in_runs((2,))
    plan = placement(stages, 2)
    stages.clear()
    settled = plan.settle(WHOLE, plan.assign(WHOLE), PARAMETERS)
    assert plan.assign(WHOLE) == settled.assign(WHOLE) and settled.plan is plan and not hasattr(plan, "holders")
    with pytest.raises(TypeError):
        settled.holders["layers.0.weight"] = frozenset()
    with pytest.raises(AttributeError):
        settled.holders = {}
