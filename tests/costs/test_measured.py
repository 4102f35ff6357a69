"""Measuring: each distinct piece once, nothing of the user's model changed, and no node without seconds."""
import json

import pytest
import torch
from torch import nn

from pipeengine.autograd import find_deferrable
from pipeengine.costs import measure, measured
from pipeengine.costs.measured import signature
from pipeengine.tracing import Dataflow, Inputs, analyse, capture

CPU = torch.device("cpu")


class Blocks(nn.Module):
    """Equal blocks, and one that is wider."""

    def __init__(self, depth: int = 3):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        self.norm, self.last = nn.BatchNorm1d(8), nn.Linear(8, 9)

    def forward(self, x):
        for block in self.blocks:
            x = block(x).tanh()
        return self.last(self.norm(x)).square().mean()


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def flow_of(model: nn.Module) -> Dataflow:
    return analyse(capture(model, Inputs((torch.ones(4, 8),), {})), outputs=False)


@pytest.mark.parametrize("depth", (2, 3, 5))
def test_equal_pieces_are_one(depth):
    """However many blocks: the first (its input needs no gradient), the others, tanh, norm, last, square and mean."""
    model = Blocks(depth)
    flow = flow_of(model)
    found = measure(flow, model, CPU)
    assert found.pieces == 7 and found.estimated == () and set(found.seconds) == set(flow.placed)
    by_name = {flow.recording.nodes[n].name: seconds for n, seconds in found.seconds.items()}
    assert len({by_name[f"blocks.{i}"] for i in range(1, depth)}) == 1
    assert all(seconds.forward >= 0 <= seconds.backward and seconds.weight is None for seconds in by_name.values())


def test_the_model_is_left_as_it_was():
    model = Blocks()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    seed, grads = torch.get_rng_state(), [p.grad for p in model.parameters()]
    measure(flow_of(model), model, CPU)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(seed, torch.get_rng_state()) and [p.grad for p in model.parameters()] == grads


@pytest.mark.parametrize("kind", (torch.float32, torch.bfloat16, torch.complex64, torch.int64, torch.bool))
@pytest.mark.parametrize("shape, stride", [((3, 5), (5, 1)), ((5, 3), (1, 5)), ((4, 6), (0, 1)), ((0, 4), (4, 1)),
                                           ((), ()), ((2, 70_001), (70_001, 1))])
def test_made_up_numbers_fill_any_tensor(kind, shape, stride):
    tensor = measured._noise(torch.empty_strided(shape, stride, dtype=kind).fill_(1))
    assert tensor.shape == shape and tensor.stride() == stride and tensor.dtype == kind
    if kind in (torch.int64, torch.bool):
        assert not tensor.any()
    else:
        assert tensor.abs().lt(0.2).all() and (tensor.numel() < 100 or tensor.abs().mean() > 0.01)


@pytest.mark.parametrize("slow, runs", [(0.0, 2), (1e9, 3 * 3)])
def test_slow_pieces_run_less_often(monkeypatch, slow, runs):
    """The head of a model with a large vocabulary ran nine times, and its weights were drawn anew in between."""
    seen = []
    monkeypatch.setattr(measured, "_SLOW_SECONDS", slow)
    monkeypatch.setattr(measured, "_BUDGET_SECONDS", 0.0)
    monkeypatch.setattr(measured._Piece, "_once", lambda piece: seen.append(piece._node.name) or (1e-3, 2e-3))
    model = nn.Sequential(nn.Linear(8, 8))
    found = measure(analyse(capture(model, Inputs((torch.ones(4, 8),), {}), loss_fn=lambda y: y.sum()), outputs=False),
                    model, CPU)
    assert seen.count("0") == runs and set(found.seconds.values()) == {(1e-3, 2e-3, None)}


def test_what_waits_is_measured_where_it_can_wait():
    model = Blocks()
    flow = flow_of(model)
    deferrable = find_deferrable(flow.recording, model)
    seconds = measure(flow, model, CPU, deferrable=deferrable).seconds
    assert {n for n in seconds if seconds[n].weight is not None} == {
        n for n in flow.placed if flow.recording.nodes[n].results[0] in deferrable} != set()


def test_a_cache_is_read_and_grows(tmp_path):
    """What it knows is not measured again; what it knows of others stays."""
    model, file = Blocks(), tmp_path / "deep" / "costs.json"
    flow = flow_of(model)
    measure(flow, model, CPU, cache=file)
    key = signature(flow.recording, flow.recording.nodes[flow.placed[0]], model, CPU)
    known = json.loads(file.read_text())
    assert key in known and len(known) == 7
    file.write_text(json.dumps({**known, key: [123.0, 456.0, None], "another": [1.0, 2.0, None]}))
    seconds = measure(flow, model, CPU, cache=file).seconds
    assert tuple(seconds[flow.placed[0]]) == (123.0, 456.0, None) and "another" in json.loads(file.read_text())


def test_signatures_tell_apart_what_takes_other_time():
    model = Blocks()
    flow = flow_of(model)
    signatures = {node.name: signature(flow.recording, node, model, CPU) for node in flow.recording.nodes}
    assert signatures["blocks.1"] == signatures["blocks.2"] != signatures["blocks.0"]
    assert signatures["last"] != signatures["blocks.1"]
    model.norm.eval()
    node = next(node for node in flow.recording.nodes if node.name == "norm")
    alone = signature(flow.recording, node, model, CPU)
    assert alone != signatures["norm"]
    torch.set_num_threads(2)
    assert signature(flow.recording, node, model, CPU) != alone


def test_what_cannot_run_alone_is_estimated():
    """A function that refuses the made-up numbers: at the rate that the other pieces have shown."""
    def refuses_made_up_numbers(x):
        return RefusesZeros.apply(x)

    class RefusesZeros(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            if not isinstance(x, torch._subclasses.FakeTensor) and x.abs().max() < 1:
                raise ValueError("too small")
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 2

    class Model(Blocks):
        def forward(self, x):
            return super().forward(refuses_made_up_numbers(self.last(x)[:, :8]))
    model = Model()
    flow = flow_of(model)
    measured = measure(flow, model, CPU)
    assert len(measured.estimated) == 1 and set(measured.seconds) == set(flow.placed)
    estimated = next(n for n in flow.placed if flow.recording.nodes[n].name == measured.estimated[0])
    assert measured.seconds[estimated].forward > 0
