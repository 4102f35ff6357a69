"""A plan's figures as the simulator takes them."""
from __future__ import annotations

from partitioners import Plan
from pipeengine.schedules import Edge
from pipeengine.simulation.costs import Costs
from pipeengine.simulation.link_times import LinkTimes


def costs_of(plan: Plan, link: LinkTimes, num_replicas: int = 1) -> Costs:
    """The plan's stage costs (seconds and bytes per micro-batch), with messages that take what ``link`` says.

    With ``num_replicas`` each stage sums its gradients after its last action.

    Who sends spends the overhead of each message: a stage in its forward for the boundaries with activations that it
    feeds, in its backward for those with gradients that it returns. Where no stage has seconds of weight gradients of
    its own, backward is halved by schedules that halve it.
    """
    stages, overhead, halves = plan.stages, link.send_overhead_seconds, {}
    sends, returns = [0.0] * len(stages), [0.0] * len(stages)
    for boundary in plan.boundaries:
        sends[boundary.source] += overhead * bool(boundary.values)
        returns[boundary.target] += overhead * bool(boundary.gradients)
    if any(stage.weight_grad for stage in stages):
        halves = {"weight_grad": tuple(stage.weight_grad for stage in stages),
                  "input_grad": tuple(stage.backward - stage.weight_grad + own for stage, own in zip(stages, returns)),
                  "weight_activation": tuple(stage.kept_bytes for stage in stages)}
    if num_replicas > 1:
        halves["reduce"] = tuple(link.sum_seconds(stage.param_bytes - stage.frozen_bytes, num_replicas)
                                 for stage in stages)
    return Costs(forward=tuple(stage.forward + own for stage, own in zip(stages, sends)),
                 backward=tuple(stage.backward + own for stage, own in zip(stages, returns)), **halves,
                 hop=link.latency_seconds, bandwidth=link.bytes_per_second,
                 edge_bytes={(boundary.source, boundary.target): float(boundary.bytes) for boundary in plan.boundaries},
                 activation=tuple(float(stage.activation_bytes) for stage in stages))


def edges_of(plan: Plan) -> tuple[Edge, ...]:
    """The plan's boundaries, as the schedule's edges: which pass activations on, and which pass gradients back."""
    return tuple(Edge(boundary.source, boundary.target, bool(boundary.values), bool(boundary.gradients))
                 for boundary in plan.boundaries)
