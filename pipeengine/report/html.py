"""A run report as a page."""
from __future__ import annotations

import time
from html import escape

from partitioners.tables import column_groups
from partitioners.units import format_bytes, format_seconds, format_share
from pipeengine.report.advice import advice
from pipeengine.report.curves import charts
from pipeengine.report.history import History
from pipeengine.report.memory import PREDICTED, memory_bars
from pipeengine.report.run_report import RunReport
from pipeengine.report.svg import Panel, timeline_svg
from pipeengine.report.table import Column, headline, lengths_in_turns, table_columns
from pipeengine.report.zoom import HINT, SCRIPT

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --quiet: #666; --paper: #fff; --line: #e3e5e8; --lane: #f3f4f6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --quiet: #a0a6b0; --paper: #16181c; --line: #343841;
--lane: #24272d; } .timeline [fill="#224a86"] { fill: #3b6cb7; } }
body { font: 15px/1.5 Helvetica, Arial, sans-serif; color: var(--ink); background: var(--paper); max-width: 1040px;
margin: 2.5em auto; padding: 0 1.5em; }
h1 { font-size: 1.5em; margin: 0 0 .2em; } h2 { font-size: 1.1em; margin: 2em 0 .6em; }
h3 { font-size: .92em; margin: 0 0 .2em; font-weight: 600; }
p { margin: .2em 0; } .quiet { color: var(--quiet); }
.figures { display: flex; gap: 1.2em 2.2em; margin: 1.2em 0; flex-wrap: wrap; }
.figures div { border-left: 3px solid #3f72b0; padding-left: .7em; }
.figures b { display: block; font-size: 1.35em; font-weight: 600; }
table { border-collapse: collapse; font-size: .87em; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35em .65em; white-space: nowrap; }
th.left, td.left { text-align: left; white-space: normal; }
thead th { font-weight: 600; color: var(--ink); }
thead tr.groups th { text-align: center; padding-bottom: 0; color: var(--quiet); font-weight: 400; }
thead tr:last-child th { border-bottom: 1.5px solid var(--quiet); }
tbody td { border-bottom: 1px solid var(--line); }
td.left { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .92em; min-width: 12em; }
.wide { overflow-x: auto; } .wide svg { display: block; width: 100%; min-width: 760px; height: auto; }
.timeline > text[fill="#222"], .timeline > text:not([fill]) { fill: var(--ink); }
.timeline > text[fill="#666"], .timeline text[fill="#555"] { fill: var(--quiet); }
.timeline > rect[fill="#f3f4f6"] { fill: var(--lane); } .timeline > text[fill="#c0392b"] { fill: #d8604f; }
.charts { display: grid; gap: 1.6em; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); }
.chart { width: 100%; height: auto; display: block; } .chart text { font-size: 11px; fill: var(--quiet); }
.chart .grid { stroke: var(--line); fill: none; }
.key { font-size: .8em; color: var(--quiet); } .key span { margin-right: 1.2em; white-space: nowrap; }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
table.names { width: auto; max-width: 100%; } table.names td { text-align: left; white-space: normal;
overflow-wrap: break-word; }
table.memory { width: 100%; } td.bar { width: 55%; min-width: 5em; } td.bar i { display: block; height: .8em;
border-radius: 2px; } table.memory td:last-child { text-align: right; white-space: nowrap; }
.hint { font-size: .8em; } @media (pointer: coarse) { .hint { display: none; } }
@media (max-width: 600px) { body { margin: 1em auto; padding: 0 .8em; } }
"""


def report_html(report: RunReport) -> str:
    """The report as one self-contained page, light or dark as its reader's browser is: figures, curves over the steps,
    timeline predicted over measured, table of stages, options."""
    head, drawn = headline(report), panels(report)
    drawing = f"<div class=wide>{timeline_svg(drawn, standalone=False)}</div><p class='quiet hint'>{HINT}</p>" \
        if drawn else "<p class=quiet>no timeline was recorded</p>"
    notes = (*lengths_in_turns(report), *report.notes) if report.in_turns else report.notes
    return (f"<!doctype html>\n<html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            f"<title>{escape(report.name)}</title><style>{_STYLE}</style>\n"
            f"<h1>{escape(report.name)}</h1><p class=quiet>{escape(head[0].split(': ', 1)[1])}</p>\n"
            f"{_figures(report)}{''.join(f'<p>{escape(note)}</p>' for note in notes)}\n{_history(report.history)}"
            f"<h2>{_step_title(report)}</h2>{drawing}\n<h2>Stages</h2>{_table(report)}\n{_memory(report)}"
            f"<h2>What to look at</h2>{''.join(f'<p>{escape(line)}</p>' for line in advice(report)) or '<p>-</p>'}\n"
            f"{_setting(report.history)}{SCRIPT if drawn else ''}</html>\n")


def _step_title(report: RunReport) -> str:
    """Which step the timeline shows."""
    if report.step is None:
        return "One step"
    total = report.history.total if report.history is not None else None
    return f"Step {report.step + 1:,}" + (f" of {total:,}" if total else "")


def _memory(report: RunReport) -> str:
    """Per worker the most that was predicted beside the most that was measured, as bars on one scale."""
    bars = memory_bars(report)
    if not bars:
        return ""
    largest = max(value for _, _, value in bars)
    rows = "".join(f"<tr><td>{escape(worker)}</td><td>{escape(what)}</td><td class=bar><i style='width:"
                   f"{100 * value / largest:.1f}%;background:{'#3f72b0' if what == PREDICTED else '#c25a2b'}'></i></td>"
                   f"<td>{format_bytes(value)}</td></tr>" for worker, what, value in bars)
    return f"<h2>Memory at its peak</h2><div class=wide><table class='names memory'>{rows}</table></div>\n"


def _history(history: History | None) -> str:
    drawn = charts(history) if history is not None else []
    if not drawn:
        return ""
    return "<h2>Over the steps</h2><div class=charts>" + "\n".join(
        f"<div><h3>{escape(title)}</h3>{chart}</div>" for title, chart in drawn) + "</div>\n"


def _setting(history: History | None) -> str:
    """When the run was started, where and with what; its options."""
    if history is None:
        return ""
    starts = "".join(
        f"<tr><td>{_when(start.get('time'))}</td><td>from step {start.get('step', 0):,}</td>"
        f"<td>{escape(', '.join(map(str, start.get('hosts', ()))))}</td><td>"
        + escape(", ".join(f"{name} {version}" for name, version in
                           {"Python": start.get("python", ""), **start.get("versions", {})}.items())) + "</td></tr>"
        for start in history.starts)
    options = "".join(f"<tr><td>{escape(name)}</td><td>{escape(_value(value))}</td></tr>"
                      for name, value in history.options.items())
    return (f"<h2>Starts</h2><div class=wide><table class=names>{starts}</table></div>\n" if starts else "") + (
        f"<h2>Options</h2><div class=wide><table class=names>{options}</table></div>\n" if options else "")


def _value(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _when(seconds: object) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds)) if isinstance(seconds, (int, float)) else ""


def panels(report: RunReport) -> list[Panel]:
    """The timelines of a report, predicted over measured, with what they are called."""
    predicted, measured = "predicted", Panel("measured", report.measured)
    if report.in_turns:
        predicted = "predicted for separate workers, messages free"
        measured = Panel("measured in one process, the stages in turns", report.measured, lane="stage")
    return [panel for panel in (Panel(predicted, report.predicted), measured)
            if panel.timeline is not None and len(panel.timeline.end)]


def _figures(report: RunReport) -> str:
    figures, history = [], report.history
    if history is not None and history.last_step is not None and history.last_time is not None:
        total = f" of {history.total:,}" if history.total else ""
        figures.append((f"{history.last_step + 1:,}{total}", f"steps, {_when(history.last_time)}"))
    for name, timeline in (("measured", report.measured), ("predicted", report.predicted)):
        if timeline is not None and report.in_turns:
            figures.append((format_seconds(timeline.busy.sum()), f"{name} busy, all stages"))
        elif timeline is not None:
            figures.append((format_seconds(timeline.makespan), f"{name} step"))
            figures.append((format_share(timeline.idle_share.mean()), f"{name} idle share"))
    if all(row.sent_bytes is not None for row in report.rows) and report.rows and not report.in_turns:
        figures.append((format_bytes(sum(row.sent_bytes for row in report.rows)), "sent per step"))
    if report.loss is not None:
        figures.append((f"{report.loss:.5g}", "loss"))
    return "<div class=figures>" + "".join(f"<div><b>{escape(a)}</b>{escape(b)}</div>" for a, b in figures) + "</div>"


def _table(report: RunReport) -> str:
    columns = table_columns(report)
    groups = "".join(f"<th colspan={end - first}>{escape(name)}</th>"
                     for name, first, end in column_groups([column.group for column in columns]))

    def cell(tag: str, column: Column, text: str) -> str:
        return f"<{tag}{' class=left' if column.left else ''}>{escape(text)}</{tag}>"
    heads = "".join(cell("th", column, column.head) for column in columns)
    rows = "".join("<tr>" + "".join(cell("td", column, column.text(row)) for column in columns) + "</tr>\n"
                   for row in report.rows)
    return (f"<div class=wide><table><thead><tr class=groups>{groups}</tr><tr>{heads}</tr></thead>"
            f"<tbody>\n{rows}</tbody></table></div>")
