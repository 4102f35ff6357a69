"""What a run looked like: every worker's last records, put together without anybody waiting for anybody."""
from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from partitioners import Plan
from partitioners.reporting import ends
from pipeengine.report.chrome_trace import chrome_trace
from pipeengine.report.html import panels, report_html
from pipeengine.report.memory import stage_bytes, standing_bytes, step_bytes
from pipeengine.report.run_report import RunReport, StageRow
from pipeengine.report.svg import timeline_svg
from pipeengine.schedules import Schedule
from pipeengine.simulation import LinkTimes, Timeline, costs_of, edges_of, simulate

Record = tuple[str, int, int, float, float]         # op, stage, micro-batch, start and end in seconds of the step


def predict(plan: Plan, schedule: Schedule, link: LinkTimes, num_replicas: int = 1) -> Timeline:
    """The timeline of one step by the plan's costs; its peaks are what the step adds to each worker's memory.

    A worker runs one action at a time, also where the schedule has two as one block. With ``num_replicas`` each stage
    ends with ``R``, the sum of its gradients. Seconds and bytes.
    """
    timeline = simulate(replace(schedule, pairs=()), costs_of(plan, link, num_replicas), edges_of(plan))
    return replace(timeline, peak_bytes=step_bytes(plan, schedule))


def measured_timeline(published: Mapping[int, str], *, schedule: str, num_workers: int,
                      num_stages: int) -> Timeline | None:
    """The timeline of the step that the workers have published last, as JSON each; None where nobody has.

    In one process every stage is a lane of its own. Its ``peak_bytes`` are what was counted in the last step that was,
    None where nobody has.
    """
    lanes: dict[int, list[Record]] = {}
    for rank, text in published.items():
        for record in json.loads(text)["records"]:
            lanes.setdefault(record[1] if num_workers == 1 else rank, []).append(tuple(record))
    rows = [(worker, *record) for worker in sorted(lanes) for record in lanes[worker]]
    if not rows:
        return None
    worker, op, stage, microbatch, start, end = zip(*rows)
    num_lanes = num_workers if num_workers > 1 else num_stages
    peaks = added_bytes(published) if num_workers == 1 else \
        {rank: told["added"]["peak"] for rank, text in published.items() if "added" in (told := json.loads(text))}
    return Timeline.from_columns(
        worker, op, stage, microbatch, start, end, name=f"{schedule}, measured", num_workers=num_lanes,
        peak_bytes=[peaks[lane] for lane in range(num_lanes)] if len(peaks) == num_lanes else None)


def added_bytes(published: Mapping[int, str]) -> dict[int, int]:
    """The most that each stage's actions added to memory in the last step that was counted, as far as any was."""
    return {int(stage): size for text in published.values()
            for stage, size in json.loads(text).get("added", {"stages": ()})["stages"]}


def measured_step(published: Mapping[int, str]) -> int | None:
    """The number of the step, from 0, that the workers have published last; None where they differ, or nobody has."""
    steps = {int(json.loads(text)["step"]) for text in published.values()}
    return steps.pop() if len(steps) == 1 else None


def stage_rows(
    plan: Plan, schedule: Schedule, parameters: Mapping[int, int], num_microbatches: int, added: Mapping[int, int],
    in_turns: bool = False,
) -> Iterator[StageRow]:
    """One row per stage: what it holds, and what it sends in a step; ``added`` is what was counted of its actions.

    ``in_turns``: whether one process runs all stages."""
    memory, worker_of = stage_bytes(plan, schedule, in_turns=in_turns), schedule.topology.worker_of
    standing = standing_bytes(plan)
    for stage in range(plan.num_stages):
        sends = [
            b for b in plan.boundaries if b.source == stage and b.values and worker_of[b.target] != worker_of[stage]
        ]
        returns = [
            b for b in plan.boundaries if b.target == stage and b.gradients and worker_of[b.source] != worker_of[stage]
        ]
        yield StageRow(
            stage,
            worker_of[stage],
            modules=ends(plan, stage),
            parameters=parameters[stage],
            predicted_bytes=memory[stage],
            measured_bytes=standing[stage] + added[stage] if stage in added else None,
            sent_bytes=float(num_microbatches * (sum(b.bytes for b in sends) + sum(b.gradient_bytes for b in returns))),
            sent_messages=num_microbatches * (len(sends) + len(returns)),
            activation_bytes=float(plan.stages[stage].activation_bytes),
            kept_bytes=float(plan.stages[stage].kept_bytes),
        )


def save_report(report: RunReport, folder: Path) -> None:
    """``report.json`` for ``pipeengine report``, ``report.html`` to look at with ``timeline.svg`` as its picture,
    ``trace.json`` for Perfetto."""
    folder.mkdir(parents=True, exist_ok=True)
    report.save(folder / "report.json")
    (folder / "report.html").write_text(report_html(report))
    timelines = [timeline for timeline in (report.predicted, report.measured) if timeline is not None]
    if timelines:
        (folder / "timeline.svg").write_text(timeline_svg(panels(report)))
    held = {row.stage: (row.activation_bytes or 0.0, row.kept_bytes or 0.0) for row in report.rows}
    (folder / "trace.json").write_text(json.dumps(chrome_trace(*timelines, step=report.step, held=held)))
