"""Seconds of a node from its FLOPs and bytes."""
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pipeengine.device_cards import DeviceCard
from pipeengine.tracing import Dataflow, Node, Recording, node_refs


class Seconds(NamedTuple):
    """Seconds of a node per micro-batch; ``weight`` is the part of backward that can wait, None if not measured."""

    forward: float
    backward: float
    weight: float | None = None


@dataclass(frozen=True)
class DeviceDescription:
    """A device as the analytic cost model sees it: peak rates that real kernels reach, and the cost of starting one."""

    flops_per_second: float = 5e10
    bytes_per_second: float = 1e10
    seconds_per_operation: float = 5e-6


def describe(card: DeviceCard, precision: str) -> DeviceDescription:
    """A card as the analytic cost model sees it, for a model in ``precision`` (such as ``"bfloat16"``)."""
    return DeviceDescription(card.achieved(precision), card.memory_rate, card.operation_seconds)


def analytic(flow: Dataflow, device: DeviceDescription = DeviceDescription()) -> dict[int, Seconds]:
    """Forward and backward seconds per placed node, by FLOPs and bytes (roofline, Williams et al., CACM 2009)."""
    return {index: estimate(flow.recording, flow.recording.nodes[index], device) for index in flow.placed}


def estimate(recording: Recording, node: Node, device: DeviceDescription) -> Seconds:
    """Forward and backward seconds of one node. Backward does the work once per input that needs a gradient."""
    forward = device.seconds_per_operation + max(node.cost.flops / device.flops_per_second,
                                                 node.cost.bytes / device.bytes_per_second)
    if not any(recording.values[v].spec.requires_grad for v in node.results):
        return Seconds(forward, 0.0)
    wanted = sum(1 for v in node_refs(node) if recording.values[v].spec.requires_grad)
    return Seconds(forward, forward * (min(wanted, 2) + node.recompute))
