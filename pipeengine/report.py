"""What a finished run tells: per stage where time and memory went, predicted against measured.

A ``RunReport`` is plain data in a JSON file, so that it can be printed and drawn without torch.
"""
from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from html import escape
from pathlib import Path
from typing import Callable, Mapping, Sequence

import numpy as np

from pipeengine.drawing import Panel, chrome_trace, timeline_svg
from pipeengine.errors import InputError
from pipeengine.timeline import Timeline


@dataclass(frozen=True)
class StageRow:
    """One stage of a run, per step. What is unknown is None and left out of the table."""
    stage: int
    worker: int
    modules: str = ""
    parameters: int | None = None
    predicted_seconds: float | None = None
    measured_seconds: float | None = None
    predicted_bytes: float | None = None
    measured_bytes: float | None = None
    sent_bytes: float | None = None
    sent_messages: int | None = None


@dataclass(frozen=True, eq=False)
class RunReport:
    """A run: its stages, the timeline that was predicted for a step and the one that was measured.

    Seconds of ``StageRow`` are those of a step; where a row has none, they are summed from the timelines. ``in_turns``: all
    stages ran in one process, one after the other, while workers and the predicted timeline are those of separate workers.
    """
    name: str
    schedule: str
    num_microbatches: int
    rows: tuple[StageRow, ...]
    predicted: Timeline | None = None
    measured: Timeline | None = None
    loss: float | None = None
    notes: tuple[str, ...] = ()
    in_turns: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self._completed(row) for row in self.rows))

    def _completed(self, row: StageRow) -> StageRow:
        values = asdict(row)
        for name in ("predicted", "measured"):
            timeline = getattr(self, name)
            if values[f"{name}_seconds"] is None and timeline is not None:
                mine = timeline.computes & (timeline.stage == row.stage)
                values[f"{name}_seconds"] = float((timeline.end - timeline.start)[mine].sum())
        return StageRow(**values)

    def to_json(self) -> str:
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain |= {"kind": "pipeengine run", "rows": [asdict(row) for row in self.rows], "notes": list(self.notes)}
        plain |= {name: plain[name] and plain[name].to_dict() for name in ("predicted", "measured")}
        return json.dumps(plain)

    @classmethod
    def from_json(cls, text: str) -> RunReport:
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"this is no run report: not JSON at line {error.lineno}, column {error.colno}; "
                             "give a file that save() wrote") from error
        if not isinstance(data, Mapping) or data.pop("kind", None) != "pipeengine run":
            raise InputError("this is no run report: no \"kind\": \"pipeengine run\"; give a file that save() wrote")
        data["rows"] = tuple(StageRow(**row) for row in data["rows"])
        data["notes"] = tuple(data.get("notes", ()))
        for name in ("predicted", "measured"):
            data[name] = data.get(name) and Timeline.from_dict(data[name])
        return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data})

    def save(self, path: str | Path) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> RunReport:
        return cls.from_json(Path(path).read_text())


