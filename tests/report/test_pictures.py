"""Timelines as pictures and letters, curves, and what is advised: against the numbers that they show."""
import random
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest

from pipeengine.errors import ScheduleError
from pipeengine.report.advice import advice
from pipeengine.report.curves import charts, nice_ticks, spark
from pipeengine.report.history import History
from pipeengine.report.run_report import RunReport, StageRow
from pipeengine.report.svg import COLOURS, Panel, _ink, _nice, _rgb, _shade, shades, timeline_svg
from pipeengine.report.text import _busiest, timeline_text
from pipeengine.simulation import OPS, Costs, Timeline, simulate
from pipeengine.synthesis import build

SPACE = "{http://www.w3.org/2000/svg}"


def simulated(name="1f1b", p=3, m=5, seed=None, **more):
    schedule = build(name, num_workers=p, num_microbatches=m)
    draw, stages = random.Random(seed), schedule.topology.num_stages
    times = [[1.0 if seed is None else draw.uniform(0.3, 2) for _ in range(stages)] for _ in range(3)]
    return simulate(schedule, Costs(*times, **more))


# -- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("gpipe", "1f1b", "zb-v", "interleaved-1f1b", "dualpipe-v"))
@pytest.mark.parametrize("seed", (1, 2))
def test_a_block_is_where_and_as_long_as_its_action(name, seed):
    """Left edges and widths are one linear map of the times, rows those of the workers."""
    timeline = simulated(name, 3, 6, seed)
    drawn = ElementTree.fromstring(timeline_svg([("run", timeline)]))
    (picture,) = [part for part in drawn.iter(SPACE + "svg") if part.get("class") == "blocks"]
    left, top, width, height = map(float, picture.get("viewBox").split())
    blocks = picture.findall(SPACE + "rect")
    assert len(blocks) == len(timeline.end)
    scale, lane = width / timeline.makespan, height / timeline.num_workers
    for block, start, end, worker, op in zip(blocks, timeline.start, timeline.end, timeline.worker, timeline.op):
        assert float(block.get("x")) == pytest.approx(left + start * scale, abs=0.01)
        assert float(block.get("width")) == pytest.approx((end - start) * scale - 0.6, abs=0.01)
        assert float(block.get("y")) == pytest.approx(top + worker * lane + 2)
        assert block.find(SPACE + "title").text.startswith(OPS[op])
    assert float(picture.get("data-seconds")) == pytest.approx(timeline.makespan)


def test_two_panels_have_one_scale():
    """The shorter run ends in the middle; each tells its own length."""
    timeline = simulated()
    twice = replace(timeline, start=2 * timeline.start, end=2 * timeline.end)
    text = timeline_svg([Panel("short", timeline), Panel("long", twice, "stage")], unit="ms")
    ends = [float(x) for x in re.findall(r'class="end" d="M([\d.]+) ', text)]
    boxes = [list(map(float, box.split())) for box in re.findall(r'viewBox="([^"]+)" preserve', text)]
    assert [end - box[0] for end, box in zip(ends, boxes)] == pytest.approx([boxes[0][2] / 2, boxes[0][2]], abs=0.01)
    assert f">{timeline.makespan:g} ms<" in text and f">{twice.makespan:g} ms<" in text
    assert text.count(">idle<") == 1 and "stage 2" in text and "worker 2" in text, "idle time is told of workers only"


def test_a_picture_of_nothing_is_refused():
    with pytest.raises(ScheduleError, match="0 panels to draw, give at least 1"):
        timeline_svg([("empty", Timeline.from_columns([], [], [], [], [], []))])


def test_very_many_actions_are_drawn_as_paths_and_none_is_lost():
    """More than a reader can point at: one path per colour, an outline for each action that has a point of its own."""
    timeline = simulated("gpipe", 4, 500)
    text = timeline_svg([("many", timeline)])
    assert "<title>" not in text and text.count("h-") == len(timeline.end) == 4000
    assert timeline_svg([("many", timeline)], hover=False) == text
    few = simulated()
    assert timeline_svg([("few", few)], hover=False).count("h-") == len(few.end)


def test_titles_are_text():
    text = timeline_svg([("<run> & more", simulated())], unit="<s>")
    assert "&lt;run&gt; &amp; more" in text and ElementTree.fromstring(text) is not None
    assert "xmlns" not in timeline_svg([("run", simulated())], standalone=False)


