"""What a step needs of each worker's memory, by a plan's figures and the order of a schedule. Bytes."""
from __future__ import annotations

from collections.abc import Iterable, Sequence

from partitioners import Plan
from pipeengine.program import UNDERWAY, WINDOW
from pipeengine.schedules import Schedule


def step_bytes(plan: Plan, schedule: Schedule) -> tuple[float, ...]:
    """The most that a step adds to each worker's memory: activations, gradients (there are none at first), scratch,
    messages."""
    worker_of = schedule.topology.worker_of
    constant = [room - twice for room, twice in zip(_message_bytes(plan, worker_of), _counted_twice(plan, worker_of))]
    return tuple(most_added(plan, schedule.actions(worker)) + constant[worker] for worker in range(len(constant)))


def stage_bytes(plan: Plan, schedule: Schedule) -> tuple[float, ...]:
    """The most that each stage needs by itself: weights, optimizer, and what its own actions add to them."""
    model = plan.setting.memory_model
    own: list[list[tuple[str, int, int]]] = [[] for _ in plan.stages]
    for worker in range(schedule.topology.num_workers):
        for action in schedule.actions(worker):
            own[action[1]].append(action)
    # The gradients come with the actions.
    return tuple(model.weights(cost.param_bytes, cost.frozen_bytes) - (cost.param_bytes - cost.frozen_bytes)
                 + most_added(plan, actions) for cost, actions in zip(plan.stages, own))


def most_added(plan: Plan, actions: Iterable[tuple[str, int, int]]) -> float:
    """Walk ``actions`` in order. A stage's first backward makes its gradients while it lets go of activations."""
    held = peak = 0.0
    grown: set[int] = set()
    for op, stage, _ in actions:
        cost, made = plan.stages[stage], 0.0
        if op in "BW" and stage not in grown:
            made = cost.param_bytes - cost.frozen_bytes
            grown.add(stage)
        before, during, after = {
            "F": (cost.activation_bytes, 0.0, 0.0),
            "B": (0.0, cost.first_workspace_bytes if made else cost.workspace_bytes, made - cost.activation_bytes),
            "I": (0.0, cost.workspace_bytes, cost.kept_bytes - cost.activation_bytes),
            "W": (0.0, max(made - cost.kept_bytes, 0.0), made - cost.kept_bytes)}[op]
        peak = max(peak, held + before + during)
        held += before + after
    return float(peak)


def _counted_twice(plan: Plan, worker_of: Sequence[int]) -> list[float]:
    """Bytes of shared parameters that several stages of one worker count, beyond the first time."""
    found = [0.0] * (max(worker_of) + 1)
    for tie in plan.ties:
        for worker in set(worker_of):
            found[worker] += max(0, sum(worker_of[stage] == worker for stage in tie.stages) - 1) * tie.bytes
    return found


def _message_bytes(plan: Plan, worker_of: Sequence[int]) -> list[float]:
    """Room for messages: those that may arrive, and copies of those that have been sent."""
    arriving, largest = [0.0] * (max(worker_of) + 1), [0.0] * (max(worker_of) + 1)
    for boundary in plan.boundaries:
        ends = worker_of[boundary.source], worker_of[boundary.target]
        if ends[0] != ends[1]:
            for (sender, receiver), size in ((ends, boundary.bytes), (ends[::-1], boundary.gradient_bytes)):
                arriving[receiver] += WINDOW * size
                largest[sender] = max(largest[sender], float(size))
    return [a + UNDERWAY * b for a, b in zip(arriving, largest)]
