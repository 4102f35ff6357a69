"""Synthesised orders against a bound, an exact solution, published rates and the built-in schedules."""
import json
import random
from itertools import product
from pathlib import Path

import pytest

from pipeengine.errors import ScheduleError
from pipeengine.program.checking import check
from pipeengine.schedules.schedule import Topology
from pipeengine.simulation.costs import Costs
from pipeengine.simulation.memory import peak_activations
from pipeengine.simulation.simulator import simulate
from pipeengine.synthesis.auto import auto
from pipeengine.synthesis.bound import lower_bound
from pipeengine.synthesis.registry import SCHEDULES, build

TABLE = json.loads((Path(__file__).parents[1] / "data" / "zero_bubble.json").read_text())["rows"]


def instance(seed, kept=0.5):
    """Four to eight workers, stages that differ by 5 to 35 percent, messages of up to a tenth of a forward."""
    draw = random.Random(seed)
    p = draw.randint(4, 8)
    m, spread = draw.randint(p, 4 * p), draw.uniform(0.05, 0.35)
    f, i, w = ([base * draw.uniform(1 - spread, 1 + spread) for _ in range(p)]
               for base in (1, draw.uniform(0.9, 1.3), draw.uniform(0.6, 1.0)))
    return p, m, Costs(f, i, w, hop=draw.uniform(0, 0.1), activation=[1] * p, weight_activation=[kept] * p)


@pytest.mark.parametrize("kept", [0.5, 1.0])
@pytest.mark.parametrize("memory, limit", [(1.0, 0.015), (1.25, 0.005)])
def test_auto_is_near_the_bound(memory, limit, kept):
    above = []
    for seed in range(8):
        p, m, costs = instance(seed, kept)
        schedule = auto(p, m, costs=costs, max_peak=memory * p)
        check(schedule, max_peak=memory * p, costs=costs)
        above.append(simulate(schedule, costs).makespan / lower_bound(schedule.topology, m, costs, memory * p) - 1)
    assert min(above) > -1e-9, "nothing beats a bound"
    assert sum(above) / len(above) <= limit


def test_auto_is_never_worse_than_a_built_in_schedule():
    for seed in range(4):
        p, m, costs = instance(100 + seed, kept=1.0)
        mine = simulate(auto(p, m, costs=costs), costs).makespan
        for name in SCHEDULES:
            try:
                schedule = build(name, num_workers=p, num_microbatches=m) if name != "auto" else None
            except ScheduleError:
                continue
            if schedule and schedule.topology.num_stages == p and peak_activations(schedule, costs).max() <= p:
                assert mine <= simulate(schedule, costs).makespan * (1 + 1e-9), name


@pytest.mark.parametrize("row", TABLE[::2], ids=lambda row: f"{row['model']}-{row['workers']}-{row['microbatches']}")
def test_published_automatic_schedules_are_reached(row):
    """ZB-1p and ZB-2p, with half of the activations kept for W as in the paper."""
    p, m = row["workers"], row["microbatches"]
    f, i, w, hop = (row[f"{which}_ms"] for which in ("forward", "input_grad", "weight_grad", "hop"))
    costs = Costs([f] * p, [i] * p, [w] * p, hop=hop, activation=[1] * p, weight_activation=[0.5] * p)
    for memory, column in ((1, "rate_zb_1p"), (2, "rate_zb_2p")):
        span = simulate(auto(p, m, costs=costs, max_peak=memory * p, objective="span"), costs).span
        assert (span - m * (f + i + w)) / span <= row[column] + 5e-4


def test_many_workers_wait_no_longer_than_memory_makes_them():
    """With 2 p micro-batches of room, the first worker waits for its first gradient and for nothing else."""
    p, m, f, i, w, hop = 32, 96, 10.4, 10.2, 7.8, 0.4
    costs = Costs([f] * p, [i] * p, [w] * p, hop=hop, activation=[1] * p, weight_activation=[0.5] * p)
    span = simulate(auto(p, m, costs=costs, max_peak=2 * p, objective="span"), costs).span
    wait = p * f + (p - 1) * i + 2 * (p - 1) * hop - 2 * p * f
    assert wait > 0
    assert m * (f + i + w) + wait - 1e-9 <= span <= m * (f + i + w) + wait + 0.2 * f


def lanes_within(m, cap, kept):
    """All orders of one worker's F, I and W of m micro-batches, none later before an earlier, that fit the memory."""
    def go(f, i, w):
        if w == m:
            yield ()
        for letter, next_ in (("F", (f + 1, i, w)), ("I", (f, i + 1, w)), ("W", (f, i, w + 1))):
            a, b, c = next_
            if a <= m and a >= b >= c and (a - b) + kept * (b - c) <= cap + 1e-9:
                for rest in go(*next_):
                    yield (letter, *rest)
    return list(go(0, 0, 0))


