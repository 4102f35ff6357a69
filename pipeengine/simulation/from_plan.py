"""A plan's figures as the simulator takes them."""
from __future__ import annotations

from partitioners import Plan
from pipeengine.schedules import Edge
from pipeengine.simulation.costs import Costs


def costs_of(plan: Plan, *, hop: float, bandwidth: float | None, handling: float = 0.0) -> Costs:
    """The plan's stage costs, as the simulator takes them; who sends a message spends ``handling`` seconds on it."""
    stages, halves = plan.stages, {}
    sends = [handling * sum(b.source == stage and bool(b.values) for b in plan.boundaries) for stage in range(len(stages))]
    returns = [handling * sum(b.target == stage and bool(b.gradients) for b in plan.boundaries) for stage in range(len(stages))]
    if any(stage.weight_grad for stage in stages):      # else backward is halved where a schedule halves it
        halves = {"weight_grad": tuple(stage.weight_grad for stage in stages),
                  "input_grad": tuple(stage.backward - stage.weight_grad + own for stage, own in zip(stages, returns)),
                  "weight_activation": tuple(stage.kept_bytes for stage in stages)}
    return Costs(forward=tuple(stage.forward + own for stage, own in zip(stages, sends)),
                 backward=tuple(stage.backward + own for stage, own in zip(stages, returns)), **halves,
                 hop=hop, bandwidth=bandwidth, edge_bytes={(b.source, b.target): float(b.bytes) for b in plan.boundaries},
                 activation=tuple(float(stage.activation_bytes) for stage in stages))


def edges_of(plan: Plan) -> tuple[Edge, ...]:
    """The plan's boundaries, as the schedule's edges."""
    return tuple(Edge(b.source, b.target, bool(b.values), bool(b.gradients)) for b in plan.boundaries)
