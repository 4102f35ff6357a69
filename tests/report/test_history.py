"""A run over its steps: read from its folder, drawn, and watched."""
import json
import math
import re

import pytest

from pipeengine import InputError
from pipeengine.report import History, RunReport, StageRow, progress_text, report_html, report_text, watch
from pipeengine.report.curves import nice_ticks, spark
from pipeengine.report.history import thinned
from pipeengine.tracking import MetricsFile


def run_folder(folder, steps, *, total=100, workers=2):
    file = MetricsFile(folder / "metrics.jsonl")
    file.go_on(0)
    for step in range(steps):
        file.write({"step": step, "time": 1000.0 + step, "loss": 4 - 0.01 * step, "pipeline/step_seconds": 0.5,
                    "pipeline/tokens_per_second": 2048.0})
        if step % 10 == 0:
            file.write({"step": step, **{f"pipeline/idle_share/worker_{w}": 0.1 + w / 200 for w in range(workers)}})
    starts = [{"time": 0.0, "step": 0, "hosts": ["here"], "python": "3.11", "versions": {"torch": "2.13.0"}}]
    (folder / "run.json").write_text(json.dumps({"id": "x", "total": total, "starts": starts}))
    (folder / "options.json").write_text(json.dumps({"width": 64, "<b>": "<script>"}))
    return folder


def report(folder):
    return RunReport("GPT", "1f1b", 4, (StageRow(0, 0), StageRow(1, 1)), history=History.of(folder))


def test_a_folder_tells_its_history_and_a_report_keeps_it(tmp_path):
    history = History.of(run_folder(tmp_path, 40))
    assert (history.last_step, history.last_time, history.total) == (39, 1039.0, 100)
    assert history.curves["loss"] == tuple((step, 4 - 0.01 * step) for step in range(40))
    assert list(history.group("pipeline/idle_share/")) == ["worker_0", "worker_1"]
    assert RunReport.from_json(report(tmp_path).to_json()).history == history


def test_an_empty_or_damaged_folder_is_an_empty_history(tmp_path):
    assert History.of(tmp_path) == History()
    (tmp_path / "run.json").write_text("{")
    (tmp_path / "metrics.jsonl").write_text("nonsense\n")
    assert History.of(tmp_path) == History()


def test_thinned_curves_keep_the_mean_and_the_last_step():
    points = [(step, float(step % 7)) for step in range(4000)]
    thin = thinned(points, 400)
    assert len(thin) == 400 and thin[-1][0] == 3999
    assert sum(value for _, value in thin) / 400 == pytest.approx(sum(value for _, value in points) / 4000)
    assert thinned(points[:400], 400) == tuple(points[:400])


@pytest.mark.parametrize("low, high", ((0, 1), (-3.2, 5), (1e-9, 2e-9), (7, 7), (0, 0), (1e6, 3.1e9), (-1, -0.5)))
def test_ticks_are_round_and_hold_the_values(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12 and 2 <= len(ticks) <= 7
    steps = {round((b - a) / 10 ** math.floor(math.log10(b - a)), 6) for a, b in zip(ticks, ticks[1:])}
    assert steps <= {1.0, 2.0, 2.5, 5.0, 10.0}


def test_the_page_shows_curves_starts_and_options(tmp_path):
    page = report_html(report(run_folder(tmp_path, 40)))
    titles = re.findall("<h3>(.*?)</h3>", page)
    assert titles == ["loss", "step time, s", "tokens per second", "idle share, %"]
    assert "40 of 100" in page and "torch 2.13.0" in page and "1970-01-01 00:00:00 UTC" in page
    assert "&lt;script&gt;" in page and "<script>" not in page
    assert "prefers-color-scheme: dark" in page
    assert "steps: 40 of 100" in report_text(report(tmp_path))


def test_64_workers_are_one_kind_of_line(tmp_path):
    page = report_html(report(run_folder(tmp_path, 40, workers=64)))
    assert "64 lines, one each" in page and "worker 63" in page


def test_values_that_are_not_finite_do_not_break_the_page(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.go_on(0)
    for step, loss in enumerate((1.0, math.nan, math.inf, 2.0)):
        file.write({"step": step, "loss": loss, "odd": math.nan})
    page = report_html(report(tmp_path))
    assert "no finite value" in page and "nan" not in re.sub("<h3>.*?</h3>", "", page)


def test_sparks():
    assert spark(tuple(enumerate(map(float, range(8))))) == "▁▂▃▄▅▆▇█"
    assert spark(((0, 1.0), (1, 1.0))) == "▁▁" and spark(()) == "" and len(spark(tuple(enumerate([1.0] * 1000)))) <= 40


def test_progress_as_text(tmp_path):
    text = progress_text(History.of(run_folder(tmp_path, 40)), now=1042.0)
    assert text.splitlines()[0] == "step 40 of 100, 30 s left"
    assert text.splitlines()[-1] == "last step 3 s ago"
    assert re.search(r"^  loss +3\.61  [▁-█]+$", text, re.M) and re.search(r"^  idle, worker 1 +10\.5 %", text, re.M)


def test_watching_ends_with_the_run(tmp_path):
    with pytest.raises(InputError, match="no run.json"):
        watch(tmp_path, print)
    run_folder(tmp_path, 10, total=20)
    shown, slept = [], []

    def sleep(seconds):
        slept.append(seconds)
        run_folder(tmp_path, 10 + 5 * len(slept), total=20)
    watch(tmp_path, shown.append, clock=lambda: 1100.0, sleep=sleep)
    assert slept == [2.0, 2.0] and [text.splitlines()[0] for text in shown] == [
        "step 10 of 20, 5 s left", "step 15 of 20, 2 s left", "step 20 of 20, done"]
