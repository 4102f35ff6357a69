"""Swapping neighbours: lengths against the simulator, estimates against what a swap really does, memory kept."""
import random

import numpy as np
import pytest

from pipeengine.errors import ScheduleError
from pipeengine.program import check
from pipeengine.schedules import Topology
from pipeengine.simulation import Costs, peak_activations, simulate
from pipeengine.synthesis.auto import _numbers, _schedule, _split
from pipeengine.synthesis.problem import pose_problem
from pipeengine.synthesis.registry import build
from pipeengine.synthesis.tabu import TabuSearch


def case(seed):
    """(problem, costs, search, lanes) of a published order with F, I and W."""
    draw = random.Random(seed)
    name, topology = draw.choice((("zb-h1", Topology.linear), ("gpipe", Topology.linear), ("zb-v", Topology.v),
                                  ("interleaved-zb", lambda p: Topology.looped(p, 2))))
    p = draw.randint(2, 4)
    topology, m = topology(p), draw.randint(2 * p - 1, 8)
    count = topology.num_stages
    costs = Costs(*([draw.uniform(0.4, 1.6) for _ in range(count)] for _ in range(3)), hop=draw.choice((0.0, 0.3)),
                  activation=[1.0] * count, weight_activation=[0.5] * count)
    try:
        schedule = _split(build(name, num_workers=p, num_microbatches=m))
    except ScheduleError:
        pytest.skip(f"{name} is not made for {p} workers and {m} micro-batches")
    task = pose_problem(topology, m, costs, peak_activations(schedule, costs) * draw.choice((1.0, 1.3)), "makespan")
    return task, costs, TabuSearch(task), _numbers(task, schedule)


SEEDS = range(16)


@pytest.mark.parametrize("seed", SEEDS)
def test_numbers_go_both_ways(seed):
    task, _, _, lanes = case(seed)
    assert _numbers(task, _schedule(task, lanes)) == lanes
    assert sorted(sum(lanes, [])) == list(range(task.size))


@pytest.mark.parametrize("seed", SEEDS)
def test_ends_are_the_simulators(seed):
    task, costs, search, lanes = case(seed)
    end, order = search.heads(lanes)
    timeline = simulate(_schedule(task, lanes), costs)
    assert [end[x] for x in sum(lanes, [])] == pytest.approx(timeline.end.tolist(), rel=1e-12)
    place = {x: number for number, x in enumerate(order)}
    assert all(place[x] < place[y] for lane in lanes for x, y in zip(lane, lane[1:]))


@pytest.mark.parametrize("seed", SEEDS)
def test_what_comes_before_and_after_an_action_fits_into_the_makespan(seed):
    """Equal to it exactly on a critical path, which every worker's last action to end lies on."""
    task, _, search, lanes = case(seed)
    end, order = search.heads(lanes)
    tail, after = search.tails(lanes, order)
    length = max(end)
    through = [end[x] - search.seconds[x] + tail[x] for x in range(task.size)]
    assert max(through) == pytest.approx(length) and all(whole <= length * (1 + 1e-9) for whole in through)
    assert through[max(range(task.size), key=end.__getitem__)] == pytest.approx(length)
    assert [after[x] for lane in lanes for x in lane[:-1]] == [y for lane in lanes for y in lane[1:]]
    assert {after[lane[-1]] for lane in lanes} == {-1}


@pytest.mark.parametrize("seed", SEEDS)
def test_an_estimate_is_no_longer_than_what_the_swap_leads_to(seed):
    """And each swap that is offered keeps the order complete and within memory."""
    task, costs, search, lanes = case(seed)
    end, order = search.heads(lanes)
    length = max(end)
    moves = search._moves(lanes, end, *search.tails(lanes, order), length)
    for price, worker, at in moves:
        swapped = [list(lane) for lane in lanes]
        swapped[worker][at:at + 2] = swapped[worker][at:at + 2][::-1]
        check(_schedule(task, swapped), max_peak=np.array(task.cap), costs=costs)
        assert price <= max(search.heads(swapped)[0]) * (1 + 1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_improving_returns_what_it_says_and_never_loses(seed):
    task, costs, search, lanes = case(seed)
    start, before = max(search.heads(lanes)[0]), [list(lane) for lane in lanes]
    length, better = search.improve(lanes, 40, 0.0)
    assert lanes == before, "what was given stays"
    assert length <= start and length == pytest.approx(max(search.heads(better)[0]))
    assert sorted(sum(better, [])) == sorted(sum(lanes, []))
    check(_schedule(task, better), max_peak=np.array(task.cap), costs=costs)
    assert search.improve(lanes, 40, 0.0) == (length, better), "the same every time"


def test_it_stops_at_the_bound():
    task, _, search, lanes = case(1)
    length, same = search.improve(lanes, 100, float("inf"))
    assert same == lanes and length == pytest.approx(max(search.heads(lanes)[0]))


def test_splitting_takes_a_backward_apart_where_it_stands():
    schedule = _split(build("1f1b", num_workers=2, num_microbatches=2))
    assert schedule.to_text() == "0F0,0F1,0I0,0W0,0I1,0W1\n1F0,1I0,1W0,1F1,1I1,1W1\n"
    assert _split(schedule) == schedule, "nothing is left to split"
