"""A run report goes through its file whole."""
import json
from dataclasses import replace

import pytest

from pipeengine.errors import InputError
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


DAMAGE = (dict(rows=None), dict(rows=[{}]), dict(rows=[7]), dict(rows=[{"nothing": 1}]), dict(notes=3),
          dict(measured={}), dict(measured=[1]), dict(measured={"op": ["?"]}), dict(predicted="x"))


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_damaged_files_are_one_error_with_their_name(tmp_path, damage):
    whole = json.loads(RunReport("x", "gpipe", 1, (StageRow(0, 0),)).to_json())
    (tmp_path / "bad.json").write_text(json.dumps(whole | damage))
    with pytest.raises(InputError, match="bad.json: this run report is damaged.* give a file that save"):
        RunReport.load(tmp_path / "bad.json")


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "bad.json").write_bytes(bytes([255, 254, 0]))
    with pytest.raises(InputError, match="bad.json"):
        RunReport.load(tmp_path / "bad.json")
