"""Synthesised orders against a bound, an exact solution, published rates and the built-in schedules."""
import json
import random
from itertools import product
from pathlib import Path

import pytest

from pipeengine.errors import ScheduleError
from pipeengine.program import check
from pipeengine.schedules import SCHEDULES, Topology, build
from pipeengine.synthesis import auto, lower_bound
from pipeengine.timeline import Costs, peak_activations, simulate

TABLE = json.loads((Path(__file__).parent / "data" / "zero_bubble.json").read_text())["rows"]


def instance(seed, kept=0.5):
    """Four to eight workers, stages that differ by 5 to 35 percent, messages of up to a tenth of a forward."""
    draw = random.Random(seed)
    p = draw.randint(4, 8)
    m, spread = draw.randint(p, 4 * p), draw.uniform(0.05, 0.35)
    f, i, w = ([base * draw.uniform(1 - spread, 1 + spread) for _ in range(p)]
               for base in (1, draw.uniform(0.9, 1.3), draw.uniform(0.6, 1.0)))
    return p, m, Costs(f, i, w, hop=draw.uniform(0, 0.1), activation=[1] * p, weight_activation=[kept] * p)


@pytest.mark.parametrize("memory, limit", [(1.0, 0.015), (1.25, 0.005)])
def test_auto_is_near_the_bound(memory, limit):
    above = []
    for seed in range(12):
        p, m, costs = instance(seed)
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


def exhaustive(p, m, costs, cap):
    """The best makespan over all orders, by depth-first search over what each worker does next. Tiny sizes only."""
    best = [float("inf")]
    times = (costs.forward, costs.input_grad, costs.weight_grad)

    def go(done, ends, free):
        if max(free) >= best[0]:
            return
        if all(count == m for row in done for count in row):
            best[0] = max(free)
            return
        options = []
        for r in range(p):
            f, i, w = done[r]
            if f < m and f - i + 0.5 * (i - w) + 1 <= cap + 1e-9 and (r == 0 or done[r - 1][0] > f):
                options.append((max(free[r], ends[0][r - 1][f] + costs.hop if r else 0.0), r, 0, f))
            if i < f and (r == p - 1 or done[r + 1][1] > i):
                options.append((max(free[r], ends[1][r + 1][i] + costs.hop if r < p - 1 else 0.0), r, 1, i))
            if w < i:
                options.append((free[r], r, 2, w))
        # Only options that start before the earliest end are not dominated (semi-active schedules).
        first = min(start + times[op][r] for start, r, op, _ in options)
        lane = next(r for start, r, op, _ in options if start + times[op][r] == first)
        for start, r, op, k in [option for option in options if option[1] == lane and option[0] < first]:
            done[r][op] += 1
            old, free[r] = free[r], start + times[op][r]
            if op < 2:
                ends[op][r].append(free[r])
            go(done, ends, free)
            if op < 2:
                ends[op][r].pop()
            done[r][op] -= 1
            free[r] = old

    go([[0] * 3 for _ in range(p)], [[[] for _ in range(p)] for _ in range(2)], [0.0] * p)
    return best[0]


@pytest.mark.parametrize("p, m", [(2, 2), (2, 3), (3, 2)])
def test_bound_and_auto_around_the_true_optimum(p, m):
    for seed, cap in product(range(4), (2, 3)):
        draw = random.Random(seed)
        costs = Costs(*([draw.uniform(0.5, 1.5) for _ in range(p)] for _ in range(3)), hop=0.05,
                      activation=[1] * p, weight_activation=[0.5] * p)
        truth = exhaustive(p, m, costs, cap)
        assert lower_bound(Topology.linear(p), m, costs, cap) <= truth * (1 + 1e-9)
        found = simulate(auto(p, m, costs=costs, max_peak=cap), costs).makespan
        assert truth * (1 - 1e-9) <= found <= truth * 1.05


def test_several_stages_per_worker():
    for p, m in ((3, 6), (4, 8)):
        schedule = auto(p, m, 2)
        assert schedule.topology.num_stages == 2 * p
        assert simulate(schedule).makespan <= simulate(build("interleaved-zb", num_workers=p, num_microbatches=m)).makespan


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
