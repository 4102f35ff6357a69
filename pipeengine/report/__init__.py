"""Timelines and a plan go in, text and pictures come out. No torch."""

from pipeengine.report.chrome_trace import chrome_trace
from pipeengine.report.history import History
from pipeengine.report.html import report_html
from pipeengine.report.memory import step_bytes
from pipeengine.report.numbers import seconds_text, size_text
from pipeengine.report.run import measured_timeline, predict, save_report, stage_rows
from pipeengine.report.run_report import RunReport, StageRow
from pipeengine.report.svg import timeline_svg
from pipeengine.report.table import report_text
from pipeengine.report.text import timeline_text
from pipeengine.report.watching import progress_text, watch

__all__ = [
    "History",
    "RunReport",
    "StageRow",
    "chrome_trace",
    "measured_timeline",
    "predict",
    "progress_text",
    "report_html",
    "report_text",
    "save_report",
    "seconds_text",
    "size_text",
    "stage_rows",
    "step_bytes",
    "timeline_svg",
    "timeline_text",
    "watch",
]
