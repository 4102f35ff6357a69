"""Cutting: the parts together are the model, and what passes between them is what later stages read."""
import itertools

import pytest
import torch
import zoo
from reference import forward_loss
from torch import nn

from pipeengine.rng import RngStreams
from pipeengine.schedules import Edge
from pipeengine.stages.codegen import compile_part
from pipeengine.stages.splitting import Split, split
from pipeengine.tracing import Dataflow, Inputs, analyse, capture, node_refs

CASES = ("LongSkips", "ThreeConsumers", "IntegerBoundary", "LateInput", "EncoderDecoder", "TiedThrice", "NestedOutputs")


class Skip(nn.Module):
    """``a`` feeds ``b``, ``c`` and ``d``."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4))

    def forward(self, x):
        h = self.a(x)
        return (self.d(self.c(self.b(h) + h) + h)).square().mean()


def flow_of(model: nn.Module, *args, outputs: bool = False, **kwargs) -> Dataflow:
    return analyse(capture(model, Inputs(args, kwargs)), outputs=outputs)


def even(flow: Dataflow, num_stages: int) -> dict[int, int]:
    """As many nodes on each stage; those that must be together on the stage of the last of them."""
    stages = {n: position * num_stages // len(flow.placed) for position, n in enumerate(flow.placed)}
    for _ in flow.groups:
        for group in flow.groups:
            stages.update(dict.fromkeys(group, max(stages[n] for n in group)))
    for n in flow.placed:
        stages[n] = max([stages[n], *(stages[p] for p in flow.before[n] if p in stages)])
    return stages


def by_module(flow: Dataflow, stage_of: dict[str, int]) -> dict[int, int]:
    """By the first letter of a node's name; what stands in no module comes with what it reads."""
    stages: dict[int, int] = {}
    for n in flow.placed:
        known = stage_of.get(flow.recording.nodes[n].name[0])
        stages[n] = max((stages[p] for p in flow.before[n] if p in stages), default=0) if known is None else known
    return stages


def run(cut: Split, model: nn.Module, tensors: list[torch.Tensor]) -> dict[int, torch.Tensor]:
    """All parts, one after the other; each gets its inputs and what its boundaries bring, and nothing else."""
    values: dict[int, torch.Tensor] = {}
    for part in cut.parts:
        compiled = compile_part(part, cut.recording, model, RngStreams(torch.device("cpu")))
        arrived = [values[v] for boundary in part.receives for v in boundary.values]
        out = compiled.run(*(tensors[i] for i in compiled.inputs), *arrived)
        values.update(zip(part.returns, out, strict=True))
    return values


# -- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_stages", (1, 2, 3, 4))
@pytest.mark.parametrize("name", CASES)
def test_the_parts_are_the_model(name, num_stages):
    """Every live node runs on its stage, the loss has the bits of eager execution, boundaries agree on both sides."""
    case = zoo.AWKWARD[name]
    model, batch = case.build(), case.batches[0]
    inputs, target = case.split_target(batch)
    flow = analyse(capture(model, Inputs.of(inputs, target), loss_fn=case.loss_fn), outputs=False)
    stages = even(flow, num_stages)
    cut = split(flow, stages, num_stages, outputs=False)
    tensors = [t for t in (*batch.values(),) if isinstance(t, torch.Tensor)]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        loss = run(cut, model, tensors)[flow.recording.loss]
    with torch.no_grad():
        assert torch.equal(loss, forward_loss(case.build(), inputs, case.loss_fn, target))
    check_boundaries(cut, flow, stages)


