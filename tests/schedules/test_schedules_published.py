"""Schedules against what others have published or shipped: closed forms, tables, torch's own lists."""
import json
import random
from pathlib import Path

import pytest

from pipeengine.errors import ScheduleError
from pipeengine.program.checking import check
from pipeengine.program.program import Program
from pipeengine.schedules.interleaved import published_interleaved_seconds
from pipeengine.schedules.schedule import Schedule, Topology
from pipeengine.simulation.costs import Costs
from pipeengine.simulation.memory import peak_activations
from pipeengine.simulation.simulator import simulate
from pipeengine.synthesis.registry import SCHEDULES, build, build_short

TABLE = json.loads((Path(__file__).parents[1] / "data" / "zero_bubble.json").read_text())["rows"]

# Seconds beyond m (F + I + W): p workers, v stages each, times of a whole worker. Notation of the papers.
MAKESPAN = {
    "gpipe": lambda p, v, f, i, w: (p - 1) * (f + i + w),
    "1f1b": lambda p, v, f, i, w: (p - 1) * (f + i + w),
    "interleaved-1f1b": lambda p, v, f, i, w: (p - 1) * (f + i + w) / v,
    "bfs": lambda p, v, f, i, w: (p - 1) * (f + i + w) / v,
    "zb-h1": lambda p, v, f, i, w: (p - 1) * max(f + i - w, i, f),
}
SPAN = {
    "zb-h1": lambda p, v, f, i, w: (p - 1) * max(f + i - w, i),
    "zb-h2": lambda p, v, f, i, w: (p - 1) * max(f + i - 2 * w, i - f, 0),
    "interleaved-zb": lambda p, v, f, i, w: (p - 1) * max(f + i - w, i) / v,
}


def drawn(seed, stages_per_worker):
    draw = random.Random(seed)
    p = draw.randint(1, 9)
    f, i, w = (draw.uniform(0.3, 2) for _ in range(3))
    return p, draw.randint(2 * p, 5 * p), stages_per_worker and draw.randint(1, 4), f, i, w


@pytest.mark.parametrize("name", MAKESPAN)
def test_makespan_is_the_closed_form(name):
    several = name in ("interleaved-1f1b", "bfs")
    for seed in range(150):
        p, m, v, f, i, w = drawn(seed, several)
        schedule = build(name, num_workers=p, num_microbatches=m, stages_per_worker=v or None)
        timeline = simulate(schedule, Costs.uniform(schedule.topology, forward=f, input_grad=i, weight_grad=w))
        assert timeline.makespan == pytest.approx(m * (f + i + w) + MAKESPAN[name](p, v, f, i, w)), (seed, p, m, v)


@pytest.mark.parametrize("name", SPAN)
def test_span_is_the_closed_form(name):
    for seed in range(150):
        p, m, _, f, i, w = drawn(seed, False)
        if name == "interleaved-zb":
            m += -m % p
        schedule = build(name, num_workers=p, num_microbatches=m)
        timeline = simulate(schedule, Costs.uniform(schedule.topology, forward=f, input_grad=i, weight_grad=w))
        assert timeline.span == pytest.approx(m * (f + i + w) + SPAN[name](p, 2, f, i, w)), (seed, p, m)


