"""What a step needs of each worker's memory, by a plan's figures and the order of a schedule. Bytes."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from partitioners import Boundary, Plan
from pipeengine.program import UNDERWAY, WINDOW
from pipeengine.report.history import OWN
from pipeengine.report.run_report import RunReport
from pipeengine.schedules import B, Schedule, W

PREDICTED = "predicted"


def step_bytes(plan: Plan, schedule: Schedule) -> tuple[float, ...]:
    """The most that a step adds to each worker's memory: activations, gradients (there are none at first), scratch,
    messages."""
    worker_of = schedule.topology.worker_of
    rooms = _message_bytes(plan.boundaries, worker_of)
    constant = [room - twice for room, twice in zip(rooms, _counted_twice(plan, worker_of))]
    return tuple(most_added(plan, lane.op, lane.stage) + more for lane, more in zip(schedule.lanes, constant))


def stage_bytes(plan: Plan, schedule: Schedule, *, in_turns: bool = False) -> tuple[float, ...]:
    """The most that each stage needs by itself: weights, optimizer, and what its own actions and messages add to them.

    One message is on its way at a time, which is what links faster than stages leave there; ``step_bytes`` has room for
    as many as there may be. Stages that run ``in_turns``, in one process, make no room before a message is read.
    """
    op, stage, _ = schedule.columns
    worker_of = schedule.topology.worker_of
    travelling = [b for b in plan.boundaries if worker_of[b.source] != worker_of[b.target]]
    messages = _message_bytes(travelling, range(plan.num_stages), window=0 if in_turns else WINDOW, underway=1)
    return tuple(standing + messages[number] + most_added(plan, op[stage == number], stage[stage == number])
                 for number, standing in enumerate(standing_bytes(plan)))


def standing_bytes(plan: Plan) -> tuple[float, ...]:
    """What each stage holds before its first action: weights and what the optimizer keeps. The gradients come with the
    actions."""
    model = plan.setting.memory_model
    return tuple(model.weights(cost.param_bytes, cost.frozen_bytes) - (cost.param_bytes - cost.frozen_bytes)
                 for cost in plan.stages)


def memory_bars(report: RunReport) -> list[tuple[str, str, float]]:
    """(worker, what, bytes) of every worker's predicted and measured peak, as far as they are known.

    Measured is what was counted in a step; where none was, what an accelerator's allocator or, on a CPU, the whole
    process has had.
    """
    bars = []
    for worker in sorted({row.worker for row in report.rows}):
        own = [row.predicted_bytes for row in report.rows if row.worker == worker]
        if all(value is not None for value in own):
            bars.append((f"worker {worker}", PREDICTED, float(sum(value or 0.0 for value in own))))
        counted = [row.measured_bytes for row in report.rows if row.worker == worker]
        if all(value is not None for value in counted):
            bars.append((f"worker {worker}", "measured", float(sum(value or 0.0 for value in counted))))
            continue
        for name, what in (("peak_bytes", "measured"), ("process_peak_bytes", "measured, the whole process")):
            points = report.history.curves.get(f"{OWN}{name}/worker_{worker}", ()) if report.history else ()
            if points:
                bars.append((f"worker {worker}", what, max(value for _, value in points)))
    return [bar for bar in bars if bar[2] > 0]


def most_added(plan: Plan, op: np.ndarray, stage: np.ndarray) -> float:
    """Walk actions (columns of a lane) in order. A stage's first backward makes its gradients while it lets go of
    activations."""
    activation, kept, scratch, first, parameters, frozen = (
        np.array([getattr(cost, name) for cost in plan.stages], float)[stage]
        for name in ("activation_bytes", "kept_bytes", "workspace_bytes", "first_workspace_bytes", "param_bytes",
                     "frozen_bytes"))
    grows = np.zeros(len(op), bool)
    for own in np.unique(stage).tolist():
        backward = np.flatnonzero((stage == own) & ((op == B) | (op == W)))
        grows[backward[:1]] = True
    gradients = np.where(grows, parameters - frozen, 0.0)
    # In this order: F, B, I, W.
    during = np.choose(op, [activation, np.where(grows, first, scratch), scratch, np.maximum(gradients - kept, 0.0)])
    after = np.choose(op, [activation, gradients - activation, kept - activation, gradients - kept])
    total = np.cumsum(after)
    return float((total - after + during).max(initial=0.0))


def _counted_twice(plan: Plan, worker_of: Sequence[int]) -> list[float]:
    """Bytes of shared parameters that several stages of one worker count, beyond the first time."""
    found = [0.0] * (max(worker_of) + 1)
    for tie in plan.ties:
        for worker in set(worker_of):
            found[worker] += max(0, sum(worker_of[stage] == worker for stage in tie.stages) - 1) * tie.bytes
    return found


def _message_bytes(boundaries: Sequence[Boundary], worker_of: Sequence[int], window: int = WINDOW,
                   underway: int = UNDERWAY) -> list[float]:
    """Room for messages: ``window`` of each boundary that may arrive, and copies of ``underway`` that were sent."""
    arriving, largest = [0.0] * (max(worker_of) + 1), [0.0] * (max(worker_of) + 1)
    for boundary in boundaries:
        ends = worker_of[boundary.source], worker_of[boundary.target]
        if ends[0] != ends[1]:
            for (sender, receiver), size in ((ends, boundary.bytes), (ends[::-1], boundary.gradient_bytes)):
                arriving[receiver] += window * size
                largest[sender] = max(largest[sender], float(size))
    return [a + underway * b for a, b in zip(arriving, largest)]
