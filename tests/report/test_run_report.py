"""A run report goes through its file whole."""
from dataclasses import replace

import pytest

from pipeengine.report.run_report import RunReport, StageRow
from pipeengine.report.table import report_text
from pipeengine.simulation.simulator import simulate
from pipeengine.synthesis.registry import SCHEDULES, build


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "auto"])
def test_reports_go_through_json(name):
    timeline = simulate(build(name, num_workers=2, num_microbatches=4))
    stages = sorted(set(timeline.stage.tolist()))
    report = RunReport(name, name, 4, tuple(StageRow(stage, 0) for stage in stages), timeline, loss=1.5, notes=("a",))
    again = RunReport.from_json(report.to_json())
    assert again.to_json() == report.to_json() and report_text(again) == report_text(report)
    assert sum(row.predicted_seconds for row in again.rows) == pytest.approx(timeline.busy.sum())
    assert RunReport.from_json(replace(report, predicted=None).to_json()).predicted is None
