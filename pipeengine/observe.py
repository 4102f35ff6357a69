"""What a run looked like: every worker's last records, put together without anybody waiting for anybody."""
from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from partitioners import Plan
from partitioners.draw import ends
from pipeengine.drawing import chrome_trace
from pipeengine.footprint import stage_bytes, step_bytes
from pipeengine.report import RunReport, StageRow, report_html
from pipeengine.schedules.form import Edge, Schedule
from pipeengine.timeline import Costs, Timeline, simulate

Record = tuple[str, int, int, float, float]         # op, stage, micro-batch, start and end in seconds of the step


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


def predict(plan: Plan, schedule: Schedule, **link: float | None) -> Timeline:
    """The timeline of one step by the plan's costs; its peaks are what the step adds to each worker's memory.

    A worker runs one action at a time, also where the schedule has two as one block. ``link`` is as ``costs_of`` takes it.
    """
    timeline = simulate(replace(schedule, pairs=()), costs_of(plan, **link), edges_of(plan))
    return replace(timeline, peak_bytes=step_bytes(plan, schedule))


def measured(records: Mapping[int, Sequence[Record]], *, schedule: str, num_workers: int) -> Timeline | None:
    """The timeline of the step that the workers (lanes) have recorded."""
    rows = [(worker, *record) for worker in sorted(records) for record in records[worker]]
    if not rows:
        return None
    worker, op, stage, microbatch, start, end = zip(*rows)
    return Timeline.from_columns(worker, op, stage, microbatch, start, end, name=f"{schedule}, measured",
                                 num_workers=num_workers)


def rows(plan: Plan, schedule: Schedule, parameters: Mapping[int, int], num_microbatches: int) -> Iterator[StageRow]:
    """One row per stage: what it holds, and what it sends in a step."""
    memory, worker_of = stage_bytes(plan, schedule), schedule.topology.worker_of
    for stage in range(plan.num_stages):
        sends = [b for b in plan.boundaries if b.source == stage and b.values and worker_of[b.target] != worker_of[stage]]
        returns = [b for b in plan.boundaries if b.target == stage and b.gradients and worker_of[b.source] != worker_of[stage]]
        yield StageRow(stage, worker_of[stage], modules=ends(plan, stage), parameters=parameters[stage],
                       predicted_bytes=memory[stage],
                       sent_bytes=float(num_microbatches * (sum(b.bytes for b in sends) + sum(b.gradient_bytes for b in returns))),
                       sent_messages=num_microbatches * (len(sends) + len(returns)))


def save(report: RunReport, folder: Path) -> None:
    """``report.json`` for ``pipeengine report``, ``report.html`` to look at, ``trace.json`` for Perfetto."""
    report.save(folder / "report.json")
    (folder / "report.html").write_text(report_html(report))
    timelines = [timeline for timeline in (report.predicted, report.measured) if timeline is not None]
    (folder / "trace.json").write_text(json.dumps(chrome_trace(*timelines)))