def test_v_and_dual_spans_in_the_region_of_their_forms():
    for seed in range(60):
        p, m, _, f, i, w = drawn(seed, False)
        w, f, i = sorted((f, i, w))
        schedule = build("zb-v", num_workers=p, num_microbatches=m)
        timeline = simulate(schedule, Costs.uniform(schedule.topology, forward=f, input_grad=i, weight_grad=w))
        assert timeline.span == pytest.approx(m * (f + i + w) + (p - 1) * (i - w))
        p += p % 2
        m = max(m + m % 2, 2 * p)
        for name, depth in (("dualpipe", p // 2 - 1), ("dualpipe-v", p - 1)):
            schedule = build(name, num_workers=p, num_microbatches=m)
            costs = Costs.uniform(schedule.topology, forward=f, input_grad=f, weight_grad=w)
            f1, w1 = costs.forward[0], costs.weight_grad[0]
            expected = m * (2 * f + w) + depth * ((2 * f1 + w1) + (f1 + w1) - 3 * w1)
            assert simulate(schedule, costs).makespan == pytest.approx(expected), (name, seed, p, m)


def test_latency_forms():
    for seed in range(80):
        p, m, _, f, i, w = drawn(seed, False)
        m, c, work = p * (2 + seed % 3), 0.01 * (f + i + w), f + i + w
        def makespan(name, **more):
            schedule = build(name, num_workers=p, num_microbatches=m, **more)
            return simulate(
                schedule, Costs.uniform(schedule.topology, forward=f, input_grad=i, weight_grad=w, hop=c)
            ).makespan

        assert makespan("gpipe") == pytest.approx((m + p - 1) * work + 2 * (p - 1) * c)
        if p > 1:
            assert makespan("1f1b") == pytest.approx((m + p - 1) * work + 2 * c * ((p - 1) * m / p + p - 2))
            assert makespan("bfs") == pytest.approx(m * work + (p - 1) * work / 2 + 2 * (p - 1) * c)
            assert makespan("interleaved-1f1b") == pytest.approx(m * work + (p - 1) * work / 2 + 2 * (2 * p - 1) * c)


PEAKS = {"gpipe": lambda p, m: m, "1f1b": lambda p, m: p, "bfs": lambda p, m: m, "zb-h1": lambda p, m: p,
         "zb-h2": lambda p, m: 2 * p - 1, "interleaved-zb": lambda p, m: p, "zb-v": lambda p, m: p,
         "v-half": lambda p, m: (p + 2) // 2, "v-min": lambda p, m: (p + 4) // 3,
         "interleaved-1f1b": lambda p, m: (p + 2 * (p - 1) + 1) / 2,
         "dualpipe": lambda p, m: p + 1, "dualpipe-v": lambda p, m: (2 * p + 1) / 2}


@pytest.mark.parametrize("name", PEAKS)
def test_peak_memory_is_the_published_one(name):
    for p in (2, 4, 6, 8, 10):
        m = 6 * p
        assert peak_activations(build(name, num_workers=p, num_microbatches=m)).max() == pytest.approx(
            PEAKS[name](p, m)
        )


# Every F, I and W of a stage takes one second: (p, m) -> span, makespan.
SMALL = {("gpipe", 4, 8): (33, 33), ("1f1b", 4, 8): (33, 33), ("zb-h1", 4, 8): (27, 27), ("zb-h2", 4, 8): (24, 27),
         ("interleaved-1f1b", 4, 8): (57, 57), ("bfs", 4, 8): (57, 57), ("interleaved-zb", 4, 8): (51, 51),
         ("zb-v", 4, 8): (48, 51), ("dualpipe-v", 4, 8): (54, 54), ("dualpipe-v", 4, 10): (66, 66),
         ("dualpipe", 4, 8): (26, 26), ("dualpipe", 8, 20): (66, 66)}


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small_integers(case):
    name, p, m = case
    schedule = build(name, num_workers=p, num_microbatches=m)
    stages = schedule.topology.num_stages
    timeline = simulate(schedule, Costs([1] * stages, [1] * stages, [1] * stages))
    assert (timeline.span, timeline.makespan) == SMALL[case]


@pytest.mark.parametrize("column, name", [("rate_1f1b", "1f1b"), ("rate_zb_h1", "zb-h1"), ("rate_zb_h2", "zb-h2")])
@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row['model']}-{row['workers']}-{row['microbatches']}")
def test_zero_bubble_table(row, column, name):
    p, m = row["workers"], row["microbatches"]
    f, i, w, hop = (row[f"{which}_ms"] for which in ("forward", "input_grad", "weight_grad", "hop"))
    span = simulate(build(name, num_workers=p, num_microbatches=m), Costs([f] * p, [i] * p, [w] * p, hop=hop)).span
    assert (span - m * (f + i + w)) / span == pytest.approx(row[column], abs=6e-5)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row['model']}-{row['workers']}-{row['microbatches']}")
def test_zero_bubble_table_of_interleaved(row):
    """Three stages per worker. The published figures leave p hops out that every event simulation has."""
    p, m, hop = row["workers"], row["microbatches"], row["hop_ms"]
    f, i, w = (row[f"{which}_ms"] for which in ("forward", "input_grad", "weight_grad"))
    seconds = published_interleaved_seconds(p, m, 3, f + i + w, hop)
    assert (seconds - m * (f + i + w)) / seconds == pytest.approx(row["rate_1f1b_interleaved"], abs=6e-5)
    schedule = build("interleaved-1f1b", num_workers=p, num_microbatches=m, stages_per_worker=3)
    costs = Costs.uniform(schedule.topology, forward=f, input_grad=i, weight_grad=w, hop=hop)
    assert simulate(schedule, costs).makespan == pytest.approx(seconds + p * hop)


