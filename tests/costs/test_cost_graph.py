"""From a recording to a cost graph: every parameter once, every value's bytes, names that plans can rely on."""
import networkx
import pytest
import torch
import zoo
from torch import nn

from partitioners import check
from pipeengine.autograd import find_deferrable
from pipeengine.costs import analytic, cost_graph
from pipeengine.costs.roofline import Seconds
from pipeengine.tracing import Dataflow, Inputs, analyse, capture, node_refs

CASES = ("LongSkips", "ThreeConsumers", "IntegerBoundary", "LateInput", "EncoderDecoder", "TiedThrice", "NestedOutputs")


def flow_of(model: nn.Module, batch, **options) -> Dataflow:
    return analyse(capture(model, Inputs.of(batch, options.pop("target", None)), **options), outputs=False)


class Chain(nn.Module):
    def __init__(self, tied: bool = False):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).tanh()).mean()


X = torch.ones(3, 4)


# -- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_cost_graph_can_be_planned_and_loses_nothing(name):
    """Acyclic, every second in it, every parameter that is read counted once, as its own or as shared."""
    case = zoo.AWKWARD[name]
    model = case.build()
    inputs, target = case.split_target(case.batches[0])
    flow = flow_of(model, inputs, target=target, loss_fn=case.loss_fn)
    seconds = analytic(flow)
    graph = cost_graph(flow, seconds)
    check(graph)
    assert networkx.is_directed_acyclic_graph(graph)
    for index, key in enumerate(("forward", "backward")):
        assert sum(data[key] for _, data in graph.nodes(data=True)) == pytest.approx(
            sum(each[index] for each in seconds.values()))
    values = flow.recording.values
    read = {v for n in flow.placed for v in node_refs(flow.recording.nodes[n]) if values[v].kind == "attribute"}
    shared = {k: size for _, data in graph.nodes(data=True) for k, size in data.get("shared", {}).items()}
    own = sum(data.get("param_bytes", 0) for _, data in graph.nodes(data=True))
    assert own + sum(shared.values()) == sum(values[v].spec.bytes for v in read)


@pytest.mark.parametrize("rows", (1, 3, 8))
def test_names_do_not_depend_on_the_batch_and_bytes_do(rows):
    graph, wide = (cost_graph(flow := flow_of(Chain(), (torch.ones(n, 4),)), analytic(flow)) for n in (rows, 2 * rows))
    assert list(graph) == list(wide) and set(graph.edges) == set(wide.edges)
    assert graph.nodes["a"]["output_bytes"] == 16 * rows and wide.nodes["a"]["output_bytes"] == 32 * rows
    assert graph.nodes["a"]["param_bytes"] == wide.nodes["a"]["param_bytes"] == 64


# -- stories ----------------------------------------------------------------------------------------------------------


def test_the_picture_of_a_chain():
    flow = flow_of(Chain(), (X,))
    graph = cost_graph(flow, {n: Seconds(1.0, 2.0) for n in flow.placed})
    assert [(n, d["forward"], d["backward"], d["param_bytes"], d["output_bytes"], d["gradient"])
            for n, d in graph.nodes(data=True)] == [
        ("a", 1, 2, 64, 48, True), (":tanh", 1, 2, 0, 48, True), ("b", 1, 2, 64, 48, True), (":mean", 1, 2, 0, 4, True)]
    assert list(graph.edges) == [("a", ":tanh"), (":tanh", "b"), ("b", ":mean")]


def test_a_tied_parameter_is_shared_by_name():
    flow = flow_of(Chain(tied=True), (X,))
    graph = cost_graph(flow, analytic(flow))
    assert [(graph.nodes[n]["param_bytes"], graph.nodes[n]["shared"]) for n in ("a", "b")] == \
        [(0, {"a.weight": 64})] * 2


def test_several_values_of_one_node_are_carried_apart_and_kept_together():
    """Each has its own bytes, so that a cut pays for what crosses it."""
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(1, 1)

        def forward(self, x):
            small, large = self.a(x).split([1, 3], dim=-1)
            return (self.b(small) * large).mean()
    flow = flow_of(Halves(), (X,))
    graph = cost_graph(flow, analytic(flow))
    together = [n for n in graph if graph.nodes[n].get("colocate")]
    assert sorted(graph.nodes[n]["output_bytes"] for n in together) == [0, 12, 36]
    assert len({graph.nodes[n]["colocate"] for n in together}) == 1


@pytest.mark.parametrize(("weight", "expected"), [(None, 1.0), (0.5, 0.5), (9.0, 2.0)])
def test_what_waits_is_a_part_of_backward(weight, expected):
    """Half of it when nobody measured (the input's gradient is the other half); never more than all of it."""
    model = Chain()
    flow = flow_of(model, (X,))
    graph = cost_graph(flow, {n: Seconds(1.0, 2.0, weight) for n in flow.placed},
                       find_deferrable(flow.recording, model))
    assert graph.nodes["b"]["weight_grad"] == expected and "weight_grad" not in graph.nodes[":tanh"]
    assert graph.nodes["b"]["kept_bytes"] == 2 * 48, "its input and the gradient of its output"
