"""Timelines and a plan go in, text and pictures come out. No torch."""

from html import escape

from partitioners.notebook import shown_by
from pipeengine.report.chrome_trace import chrome_trace
from pipeengine.report.history import History
from pipeengine.report.html import report_html
from pipeengine.report.memory import step_bytes
from pipeengine.report.run import added_bytes, measured_step, measured_timeline, predict, save_report, stage_rows
from pipeengine.report.run_report import RunReport, StageRow
from pipeengine.report.svg import timeline_svg
from pipeengine.report.table import report_text
from pipeengine.report.text import timeline_text
from pipeengine.report.watching import progress_text, watch
from pipeengine.simulation import Timeline

shown_by(Timeline, lambda timeline: timeline_svg([(timeline.name, timeline)]))
# A page has styles of its own, which must not reach the notebook's.
shown_by(RunReport, lambda report: f'<iframe srcdoc="{escape(report_html(report))}" width="100%" height="720" '
                                   'style="border: 0"></iframe>')

__all__ = [
    "added_bytes",
    "History",
    "RunReport",
    "StageRow",
    "chrome_trace",
    "measured_step",
    "measured_timeline",
    "predict",
    "progress_text",
    "report_html",
    "report_text",
    "save_report",
    "stage_rows",
    "step_bytes",
    "timeline_svg",
    "timeline_text",
    "watch",
]