def check_boundaries(cut: Split, flow: Dataflow, stages: dict[int, int]) -> None:
    values = flow.recording.values
    for boundary in cut.boundaries:
        assert boundary.source < boundary.target and (boundary.values or boundary.gradients)
        assert boundary in cut.parts[boundary.source].sends and boundary in cut.parts[boundary.target].receives
        assert all(stages[values[v].node] == boundary.source for v in boundary.values), "straight from the producer"
        assert len(set(boundary.values)) == len(boundary.values), "once per pair of stages"
        read = {v for node in cut.parts[boundary.target].nodes for v in node_refs(node)}
        assert set(boundary.values) <= read, "nothing is sent that nobody reads"
        assert set(boundary.gradients) <= flow.wants_gradient
    for v in {v for boundary in cut.boundaries for v in boundary.values} & flow.wants_gradient:
        back = sorted((b.source, b.target) for b in cut.boundaries if v in b.gradients)
        readers = sorted(b.target for b in cut.boundaries if v in b.values)
        assert back == list(zip([stages[values[v].node], *readers], readers)), "reader by reader to the producer"
    assert cut.edges == {Edge(b.source, b.target, bool(b.values), bool(b.gradients)) for b in cut.boundaries}


@pytest.mark.parametrize("cut_of", [dict(zip("abcd", stages)) for stages in
                                    itertools.combinations_with_replacement(range(4), 4)], ids=str)
def test_a_module_that_lies_whole_in_a_stage_stays_one_call(cut_of):
    model = Skip()
    flow = flow_of(model, torch.ones(2, 4))
    stages = by_module(flow, cut_of)
    cut = split(flow, stages, 4, outputs=False)
    for letter, stage in cut_of.items():
        assert [node.target for node in cut.parts[stage].nodes if node.is_module and node.name[0] == letter] == [letter]
    check_boundaries(cut, flow, stages)
    x = torch.randn(2, 4)
    assert torch.equal(run(cut, model, [x])[flow.recording.loss], model(x))


# -- stories ----------------------------------------------------------------------------------------------------------


def test_the_picture_of_a_skip():
    """``a`` goes straight to its three readers; its gradient comes back from one to the one before."""
    flow = flow_of(Skip(), torch.ones(2, 4))
    cut = split(flow, by_module(flow, dict(a=0, b=1, c=2, d=3)), 4, outputs=False)
    sizes = {(b.source, b.target): (len(b.values), len(b.gradients)) for b in cut.boundaries}
    # b(h) + h and c(..) + h stand where b and c are: h goes to stages 1 and 2, and the sums go on.
    assert sizes == {(0, 1): (1, 1), (0, 2): (1, 0), (1, 2): (1, 2), (2, 3): (1, 1)}
    assert Edge(0, 2, True, False) in cut.edges and cut.loss_stage == 3


def test_a_module_that_a_cut_crosses_is_opened():
    model = Skip()
    flow = flow_of(model, torch.ones(2, 4))
    inside = [n for n in flow.placed if flow.recording.nodes[n].name.startswith("a.")]
    cut = split(flow, {n: int(n > inside[0]) for n in flow.placed}, 2, outputs=False)
    assert [node.target for node in cut.parts[0].nodes] == ["a.0"]
    assert [node.target for node in cut.parts[1].nodes if node.is_module] == ["a.1", "b", "c", "d"]


def test_what_is_kept_apart_is_opened():
    flow = flow_of(Skip(), torch.ones(2, 4))
    cut = split(flow, dict.fromkeys(flow.placed, 0), 1, outputs=False, keep_apart=lambda node: node.name == "b.0")
    assert [node.target for node in cut.parts[0].nodes if node.is_module] == ["a", "b.0", "b.1", "c", "d"]


def test_outputs_go_to_the_last_stage():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            h = self.a(x)
            return h, self.b(h)
    model, x = Two(), torch.randn(2, 4)
    flow = flow_of(model, x, outputs=True)
    cut = split(flow, by_module(flow, dict(a=0, b=1)), 3, outputs=True)
    assert cut.output_stage == 2 and cut.loss_stage is None
    values = run(cut, model, [x])
    assert all(torch.equal(values[v], out) for v, out in zip(cut.parts[2].returns, model(x), strict=True))
    assert all(edge.activation and not edge.gradient for edge in cut.edges)
