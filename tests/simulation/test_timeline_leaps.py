"""The fast solver (steps and leaps) against the plain walk, on regular and on broken-up schedules."""
import random

import numpy as np
import pytest

from pipeengine.program.checking import check
from pipeengine.program.lowering import lower
from pipeengine.schedules.schedule import Lane, Schedule
from pipeengine.simulation import critical_path
from pipeengine.simulation.costs import Costs
from pipeengine.simulation.critical_path import Stuck, Wait, solve
from pipeengine.simulation.dependencies import waits
from pipeengine.simulation.simulator import simulate
from pipeengine.synthesis.registry import SCHEDULES, build


def both(starts, duration, columns):
    return (critical_path._worklist(starts, duration, columns), critical_path._Leaps(starts, duration, columns).solve())


@pytest.mark.parametrize("hop", [0.0, 0.07])
@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "auto"])
def test_leaps_and_walk_agree(name, hop):
    for p, m, spread in ((2, 700, 0.0), (4, 401, 0.3), (6, 500, 0.3)):
        if name == "dualpipe":
            m += m % 2
        schedule = build(name, num_workers=p, num_microbatches=m)
        draw = random.Random(p)
        costs = Costs(*([draw.uniform(1 - spread, 1 + spread) for _ in range(schedule.topology.num_stages)]
                        for _ in range(3)), hop=hop)
        columns = waits(schedule, schedule.topology.chain(), costs)
        plain, fast = both(schedule.starts, costs.duration(*schedule.columns[:2]), columns)
        np.testing.assert_allclose(fast, plain, rtol=1e-9)


def test_leaps_stop_where_the_pattern_does():
    """Costs are regular, the order is not: every so often a worker runs two forwards early."""
    schedule = build("1f1b", num_workers=4, num_microbatches=3000)
    lanes, draw = [], random.Random(0)
    for lane in schedule.lanes:
        op, stage, microbatch = (column.copy() for column in lane)
        for at in sorted(draw.sample(range(100, len(op) - 100), 20)):
            if op[at] == 1 and op[at + 1] == 0:
                for column in (op, microbatch):
                    column[[at, at + 1]] = column[[at + 1, at]]
        lanes.append(Lane(op, stage, microbatch))
    broken = Schedule("broken", schedule.topology, 3000, tuple(lanes))
    columns = waits(broken, broken.topology.chain(), Costs.uniform(broken.topology, hop=0.1))
    duration = Costs.uniform(broken.topology).duration(*broken.columns[:2])
    plain, fast = both(broken.starts, duration, columns)
    np.testing.assert_allclose(fast, plain, rtol=1e-9)


def test_a_circle_far_into_a_regular_order_is_found():
    schedule = build("1f1b", num_workers=3, num_microbatches=9000)
    op, stage, microbatch = (column.copy() for column in schedule.lanes[1])
    backward = int(np.flatnonzero((op == 1) & (microbatch == 6000))[0])
    forward = int(np.flatnonzero((op == 0) & (microbatch == 6000))[0])
    # The last stage runs forward 6000 before backward 6000; this one now wants it the other way round.
    for column in (op, microbatch):
        column[forward:backward + 1] = np.roll(column[forward:backward + 1], 1)
    broken = Schedule(
        "broken", schedule.topology, 9000, (schedule.lanes[0], Lane(op, stage, microbatch), schedule.lanes[2])
    )
    columns, duration = waits(broken, broken.topology.chain()), np.ones(broken.num_actions)
    stuck = []
    for engine in (critical_path._worklist, lambda *given: critical_path._Leaps(*given).solve()):
        try:
            engine(broken.starts, duration, columns)
        except Stuck as error:
            stuck.append(error.position.tolist())
    assert len(stuck) == 2 and stuck[0] == stuck[1]
    assert stuck[0][1] - broken.starts[1] == forward


def test_random_graphs():
    """Lanes with random waits on earlier actions of a random order: no pattern at all."""
    draw = np.random.default_rng(0)
    for _ in range(20):
        lanes, size = 5, 2000
        lane = np.sort(draw.integers(0, lanes, size))
        starts = np.searchsorted(lane, np.arange(lanes + 1))
        rank = np.empty(size)
        for number in range(lanes):
            rank[starts[number]:starts[number + 1]] = np.sort(draw.random(starts[number + 1] - starts[number]))
        on = draw.integers(-1, size, size)
        on[(on >= 0) & (rank[on] >= rank)] = -1
        columns = (Wait(on, draw.random(size)),)
        plain, fast = both(starts, draw.random(size) + 0.1, columns)
        np.testing.assert_allclose(fast, plain, rtol=1e-9)


def test_a_million_actions():
    p, m = 16, 16_384
    schedule = build("interleaved-1f1b", num_workers=p, num_microbatches=m)
    check(schedule)
    assert schedule.num_actions == 4 * p * m
    costs = Costs.uniform(schedule.topology, hop=0.01)
    assert simulate(schedule, costs).makespan == pytest.approx(m * 3 + (p - 1) * 3 / 2 + 2 * (2 * p - 1) * 0.01)
    program = lower(schedule, costs=costs)
    check(program)
    assert program.num_actions == schedule.num_actions + 2 * 2 * (2 * p - 1) * m


def test_free_actions_are_solved_too():
    schedule = build("zb-h1", num_workers=4, num_microbatches=4000)
    costs = Costs([1.0] * 4, [1.0] * 4, [0.0] * 4)
    start, end = solve(
        schedule.starts, costs.duration(*schedule.columns[:2]), waits(schedule, schedule.topology.chain(), costs)
    )
    assert end.max() == pytest.approx(4000 * 2 + 3 * 2)


def test_thousands_of_workers():
    schedule = build("1f1b", num_workers=2100, num_microbatches=3)
    assert simulate(schedule).makespan == pytest.approx((3 + 2099) * 3)
    program = lower(schedule)
    check(program)
    assert program.num_actions == schedule.num_actions + 4 * 2099 * 3
