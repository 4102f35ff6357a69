"""A run report as a table for a terminal."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeengine.report.advice import advice
from pipeengine.report.numbers import count_text, seconds_text, size_text
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
        return lambda row: "" if shares is None or row.worker >= len(shares) else f"{100 * shares[row.worker]:.1f} %"

    sent = "would send per step" if report.in_turns else "sent per step"
    columns = [
        Column("", "stage", lambda row: str(row.stage)),
        Column("", "worker", lambda row: str(row.worker)),
        Column("", "parameters", of("parameters", count_text)),
        Column("busy, s per step", "predicted", of("predicted_seconds", seconds_text)),
        Column("busy, s per step", "measured", of("measured_seconds", seconds_text)),
        Column("idle", "predicted", idle(report.predicted)),
        Column("idle", "measured", idle(None if report.in_turns else report.measured)),
        Column("peak memory", "predicted", of("predicted_bytes", size_text)),
        Column("peak memory", "measured", of("measured_bytes", size_text)),
        Column(sent, "bytes", of("sent_bytes", size_text)),
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
    step = [f"{name} {seconds_text(timeline.makespan)} s"
            for name, timeline in (("measured", report.measured), ("predicted", report.predicted)) if timeline]
    if report.predicted and report.measured and report.predicted.makespan:
        step.append(_deviation(report.measured.makespan, report.predicted.makespan))
    return ["step: " + ", ".join(step)] if step else []


def lengths_in_turns(report: RunReport) -> list[str]:
    """What can be compared when the stages took turns: the seconds in which they were busy, not the length of the
    step."""
    lines, measured, predicted = [], report.measured, report.predicted
    if measured:
        lines.append(f"step: measured {seconds_text(measured.makespan)} s, all stages in turns")
        busy = f"busy: measured {seconds_text(measured.busy.sum())} s in all stages"
        if predicted and predicted.busy.sum():
            busy += (f", predicted {seconds_text(predicted.busy.sum())} s, "
                     + _deviation(measured.busy.sum(), predicted.busy.sum()))
        lines.append(busy)
    if predicted and predicted.num_workers > 1:
        lines.append(
            f"on {predicted.num_workers} workers: predicted {seconds_text(predicted.makespan)} s per step, if messages "
            "took no time"
        )
    return lines


def _deviation(measured: float, predicted: float) -> str:
    share = measured / predicted - 1
    return f"{100 * abs(share):.1f} % {'over' if share >= 0 else 'under'} the prediction"


def report_text(report: RunReport) -> str:
    """The report as a table for the terminal."""
    columns = table_columns(report)
    cells = [[column.text(row) for column in columns] for row in report.rows]
    widths = [max([len(column.head)] + [len(row[i]) for row in cells]) for i, column in enumerate(columns)]
    for group in {column.group for column in columns if column.group}:
        members = [i for i, column in enumerate(columns) if column.group == group]
        widths[members[-1]] += max(0, len(group) - sum(widths[i] for i in members) - 2 * (len(members) - 1))

    def line(texts: Sequence[str]) -> str:
        return "  ".join(text.ljust(w) if column.left else text.rjust(w)
                         for text, w, column in zip(texts, widths, columns)).rstrip()
    table = [_group_line(columns, widths), line([column.head for column in columns]),
             "  ".join("-" * w for w in widths)] + [line(row) for row in cells]
    return "\n".join([*headline(report), "", *(row for row in table if row), "", *advice(report)]).rstrip() + "\n"


def _group_line(columns: Sequence[Column], widths: Sequence[int]) -> str:
    parts, i = [], 0
    while i < len(columns):
        j = i + 1
        while columns[i].group and j < len(columns) and columns[j].group == columns[i].group:
            j += 1
        parts.append(columns[i].group.center(sum(widths[i:j]) + 2 * (j - i - 1)))
        i = j
    return "  ".join(parts).rstrip()