@pytest.mark.parametrize("width", (300, 500, 960))
def test_the_legend_keeps_within_the_picture(width):
    """As many lines as it needs; the panel begins below."""
    text = timeline_svg([("run", simulated("zb-v", exchange=0.5, optimizer=0.5))], width=width)
    legend = text[:text.index('font-weight="bold"')]
    words = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" fill="#(?:222|666)">([^<]+)</text>', legend)
    assert {letter for *_, said in words for letter in said.split()[:1]} >= {"F", "I", "W", "X", "U"}
    title = float(re.search(r'y="([\d.]+)" font-weight="bold"', text)[1])
    assert all(float(y) < title for _, y, said in words)
    assert all(float(x) + 5.4 * len(said) <= width for x, _, said in words if 5.4 * len(said) + 95 < width)


@pytest.mark.parametrize("name", COLOURS)
def test_ink_can_be_read_on_every_shade(name):
    """Contrast of at least 3 to 1 by the definition of WCAG, for up to four stages of a worker."""
    def light(colour):
        parts = [value / 255 for value in _rgb(colour)]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    for ranks in (1, 2, 4):
        fills = [_shade(COLOURS[name], rank, ranks) for rank in range(ranks)]
        assert fills[0] == COLOURS[name] and len(set(fills)) == ranks
        for fill in fills:
            ink = "#222222" if _ink(fill) == "#222" else "#ffffff"
            low, high = sorted((light(fill), light(ink)))
            assert (high + 0.05) / (low + 0.05) >= 3, (fill, ink)


def test_shades_count_a_workers_stages():
    timeline = simulated("zb-v", 2, 3)
    assert all(rank == (stage >= 2) for rank, stage in zip(shades(timeline), timeline.stage))
    assert not shades(simulated()).any()


@pytest.mark.parametrize("least", (1e-9, 0.0003, 0.1, 0.2, 0.21, 1, 3.3, 7, 99, 1e6))
def test_ticks_of_an_axis_are_round_and_no_closer_than_asked(least):
    step = _nice(least)
    digits = f"{step:e}"[0]
    assert step >= least * (1 - 1e-9) and digits in "125" and step <= 2.5 * least * (1 + 1e-9)


# -- letters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_column_shows_the_letter_that_fills_most_of_it(seed):
    """Against a fine raster of each column."""
    timeline = simulated("zb-h1", 3, 4, seed, hop=0.2)
    mask, begin, span, room = timeline.computes, 0.0, timeline.makespan, 40
    shown = _busiest(timeline, mask, begin, span, room)
    fine = 400
    for worker in range(3):
        for column in range(room):
            moments = begin + span * (column + (np.arange(fine) + 0.5) / fine) / room
            counts = dict.fromkeys(OPS, 0)
            for start, end, op in zip(*(c[timeline.worker == worker] for c in (timeline.start, timeline.end,
                                                                               timeline.op))):
                counts[OPS[op]] += int(((start <= moments) & (moments < end)).sum())
            busy = sum(counts.values())
            if abs(busy - fine / 2) > 4:
                assert (shown[worker][column] == ".") == (busy < fine / 2)
            if shown[worker][column] != ".":
                assert counts[shown[worker][column]] >= max(counts.values()) - 4


@pytest.mark.parametrize("width", (20, 60, 120, 300))
@pytest.mark.parametrize("m", (1, 4, 40))
def test_rows_of_letters_are_no_wider_than_asked(width, m):
    for seed in (None, 3):
        rows = timeline_text(simulated("1f1b", 3, m, seed), width).splitlines()
        assert len(rows) == 3 and all(len(row) <= max(width, 23) for row in rows)
        assert [row.split()[0] for row in rows] == ["0", "1", "2"]


def test_a_timeline_in_which_nothing_ran_says_so():
    assert timeline_text(Timeline.from_columns([], [], [], [], [], [])) == "(nothing ran)"
    still = Timeline.from_columns([0], ["F"], [0], [0], [1.0], [1.0])
    assert timeline_text(still) == "(nothing ran)"


# -- curves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_ticks_are_few_even_and_around_the_values(seed):
    draw = random.Random(seed)
    low = draw.choice((0.0, -3.0, 1e-7, 12345.678)) * draw.random()
    high = low + draw.choice((0.0, 1e-6, 0.3, 5.0, 1e9)) * draw.random()
    ticks = nice_ticks(low, high)
    steps = np.diff(ticks)
    assert ticks[0] <= low + 1e-6 * steps[0] and ticks[-1] >= high - 1e-6 * steps[0]
    assert 3 <= len(ticks) <= 6 and steps == pytest.approx([steps[0]] * len(steps), abs=1e-15 * abs(ticks[-1]))


