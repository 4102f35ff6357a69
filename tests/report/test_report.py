"""Reports say what is known, leave out what is not, and survive a file; pictures hold every action."""
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import torch

import pipeengine as pe
from pipeengine.errors import InputError
from pipeengine.report.chrome_trace import chrome_trace
from pipeengine.report.html import report_html
from pipeengine.report.run_report import RunReport, StageRow
from pipeengine.report.svg import Panel, timeline_svg
from pipeengine.report.table import report_text
from pipeengine.report.text import timeline_text
from pipeengine.simulation.costs import Costs
from pipeengine.simulation.simulator import simulate
from pipeengine.synthesis.registry import SCHEDULES, build


@pytest.fixture
def run():
    schedule = build("1f1b", num_workers=2, num_microbatches=4)
    predicted = simulate(schedule, Costs([1.0, 1.0], backward=[2.0, 2.0]))
    measured = simulate(schedule, Costs([1.0, 1.5], backward=[2.0, 3.0], hop=0.1))
    rows = (
        StageRow(
            0,
            0,
            "embed",
            1_500_000,
            predicted_bytes=2e9,
            measured_bytes=2.1e9,
            sent_bytes=4096,
            sent_messages=4,
        ),
        StageRow(
            1,
            1,
            "<head>",
            2_500_000,
            predicted_bytes=1e9,
            measured_bytes=9e8,
            sent_bytes=4096,
            sent_messages=4,
        ),
    )
    return RunReport("tiny", "1f1b", 4, rows, predicted, measured, loss=2.5)


def test_report_picture(run):
    assert (
        report_text(run)
        == """\
tiny: 2 stages on 2 workers, schedule 1f1b, 4 micro-batches
step: measured 21.2 s, predicted 15 s, 41.3 % over the prediction
loss: 2.5

                             busy, s per step           idle             peak memory        sent per step
stage  worker  parameters  predicted  measured  predicted  measured  predicted  measured     bytes  messages  modules
-----  ------  ----------  ---------  --------  ---------  --------  ---------  --------  --------  --------  -------
    0       0       1.5 M       12.0      12.0     20.0 %    43.4 %       2 GB    2.1 GB  4.096 kB         4  embed
    1       1       2.5 M       12.0      18.0     20.0 %    15.1 %       1 GB    900 MB  4.096 kB         4  <head>

busiest: worker 1 with 18 s of the measured 21.2 s; least busy: worker 0 with 12 s
worker 1 has 1.20 times the mean work: plan again with measured costs, or open the modules of its stage
"""
    )


def test_stages_of_one_process_are_compared_by_their_work(run):
    """They take turns: a longer step than predicted, and idle lanes, would mean nothing there."""
    text = report_text(replace(run, in_turns=True))
    assert text == """\
tiny: 2 stages in one process, schedule 1f1b, 4 micro-batches
step: measured 21.2 s, all stages in turns
busy: measured 30 s in all stages, predicted 24 s, 25.0 % over the prediction
on 2 workers: predicted 15 s per step, if messages took no time
loss: 2.5

                             busy, s per step      idle        peak memory      would send per step
stage  worker  parameters  predicted  measured  predicted  predicted  measured     bytes   messages  modules
-----  ------  ----------  ---------  --------  ---------  ---------  --------  --------  ---------  -------
    0       0       1.5 M       12.0      12.0     20.0 %       2 GB    2.1 GB  4.096 kB          4  embed
    1       1       2.5 M       12.0      18.0     20.0 %       1 GB    900 MB  4.096 kB          4  <head>

most work: stages of worker 1 with 18 s measured; least: those of worker 0 with 12 s
worker 1 would have 1.20 times the mean work: plan again with measured costs, or open the modules of its stage
only a run with one process per worker (torchrun) shows how long workers wait for each other
"""
    page = report_html(replace(run, in_turns=True))
    assert "stage 1<" in page and "measured idle" not in page and "over the prediction" in page


@pytest.mark.parametrize("schedule, rows", [("1f1b", 3), ("dualpipe-v", 8), ("dualpipe-v", 5)])
def test_micro_batches_are_those_that_ran(schedule, rows):
    """Eight were asked for, the batch had fewer rows; evaluating afterwards changes nothing."""
    model, batch = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(4)]), torch.ones(8, 4)
    pipe = pe.Pipeline(model, (batch,), num_stages=4, num_microbatches=8, schedule=schedule, costs="analytic",
                       loss_fn=lambda output, target: (output - target).square().mean(), target=batch)
    pipe.step(batch[:rows], target=batch[:rows])
    pipe.evaluate(batch, target=batch)
    report = pipe.run_report()
    assert report.num_microbatches == report.measured.num_microbatches == report.predicted.num_microbatches == rows
    assert report.in_turns and f"{rows} micro-batches" in report_text(report)
    assert {row.worker for row in report.rows} == set(range(report.predicted.num_workers))
    for timeline in (report.predicted, report.measured):
        assert len(set(timeline.microbatch[timeline.stage == 0].tolist())) == rows
    pipe.close()


def _slow_links(hop, scale=1.0):
    schedule = build("1f1b", num_workers=3, num_microbatches=8)
    costs = Costs([scale, 1.4 * scale, scale], backward=[2 * scale] * 3, hop=hop)
    rows = tuple(StageRow(stage, stage) for stage in range(3))
    return RunReport("tiny", "1f1b", 8, rows, measured=simulate(schedule, costs))


@pytest.mark.parametrize("hop, scale, advice", [
    (1e-3, 1e-5, "the stages are too small: an action takes 15.67 us, handing over its result some 500 us"),
    (1e2, 1.0, "an action takes 1.567 s, much more than handing over its result should"),
    (0.0, 1.0, "even the busiest worker idles")])