def size_text(number: float) -> str:
    """Bytes for people: three digits and a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(number) < 999.5:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.4g} TB"


def count_text(number: float) -> str:
    """A count for people: three digits and k, M or G."""
    for unit in ("", " k", " M"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:,.3g} G"


def seconds_text(seconds: float) -> str:
    """Seconds with three significant digits, never an exponent."""
    digits = 3 if seconds <= 0 else int(np.clip(2 - np.floor(np.log10(seconds)), 0, 7))
    return f"{seconds:.{digits}f}"


@dataclass(frozen=True)
class _Column:
    """A column of the table: the two heads (group, own) and the text of a row, "" where unknown."""
    group: str
    head: str
    text: Callable[[StageRow], str]
    left: bool = False


def _columns(report: RunReport) -> list[_Column]:
    """The columns for which any row has a value."""
    def of(name: str, text: Callable[[float], str]) -> Callable[[StageRow], str]:
        return lambda row: "" if getattr(row, name) is None else text(getattr(row, name))

    def idle(timeline: Timeline | None) -> Callable[[StageRow], str]:
        shares = None if timeline is None else timeline.idle_share
        return lambda row: "" if shares is None or row.worker >= len(shares) else f"{100 * shares[row.worker]:.1f} %"

    sent = "would send per step" if report.in_turns else "sent per step"
    columns = [
        _Column("", "stage", lambda row: str(row.stage)),
        _Column("", "worker", lambda row: str(row.worker)),
        _Column("", "parameters", of("parameters", count_text)),
        _Column("busy, s per step", "predicted", of("predicted_seconds", seconds_text)),
        _Column("busy, s per step", "measured", of("measured_seconds", seconds_text)),
        _Column("idle", "predicted", idle(report.predicted)),
        _Column("idle", "measured", idle(None if report.in_turns else report.measured)),
        _Column("peak memory", "predicted", of("predicted_bytes", size_text)),
        _Column("peak memory", "measured", of("measured_bytes", size_text)),
        _Column(sent, "bytes", of("sent_bytes", size_text)),
        _Column(sent, "messages", of("sent_messages", lambda n: f"{n:,}")),
        _Column("", "modules", lambda row: row.modules, left=True)]
    return [column for column in columns if any(column.text(row) for row in report.rows)]


def _headline(report: RunReport) -> list[str]:
    workers = len({row.worker for row in report.rows})
    where = "in one process" if report.in_turns else f"on {workers} workers"
    lines = [f"{report.name}: {len(report.rows)} stages {where}, schedule {report.schedule}, "
             f"{report.num_microbatches} micro-batches"]
    lines += (_lengths_in_turns if report.in_turns else _lengths)(report)
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


def _lengths_in_turns(report: RunReport) -> list[str]:
    """What can be compared when the stages took turns: the seconds in which they were busy, not the length of the step."""
    lines, measured, predicted = [], report.measured, report.predicted
    if measured:
        lines.append(f"step: measured {seconds_text(measured.makespan)} s, all stages in turns")
        busy = f"busy: measured {seconds_text(measured.busy.sum())} s in all stages"
        if predicted and predicted.busy.sum():
            busy += (f", predicted {seconds_text(predicted.busy.sum())} s, "
                     + _deviation(measured.busy.sum(), predicted.busy.sum()))
        lines.append(busy)
    if predicted and predicted.num_workers > 1:
        lines.append(f"on {predicted.num_workers} workers: predicted {seconds_text(predicted.makespan)} s per step, if messages "
                     "took no time")
    return lines


def _deviation(measured: float, predicted: float) -> str:
    share = measured / predicted - 1
    return f"{100 * abs(share):.1f} % {'over' if share >= 0 else 'under'} the prediction"


# What handing a result to another process of the same machine takes, with what both of them spend on it, in seconds. Stages
# that differ by less per micro-batch are even.
_HANDOVER = 5e-4
_UNEVEN, _IDLE, _HELD_UP = 1.1, 0.15, 2.0


def _advice(report: RunReport) -> list[str]:
    """What to change first, from the numbers at hand."""
    name, timeline = ("measured", report.measured) if report.measured else ("predicted", report.predicted)
    if timeline is None or timeline.num_workers < 2 or not timeline.makespan:
        return []
    return _advice_in_turns(report, name) if report.in_turns else _advice_apart(report, name, timeline)


def _advice_in_turns(report: RunReport, name: str) -> list[str]:
    """Only the work of the stages says anything here; it is added up for the workers that would have them."""
    seconds = [getattr(row, f"{name}_seconds") or 0.0 for row in report.rows]
    busy = np.bincount([row.worker for row in report.rows], seconds)
    worst, least = int(busy.argmax()), int(busy.argmin())
    lines = [f"most work: stages of worker {worst} with {seconds_text(busy[worst])} s {name}; least: those of worker {least} with "
             f"{seconds_text(busy[least])} s"]
    if busy[worst] - busy.mean() > max((_UNEVEN - 1) * busy.mean(), _HANDOVER * report.num_microbatches):
        lines.append(_uneven(worst, busy).replace("has", "would have", 1))
    return lines + ["only a run with one process per worker (torchrun) shows how long workers wait for each other"]


def _advice_apart(report: RunReport, name: str, timeline: Timeline) -> list[str]:
    busy, idle = timeline.busy, timeline.idle_share
    worst, least = int(busy.argmax()), int(busy.argmin())
    lines = [f"busiest: worker {worst} with {seconds_text(busy[worst])} s of the {name} "
             f"{seconds_text(timeline.makespan)} s; least busy: worker {least} with {seconds_text(busy[least])} s"]
    # Fill and drain of any schedule are at most as long as GPipe's.
    explained = busy[worst] * (1 + (timeline.num_workers - 1) / max(timeline.num_microbatches, 1))
    if timeline.makespan > _HELD_UP * explained:
        lines.append(_held_up(report, timeline, explained))
    elif busy[worst] > _UNEVEN * busy.mean():
        lines.append(_uneven(worst, busy))
    elif idle.min() > _IDLE:
        lines.append(f"even the busiest worker idles {100 * idle.min():.0f} %: more micro-batches than "
                     f"{report.num_microbatches}, or a schedule with smaller bubbles, would help")
    return lines


def _uneven(worst: int, busy: np.ndarray) -> str:
    return (f"worker {worst} has {busy[worst] / busy.mean():.2f} times the mean work: plan again with measured costs, or open the "
            "modules of its stage")


def _held_up(report: RunReport, timeline: Timeline, explained: float) -> str:
    """What to do when neither the balance of the stages nor the schedule explains the length of a step."""
    action = timeline.busy.sum() / max(np.count_nonzero(timeline.computes), 1)
    text = (f"messages and overhead dominate: work and schedule explain {seconds_text(explained)} s of the "
            f"{seconds_text(timeline.makespan)} s; ")
    if action > 2 * _HANDOVER:
        return text + (f"an action takes {seconds_text(action)} s, much more than handing over its result should: look at the "
                       "links, and at what else the machines do")
    fewer = f"micro-batches of more rows (fewer than {report.num_microbatches}), " if report.num_microbatches > 1 else ""
    return text + (f"the stages are too small: an action takes {seconds_text(action)} s, handing over its result some "
                   f"{_HANDOVER} s; {fewer}larger batches or fewer stages would help")


def report_text(report: RunReport) -> str:
    """The report as a table for the terminal."""
    columns = _columns(report)
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
    return "\n".join([*_headline(report), "", *(row for row in table if row), "", *_advice(report)]).rstrip() + "\n"


def _group_line(columns: Sequence[_Column], widths: Sequence[int]) -> str:
    parts, i = [], 0
    while i < len(columns):
        j = i + 1
        while columns[i].group and j < len(columns) and columns[j].group == columns[i].group:
            j += 1
        parts.append(columns[i].group.center(sum(widths[i:j]) + 2 * (j - i - 1)))
        i = j
    return "  ".join(parts).rstrip()


_STYLE = """
body { font: 15px/1.5 Helvetica, Arial, sans-serif; color: #222; background: #fff; max-width: 1040px; margin: 2.5em auto; padding: 0 1.5em; }
h1 { font-size: 1.5em; margin: 0 0 .2em; } h2 { font-size: 1.1em; margin: 2em 0 .6em; }
p { margin: .2em 0; } .quiet { color: #666; }
.figures { display: flex; gap: 2.2em; margin: 1.2em 0; flex-wrap: wrap; }
.figures div { border-left: 3px solid #3f72b0; padding-left: .7em; } .figures b { display: block; font-size: 1.35em; font-weight: 600; }
table { border-collapse: collapse; font-size: .87em; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35em .65em; white-space: nowrap; } th.left, td.left { text-align: left; white-space: normal; }
thead th { font-weight: 600; color: #444; } thead tr.groups th { text-align: center; padding-bottom: 0; color: #777; font-weight: 400; }
thead tr:last-child th { border-bottom: 1.5px solid #444; } tbody td { border-bottom: 1px solid #e3e5e8; }
td.left { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .92em; }
svg { max-width: 100%; height: auto; display: block; } .wide { overflow-x: auto; }
"""


def report_html(report: RunReport) -> str:
    """The report as one self-contained page: figures, timeline predicted over measured, table of stages."""
    headline, panels = _headline(report), _panels(report)
    drawing = timeline_svg(panels, standalone=False) if panels else "<p class=quiet>no timeline was recorded</p>"
    notes = (*_lengths_in_turns(report), *report.notes) if report.in_turns else report.notes
    return (f"<!doctype html>\n<html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            f"<title>{escape(report.name)}</title><style>{_STYLE}</style>\n"
            f"<h1>{escape(report.name)}</h1><p class=quiet>{escape(headline[0].split(': ', 1)[1])}</p>\n"
            f"{_figures(report)}{''.join(f'<p>{escape(note)}</p>' for note in notes)}\n"
            f"<h2>One step</h2>{drawing}\n<h2>Stages</h2>{_table(report)}\n"
            f"<h2>What to look at</h2>{''.join(f'<p>{escape(line)}</p>' for line in _advice(report)) or '<p>-</p>'}\n"
            "</html>\n")


def _panels(report: RunReport) -> list[Panel]:
    predicted, measured = "predicted", Panel("measured", report.measured)
    if report.in_turns:
        predicted = "predicted for separate workers, messages free"
        measured = Panel("measured in one process, the stages in turns", report.measured, lane="stage")
    return [panel for panel in (Panel(predicted, report.predicted), measured)
            if panel.timeline is not None and len(panel.timeline.end)]


def _figures(report: RunReport) -> str:
    figures = []
    for name, timeline in (("measured", report.measured), ("predicted", report.predicted)):
        if timeline is not None and report.in_turns:
            figures.append((f"{seconds_text(timeline.busy.sum())} s", f"{name} busy, all stages"))
        elif timeline is not None:
            figures.append((f"{seconds_text(timeline.makespan)} s", f"{name} step"))
            figures.append((f"{100 * timeline.idle_share.mean():.1f} %", f"{name} idle share"))
    if all(row.sent_bytes is not None for row in report.rows) and report.rows and not report.in_turns:
        figures.append((size_text(sum(row.sent_bytes for row in report.rows)), "sent per step"))
    if report.loss is not None:
        figures.append((f"{report.loss:.5g}", "loss"))
    return "<div class=figures>" + "".join(f"<div><b>{escape(a)}</b>{escape(b)}</div>" for a, b in figures) + "</div>"


def _table(report: RunReport) -> str:
    columns = _columns(report)
    groups, i = [], 0
    while i < len(columns):
        j = i + 1
        while columns[i].group and j < len(columns) and columns[j].group == columns[i].group:
            j += 1
        groups.append(f"<th colspan={j - i}>{escape(columns[i].group)}</th>")
        i = j

    def cell(tag: str, column: _Column, text: str) -> str:
        return f"<{tag}{' class=left' if column.left else ''}>{escape(text)}</{tag}>"
    heads = "".join(cell("th", column, column.head) for column in columns)
    rows = "".join("<tr>" + "".join(cell("td", column, column.text(row)) for column in columns) + "</tr>\n"
                   for row in report.rows)
    return (f"<div class=wide><table><thead><tr class=groups>{''.join(groups)}</tr><tr>{heads}</tr></thead>"
            f"<tbody>\n{rows}</tbody></table></div>")


__all__ = ["RunReport", "StageRow", "chrome_trace", "report_html", "report_text"]