def test_sparks_rise_with_the_values():
    assert spark([(step, float(step)) for step in range(8)]) == "▁▂▃▄▅▆▇█"
    assert spark([(step, 2.0) for step in range(3)]) == "▁▁▁" and spark([]) == ""
    assert spark([(0, 1.0), (1, float("nan")), (2, 2.0)]) == "▁█", "what is no number has no height"
    assert len(spark([(step, float(step)) for step in range(1000)], 40)) == 40


def test_charts_begin_with_the_loss_and_leave_out_what_is_not_there():
    curves = {"accuracy": ((0, 0.5), (1, 0.6)), "loss": ((0, 2.0), (1, 1.0)),
              "pipeline/step_seconds": tuple((step, 9.0 if step == 0 else 1.0) for step in range(12)),
              "pipeline/idle_share/worker_0": ((0, 0.25),), "pipeline/idle_share/worker_1": ((0, float("inf")),)}
    drawn = dict(charts(History(curves=curves)))
    assert list(drawn) == ["loss", "accuracy", "step time, s", "idle share, %"]
    assert "9.00" not in drawn["step time, s"], "the first step records, and would hide the others"
    assert "worker 0" in drawn["idle share, %"] and "step 1<" in drawn["loss"]
    nothing = dict(charts(History(curves={"loss": ((0, float("nan")),)})))
    assert nothing == {"loss": "<p class=quiet>no finite value</p>"} and charts(History()) == []


def test_more_lines_than_colours_are_told_by_number():
    curves = {f"pipeline/peak_bytes/worker_{worker}": ((0, 1e9), (1, 2e9)) for worker in range(12)}
    ((title, drawn),) = charts(History(curves=curves))
    assert title == "peak memory" and "12 lines, one each" in drawn and drawn.count("stroke-linejoin") == 12


# -- advice -----------------------------------------------------------------------------------------------------------


def report(timeline, m, in_turns=False, seconds=()):
    rows = tuple(StageRow(number, number, measured_seconds=second) for number, second in enumerate(seconds)) or tuple(
        StageRow(worker, worker) for worker in range(timeline.num_workers))
    return RunReport("tiny", "1f1b", m, rows, measured=timeline, in_turns=in_turns)


def run_of(forward, m=8, hop=0.0):
    """1F1B over workers with these seconds of forward, twice that of backward."""
    schedule = build("1f1b", num_workers=len(forward), num_microbatches=m)
    return simulate(schedule, Costs(list(forward), backward=[2 * second for second in forward], hop=hop))


@pytest.mark.parametrize("forward, m, hop, said", [
    ((1, 1, 1), 100, 0.0, None),
    ((1, 1, 2), 40, 0.0, "worker 2 has 1.50 times the mean work: plan again with measured costs"),
    ((1, 1, 1, 1), 4, 0.0, "even the busiest worker idles 43 %: more micro-batches than 4"),
    ((0.001,) * 2, 4, 0.1, "messages and overhead dominate.*much more than handing over its result should"),
    ((1e-5,) * 2, 4, 0.1, "the stages are too small.*micro-batches of more rows .fewer than 4., larger batches"),
    ((1e-5,) * 2, 1, 0.1, "500 us; larger batches or fewer stages would help")])
def test_advice_names_the_first_thing_to_change(forward, m, hop, said):
    lines = advice(report(run_of(forward, m, hop), m))
    assert lines[0].startswith("busiest: worker") and len(lines) == 1 + (said is not None)
    assert said is None or re.search(said, lines[1]), lines


def test_stages_in_turns_are_compared_by_their_work_alone():
    lines = advice(report(run_of((1, 1)), 8, in_turns=True, seconds=(1.0, 3.0)))
    assert lines[0] == "most work: stages of worker 1 with 3 s measured; least: those of worker 0 with 1 s"
    assert lines[1].startswith("worker 1 would have 1.50 times the mean work") and "torchrun" in lines[2]
    even = advice(report(run_of((1, 1)), 8, in_turns=True, seconds=(1.0, 1.001)))
    assert len(even) == 2, "less than handing over takes is even"


def test_one_worker_and_no_timeline_leave_nothing_to_advise():
    assert advice(report(run_of((1,)), 8)) == []
    assert advice(RunReport("tiny", "1f1b", 4, (StageRow(0, 0), StageRow(1, 1)))) == []