def test_advice_names_what_dominates(hop, scale, advice):
    text = report_text(_slow_links(hop, scale))
    assert advice in text
    assert ("messages and overhead dominate" in text) == (hop > 0)


def test_unknown_columns_are_left_out():
    text = report_text(RunReport("bare", "gpipe", 1, (StageRow(0, 0), StageRow(1, 1))))
    assert "memory" not in text and "sent" not in text and "predicted" not in text


def test_a_report_survives_its_file(run, tmp_path):
    run.save(tmp_path / "runs" / "x.json")
    again = RunReport.load(tmp_path / "runs" / "x.json")
    assert report_text(again) == report_text(run)
    assert report_html(again) == report_html(run)


@pytest.mark.parametrize("text", ["{", "[]", "{\"kind\": \"plan\"}"])
def test_a_file_that_is_no_report(text):
    with pytest.raises(InputError, match="this is no run report"):
        RunReport.from_json(text)


def test_the_page_is_self_contained(run):
    page = report_html(run)
    assert not re.search(r"(src|href)=|url\(|@import|https?://", page)
    assert page.count('class="timeline"') == 1 and "&lt;head&gt;" in page
    ElementTree.fromstring(re.search(r"<svg.*</svg>", page, re.S)[0])


@pytest.mark.parametrize("name", SCHEDULES)
def test_svg_and_trace_hold_every_action(name):
    timeline = simulate(build(name, num_workers=4, num_microbatches=8))
    root = ElementTree.fromstring(timeline_svg([("predicted", timeline)]))
    hints = [e.text for e in root.iter("{http://www.w3.org/2000/svg}title")]
    assert len(hints) == len(timeline.end)
    events = [e for e in chrome_trace(timeline)["traceEvents"] if e["ph"] == "X" and e["cat"] not in ("wait", "step")]
    assert len(events) == len(timeline.end)
    assert max(e["ts"] + e["dur"] for e in events) == pytest.approx(timeline.makespan * 1e6)
    json.dumps(events)


def test_many_actions_make_a_small_file():
    timeline = simulate(build("1f1b", num_workers=4, num_microbatches=20_000))
    svg = timeline_svg([("long", timeline)])
    assert len(svg) < 1_000_000
    assert svg.count("h-") > 4 * 900, "each worker's lane is filled to the last half point"
    ElementTree.fromstring(svg)


def test_text_grid_picture():
    timeline = simulate(build("1f1b", num_workers=2, num_microbatches=2))
    assert timeline_text(timeline, 80) == ("0  F0 F1 .  .  B0--- .  B1---\n"
                                           "1  .  F0 B0--- F1 B1--- .  .")


def test_text_grid_picture_with_several_stages_per_worker():
    """Lower case is the later stage."""
    timeline = simulate(build("interleaved-1f1b", num_workers=2, num_microbatches=3, stages_per_worker=2))
    assert timeline_text(timeline, 48) == ("0  F0F1F2f0f1f2..b0--..b1--..b2--B0--B1--B2--\n"
                                           "1  ..F0F1F2f0b0--f1b1--f2b2--B0--B1--B2--....")


def test_text_grid_tells_wide_actions_apart_without_room_for_numbers():
    timeline = simulate(build("gpipe", num_workers=1, num_microbatches=12), Costs([1.0], backward=[2.0]))
    assert timeline_text(timeline, 40) == "0  " + "F" * 12 + "".join(f"B{k}" for k in range(10)) + "B-B-"


@pytest.mark.parametrize("lane, told", [("worker", True), ("stage", False)])
def test_pictures_tell_idle_time_of_workers_only(lane, told):
    """The length stands beside the title, never on it; the legend wraps."""
    timeline = simulate(build("zb-v", num_workers=2, num_microbatches=4))
    short = simulate(build("zb-v", num_workers=2, num_microbatches=4), Costs([0.15] * 4, input_grad=[0.15] * 4))
    root = ElementTree.fromstring(
        timeline_svg([Panel("a short one", short, lane), Panel("a long one", timeline, lane)], width=500)
    )
    texts = {e.text: e for e in root.iter("{http://www.w3.org/2000/svg}text")}
    assert ("idle" in texts) == told and f"{lane} 1" in texts
    assert "lighter: later stages of a worker" in texts
    length = texts[f"{short.makespan:.4g} s"]
    assert length.get("text-anchor") == "start" and float(length.get("x")) > float(texts["a short one"].get("x")) + 60
    assert max(float(e.get("y")) for e in texts.values() if "lighter" in (e.text or "")) > 22


def test_text_grid_of_uneven_times_fills_its_width():
    timeline = simulate(build("gpipe", num_workers=2, num_microbatches=30), Costs([1, 1.37], backward=[2, 2.11]))
    rows = timeline_text(timeline, 60).splitlines()
    assert len(rows) == 2 and max(map(len, rows)) <= 60 and set("FB.") <= set("".join(rows))


def test_reports_need_no_torch():
    code = "import sys, pipeengine.report, pipeengine.program; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_timelines_far_apart_have_a_scale_each():
    """A prediction of 3 ms over a step of 1 s was a stroke at the left."""
    order = build("1f1b", num_workers=4, num_microbatches=8)
    for forward, one_scale in ((0.5, True), (0.003, False)):
        short = simulate(order, Costs([forward] * 4, input_grad=[forward] * 4, weight_grad=[forward] * 4))
        picture = timeline_svg([Panel("predicted", short), Panel("measured", simulate(order))])
        scales = re.findall(r'data-seconds="([^"]+)"', picture)
        longest = simulate(order).makespan
        assert [float(scale) for scale in scales] == pytest.approx(
            [longest if one_scale else short.makespan, longest])
        assert ("each on a scale of its own" in picture) != one_scale
