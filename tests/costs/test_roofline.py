"""Seconds from FLOPs and bytes: the slower of the two rates, and the cost of starting."""
import pytest
import torch
from torch import nn

from pipeengine.costs import DeviceDescription, analytic
from pipeengine.tracing import Dataflow, Inputs, analyse, capture


class Chain(nn.Module):
    def __init__(self, width: int, frozen: bool = False):
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.a.requires_grad_(not frozen)

    def forward(self, x):
        return self.b(self.a(x).relu()).square().mean()


def flow_of(width: int = 32, rows: int = 16, frozen: bool = False) -> Dataflow:
    with torch.device("meta"):
        model = Chain(width, frozen)
    return analyse(capture(model, Inputs((torch.ones(rows, width),), {})), outputs=False)


def of(flow: Dataflow, name: str, device: DeviceDescription):
    return next(seconds for n, seconds in analytic(flow, device).items() if flow.recording.nodes[n].name == name)


@pytest.mark.parametrize("flops", (1e6, 1e9, 1e12))
@pytest.mark.parametrize("bandwidth", (1e6, 1e9, 1e12))
@pytest.mark.parametrize("start", (0.0, 1e-3))
def test_the_slower_rate_counts(flops, bandwidth, start):
    flow = flow_of()
    for n, seconds in analytic(flow, DeviceDescription(flops, bandwidth, start)).items():
        cost = flow.recording.nodes[n].cost
        assert seconds.forward == pytest.approx(start + max(cost.flops / flops, cost.bytes / bandwidth))
        assert seconds.weight is None and seconds.backward >= 0


@pytest.mark.parametrize("rows", (1, 8, 64))
@pytest.mark.parametrize("width", (4, 32, 100))
def test_a_linear_layer_is_counted_exactly(rows, width):
    """2 n w^2 FLOPs; backward twice the work, once where its input needs no gradient."""
    flow, device = flow_of(width, rows), DeviceDescription(1.0, 1e30, 0.0)
    first, second = of(flow, "a", device), of(flow, "b", device)
    assert first.forward == second.forward == 2 * rows * width ** 2
    assert second.backward == 2 * second.forward and set(analytic(flow)) == set(flow.placed)


def test_a_faster_device_is_never_slower():
    flow = flow_of()
    slow, fast = analytic(flow), analytic(flow, DeviceDescription(1e12, 1e11, 1e-6))
    assert all(fast[n].forward < slow[n].forward and fast[n].backward <= slow[n].backward for n in slow)


def test_what_needs_no_gradient_has_no_backward():
    flow = flow_of(frozen=True)
    assert of(flow, "a", DeviceDescription()).backward == 0 < of(flow, "b", DeviceDescription()).backward