def torch_text(name, p, m, v, **options):
    visualizer = pytest.importorskip("torch.distributed.pipelining._schedule_visualizer")
    rows = visualizer.get_schedule_ops(name, p, m, num_stages_per_rank=v, **options)
    return "\n".join(",".join("" if action is None else repr(action) for action in row) for row in rows)


@pytest.mark.parametrize("theirs, ours, v", [
    ("GPipe", "gpipe", 1), ("Interleaved1F1B", "interleaved-1f1b", 2), ("Interleaved1F1B", "interleaved-1f1b", 3),
    ("InterleavedZeroBubble", "interleaved-zb", 2), ("ZBVZeroBubble", "zb-v", 2), ("DualPipeV", "dualpipe-v", 2)])
def test_torch_has_the_same_lists(theirs, ours, v):
    for p, m in [(2, 4), (2, 6), (4, 8), (4, 12), (8, 16), (3, 6), (3, 9)]:
        schedule = build(
            ours, num_workers=p, num_microbatches=m, stages_per_worker=v if "interleaved" in ours else None
        )
        assert Schedule.from_text(torch_text(theirs, p, m, v), topology=schedule.topology) == schedule


def test_torchs_one_f_one_b_table_is_refused():
    """Its last rank runs micro-batches 1 to m instead of 0 to m - 1 (a display fault in 2.13)."""
    with pytest.raises(ScheduleError, match="outside|no F"):
        check(Schedule.from_text(torch_text("1F1B", 4, 8, 1), num_microbatches=8))


@pytest.mark.parametrize(
    "name, topology, p",
    [
        ("ZBVZeroBubble", Topology.v(4), 4),
        ("DualPipeV", Topology.v(4), 4),
        ("InterleavedZeroBubble", Topology.looped(2, 2), 2),
    ],
)
def test_torchs_deferred_receives_are_refused(name, topology, p):
    """They reorder receives against sends: an activation lands in a gradient's buffer, and nobody notices."""
    check(Program.from_text(torch_text(name, p, 2 * p, 2, with_comms=True), topology=topology))
    deferred = torch_text(name, p, 2 * p, 2, with_comms=True, defer_pp_recv=True)
    with pytest.raises(ScheduleError, match="would deliver the wrong one"):
        check(Program.from_text(deferred, topology=topology))


@pytest.mark.parametrize("name, p, m, nearest", [
    ("zb-h1", 4, 3, "4"), ("zb-h2", 4, 5, "7"), ("zb-v", 4, 6, "7"), ("dualpipe-v", 3, 5, "6"),
    ("dualpipe", 4, 9, "4 workers and 10 micro-batches"), ("dualpipe", 3, 8, "4 workers and 8 micro-batches")])
def test_outside_its_numbers_the_nearest_is_named(name, p, m, nearest):
    with pytest.raises(ScheduleError, match=f"nearest that works is {nearest}"):
        build(name, num_workers=p, num_microbatches=m)


def test_a_smaller_batch_keeps_the_order():
    for name in SCHEDULES:
        schedule = build(name, num_workers=4, num_microbatches=8)
        if schedule.topology.num_routes == 1:
            for fewer in (1, 3, 7):
                check(schedule.keep(fewer))


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "dualpipe"])
def test_a_short_batch_has_an_order_too(name):
    for m in (1, 2, 5):
        schedule = build_short(name, num_workers=4, num_microbatches=m)
        assert schedule.num_microbatches == m
        check(schedule)
    with pytest.raises(ScheduleError, match="unknown schedule"):
        build_short("nope", num_workers=4, num_microbatches=2)


def test_torchs_class_names_are_understood():
    """Whoever comes from torch.distributed.pipelining types its class names."""
    from torch.distributed.pipelining import schedules as theirs

    from pipeengine.synthesis.registry import TORCH_NAMES, find
    for name, own in TORCH_NAMES.items():
        assert hasattr(theirs, name) and find(name) is SCHEDULES[own]