def length(lanes, costs):
    """The makespan of one lane per worker, by sweeping until nothing moves; inf when it gets stuck."""
    times = dict(zip("FIW", (costs.forward, costs.input_grad, costs.weight_grad)))
    ends = [{letter: [] for letter in "FIW"} for _ in lanes]
    at, free, moved = [0] * len(lanes), [0.0] * len(lanes), True
    while moved:
        moved = False
        for r, lane in enumerate(lanes):
            while at[r] < len(lane):
                letter = lane[at[r]]
                other = {"F": r - 1, "I": r + 1, "W": -1}[letter]
                k, start = len(ends[r][letter]), free[r]
                if 0 <= other < len(lanes):
                    if len(ends[other][letter]) <= k:
                        break
                    start = max(start, ends[other][letter][k] + costs.hop)
                free[r] = start + times[letter][r]
                ends[r][letter].append(free[r])
                at[r] += 1
                moved = True
    return max(free) if all(a == len(lane) for a, lane in zip(at, lanes)) else float("inf")


@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("p, m", [(2, 2), (2, 3), (3, 2)])
def test_bound_and_auto_around_the_true_optimum(p, m, kept):
    """Against every possible order."""
    for seed, cap in product(range(4), (1, 1.5, 2, 3)):
        draw = random.Random(seed)
        costs = Costs(*([draw.uniform(0.3, 1.5) for _ in range(p)] for _ in range(3)), hop=0.05,
                      activation=[1] * p, weight_activation=[kept] * p)
        truth = min(length(lanes, costs) for lanes in product(lanes_within(m, cap, kept), repeat=p))
        assert lower_bound(Topology.linear(p), m, costs, cap) <= truth * (1 + 1e-9)
        found = simulate(auto(p, m, costs=costs, max_peak=cap), costs).makespan
        assert truth * (1 - 1e-9) <= found <= truth * 1.02, (seed, cap)


@pytest.mark.parametrize("kept", [0.5, 1.0])
def test_no_schedule_beats_the_bound(kept):
    """Whatever is made by whichever rule, its makespan is at least the bound for the memory that it uses."""
    for seed in range(40):
        p, m, costs = instance(seed, kept)
        for name in ("1f1b", "zb-h1", "zb-h2", "gpipe"):
            if name == "zb-h2" and m < 2 * p - 1:
                continue
            schedule = build(name, num_workers=p, num_microbatches=m)
            bound = lower_bound(schedule.topology, m, costs, peak_activations(schedule, costs))
            assert simulate(schedule, costs).makespan >= bound * (1 - 1e-9)
        looped = build("interleaved-zb", num_workers=p, num_microbatches=m).topology
        costs = Costs.uniform(looped, hop=0.1, weight_activation=kept)
        for name in ("interleaved-zb", "interleaved-1f1b", "bfs"):
            schedule = build(name, num_workers=p, num_microbatches=m)
            bound = lower_bound(looped, m, costs, peak_activations(schedule, costs))
            assert simulate(schedule, costs).makespan >= bound * (1 - 1e-9)


def test_several_stages_per_worker():
    for p, m in ((3, 6), (4, 8)):
        schedule = auto(p, m, 2)
        assert schedule.topology.num_stages == 2 * p
        assert (
            simulate(schedule).makespan <= simulate(build("interleaved-zb", num_workers=p, num_microbatches=m)).makespan
        )


@pytest.mark.parametrize("stages_per_worker", [1, 2, 3])
def test_any_numbers_under_any_cap_of_one_microbatch_or_more(stages_per_worker):
    draw = random.Random(stages_per_worker)
    for p, m, cap in product((1, 2, 5), (1, 3, 7), (1, 1.5, 3)):
        count = p * stages_per_worker
        costs = Costs(
            *([draw.uniform(0.5, 1.5) for _ in range(count)] for _ in range(3)),
            hop=0.05,
            activation=[1 / stages_per_worker] * count,
            weight_activation=[draw.choice((0.5, 1)) / stages_per_worker] * count,
        )
        check(auto(p, m, stages_per_worker, costs=costs, max_peak=cap), max_peak=cap, costs=costs)


def test_the_same_costs_give_the_same_order():
    p, m, costs = instance(3)
    assert auto(p, m, costs=costs) == auto(p, m, costs=costs)


def test_what_cannot_fit_is_refused():
    with pytest.raises(ScheduleError, match="may keep 0.5 of activations, one micro-batch needs 1"):
        auto(4, 8, max_peak=0.5)
    with pytest.raises(ScheduleError, match="costs are for 3 stages, 4 workers hold 4"):
        auto(4, 8, costs=Costs([1] * 3, backward=[1] * 3))
    tight = auto(4, 8, max_peak=1)
    check(tight, max_peak=1)
