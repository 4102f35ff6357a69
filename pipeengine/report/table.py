"""A run report as a table for a terminal."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from partitioners.tables import format_table
from partitioners.units import format_bytes, format_count, format_number, format_seconds, format_share
from pipeengine.report.advice import advice
from pipeengine.report.run_report import RunReport, StageRow
from pipeengine.simulation import Timeline


@dataclass(frozen=True)
class Column:
    """A column of the table: the two heads (group, own) and the text of a row, "" where unknown."""
    group: str
    head: str
    text: Callable[[StageRow], str]
    left: bool = False


def table_columns(report: RunReport) -> list[Column]:
    """The columns for which any row has a value."""
    def of(name: str, text: Callable[[float], str]) -> Callable[[StageRow], str]:
        return lambda row: "" if getattr(row, name) is None else text(getattr(row, name))

    def idle(timeline: Timeline | None) -> Callable[[StageRow], str]:
        shares = None if timeline is None else timeline.idle_share
        return lambda row: "" if shares is None or row.worker >= len(shares) else format_share(shares[row.worker])

    sent = "would send per step" if report.in_turns else "sent per step"
    columns = [
        Column("", "stage", lambda row: str(row.stage)),
        Column("", "worker", lambda row: str(row.worker)),
        Column("", "parameters", of("parameters", format_count)),
        Column("busy, s per step", "predicted", of("predicted_seconds", format_number)),
        Column("busy, s per step", "measured", of("measured_seconds", format_number)),
        Column("idle", "predicted", idle(report.predicted)),
        Column("idle", "measured", idle(None if report.in_turns else report.measured)),
        Column("peak memory", "predicted", of("predicted_bytes", format_bytes)),
        Column("peak memory", "measured", of("measured_bytes", format_bytes)),
        Column(sent, "bytes", of("sent_bytes", format_bytes)),
        Column(sent, "messages", of("sent_messages", lambda n: f"{n:,}")),
        Column("", "modules", lambda row: row.modules, left=True)]
    return [column for column in columns if any(column.text(row) for row in report.rows)]


def headline(report: RunReport) -> list[str]:
    """The lines above the table: model, schedule, length of a step, loss, notes."""
    workers = len({row.worker for row in report.rows})
    where = "in one process" if report.in_turns else f"on {workers} workers"
    lines = [f"{report.name}: {len(report.rows)} stages {where}, schedule {report.schedule}, "
             f"{report.num_microbatches} micro-batches"]
    lines += (lengths_in_turns if report.in_turns else _lengths)(report)
    if report.history is not None and report.history.last_step is not None:
        total = f" of {report.history.total:,}" if report.history.total else ""
        lines.append(f"steps: {report.history.last_step + 1:,}{total}")
    if report.loss is not None:
        lines.append(f"loss: {report.loss:.6g}")
    return lines + list(report.notes)


def _lengths(report: RunReport) -> list[str]:
    """How long a step takes, measured and predicted."""
    step = [f"{name} {format_seconds(timeline.makespan)}"
            for name, timeline in (("measured", report.measured), ("predicted", report.predicted)) if timeline]
    if report.predicted and report.measured and report.predicted.makespan:
        step.append(_deviation(report.measured.makespan, report.predicted.makespan))
    return ["step: " + ", ".join(step)] if step else []


def lengths_in_turns(report: RunReport) -> list[str]:
    """What can be compared when the stages took turns: the seconds in which they were busy, not the length of the
    step."""
    lines, measured, predicted = [], report.measured, report.predicted
    if measured:
        lines.append(f"step: measured {format_seconds(measured.makespan)}, all stages in turns")
        busy = f"busy: measured {format_seconds(measured.busy.sum())} in all stages"
        if predicted and predicted.busy.sum():
            busy += (f", predicted {format_seconds(predicted.busy.sum())}, "
                     + _deviation(measured.busy.sum(), predicted.busy.sum()))
        lines.append(busy)
    if predicted and predicted.num_workers > 1:
        lines.append(
            f"on {predicted.num_workers} workers: predicted {format_seconds(predicted.makespan)} per step, if messages "
            "took no time"
        )
    return lines


def _deviation(measured: float, predicted: float) -> str:
    share = measured / predicted - 1
    return f"{format_share(abs(share))} {'over' if share >= 0 else 'under'} the prediction"


def report_text(report: RunReport) -> str:
    """The report as a table for the terminal."""
    columns = table_columns(report)
    table = format_table([column.head for column in columns],
                         [(), *([column.text(row) for column in columns] for row in report.rows)],
                         left=[i for i, column in enumerate(columns) if column.left],
                         groups=[column.group for column in columns])
    return "\n".join([*headline(report), "", table, "", *advice(report)]).rstrip() + "\n"
