"""A run report as a page."""
from __future__ import annotations

from html import escape

from pipeengine.report.advice import advice
from pipeengine.report.numbers import seconds_text, size_text
from pipeengine.report.run_report import RunReport
from pipeengine.report.svg import Panel, timeline_svg
from pipeengine.report.table import Column, headline, lengths_in_turns, table_columns

_STYLE = """
body { font: 15px/1.5 Helvetica, Arial, sans-serif; color: #222; background: #fff; max-width: 1040px;
margin: 2.5em auto; padding: 0 1.5em; }
h1 { font-size: 1.5em; margin: 0 0 .2em; } h2 { font-size: 1.1em; margin: 2em 0 .6em; }
p { margin: .2em 0; } .quiet { color: #666; }
.figures { display: flex; gap: 2.2em; margin: 1.2em 0; flex-wrap: wrap; }
.figures div { border-left: 3px solid #3f72b0; padding-left: .7em; }
.figures b { display: block; font-size: 1.35em; font-weight: 600; }
table { border-collapse: collapse; font-size: .87em; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35em .65em; white-space: nowrap; }
th.left, td.left { text-align: left; white-space: normal; }
thead th { font-weight: 600; color: #444; }
thead tr.groups th { text-align: center; padding-bottom: 0; color: #777; font-weight: 400; }
thead tr:last-child th { border-bottom: 1.5px solid #444; } tbody td { border-bottom: 1px solid #e3e5e8; }
td.left { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .92em; }
svg { max-width: 100%; height: auto; display: block; } .wide { overflow-x: auto; }
"""


def report_html(report: RunReport) -> str:
    """The report as one self-contained page: figures, timeline predicted over measured, table of stages."""
    head, panels = headline(report), _panels(report)
    drawing = timeline_svg(panels, standalone=False) if panels else "<p class=quiet>no timeline was recorded</p>"
    notes = (*lengths_in_turns(report), *report.notes) if report.in_turns else report.notes
    return (f"<!doctype html>\n<html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            f"<title>{escape(report.name)}</title><style>{_STYLE}</style>\n"
            f"<h1>{escape(report.name)}</h1><p class=quiet>{escape(head[0].split(': ', 1)[1])}</p>\n"
            f"{_figures(report)}{''.join(f'<p>{escape(note)}</p>' for note in notes)}\n"
            f"<h2>One step</h2>{drawing}\n<h2>Stages</h2>{_table(report)}\n"
            f"<h2>What to look at</h2>{''.join(f'<p>{escape(line)}</p>' for line in advice(report)) or '<p>-</p>'}\n"
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
    columns = table_columns(report)
    groups, i = [], 0
    while i < len(columns):
        j = i + 1
        while columns[i].group and j < len(columns) and columns[j].group == columns[i].group:
            j += 1
        groups.append(f"<th colspan={j - i}>{escape(columns[i].group)}</th>")
        i = j

    def cell(tag: str, column: Column, text: str) -> str:
        return f"<{tag}{' class=left' if column.left else ''}>{escape(text)}</{tag}>"
    heads = "".join(cell("th", column, column.head) for column in columns)
    rows = "".join("<tr>" + "".join(cell("td", column, column.text(row)) for column in columns) + "</tr>\n"
                   for row in report.rows)
    return (f"<div class=wide><table><thead><tr class=groups>{''.join(groups)}</tr><tr>{heads}</tr></thead>"
            f"<tbody>\n{rows}</tbody></table></div>")
