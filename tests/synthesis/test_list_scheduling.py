"""Greedy orders: whole, within memory, as long as they say; settings that memory blocks; the search over them."""
import random

import numpy as np
import pytest

from pipeengine.errors import ScheduleError
from pipeengine.program import check
from pipeengine.schedules import Topology
from pipeengine.simulation import Costs, simulate
from pipeengine.synthesis.auto import _schedule
from pipeengine.synthesis.list_scheduling import (
    InterleavedSchedule,
    WarmupSchedule,
    WarmupSearch,
    build_lanes,
    warmup_candidates,
)
from pipeengine.synthesis.problem import pose_problem


def posed(seed, stages_per_worker=1, objective="makespan"):
    """(problem, costs) of two to five workers with room for one to four micro-batches."""
    draw = random.Random(seed)
    p, m = draw.randint(2, 5), draw.randint(1, 9)
    topology = Topology.looped(p, stages_per_worker)
    count = topology.num_stages
    costs = Costs(*([draw.uniform(0.4, 1.6) for _ in range(count)] for _ in range(3)), hop=draw.choice((0.0, 0.1, 0.5)),
                  activation=[1 / stages_per_worker] * count,
                  weight_activation=[draw.choice((0.0, 0.5, 1.0)) / stages_per_worker] * count)
    return pose_problem(topology, m, costs, draw.uniform(1, 4), objective), costs


@pytest.mark.parametrize("seed", range(30))
def test_what_is_built_is_whole_fits_and_takes_what_it_says(seed):
    task, costs = posed(seed)
    for warmup in warmup_candidates(task):
        length = WarmupSchedule(task, warmup, [0.5] * task.num_workers).build()
        assert length is not None, "micro-batches that have room in order can always end"
        schedule = _schedule(task, build_lanes(task, warmup, [0.5] * task.num_workers))
        check(schedule, max_peak=np.array(task.cap), costs=costs)
        # Waiting on purpose is part of the greedy order; run as early as possible it can only be shorter.
        assert simulate(schedule, costs).makespan <= length * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_with_several_stages_too(seed):
    task, costs = posed(seed, stages_per_worker=2 + seed % 2)
    for flying in (1, task.num_workers, task.microbatches):
        for patience in (1e-4, 1.0):
            built = InterleavedSchedule(task, flying, patience)
            length = built.build()
            schedule = _schedule(task, built.lanes)
            check(schedule, max_peak=np.array(task.cap), costs=costs)
            assert simulate(schedule, costs).makespan <= length * (1 + 1e-9)


def test_one_in_flight_is_one_after_the_other():
    """A micro-batch enters when the one before has left, so nothing overlaps but weight gradients."""
    topology = Topology.looped(2, 2)
    costs = Costs([1.0] * 4, [1.0] * 4, [0.0] * 4, activation=[0.5] * 4)
    built = InterleavedSchedule(pose_problem(topology, 3, costs, 10, "makespan"), 1, 1.0)
    assert built.build() == 3 * (4 + 4)


def test_a_short_warm_up_is_one_f_one_b():
    """Two workers, as many forwards ahead as 1F1B has, W straight after I wherever there is a wait."""
    costs = Costs([1.0, 1.0], [1.0, 1.0], [1.0, 1.0], activation=[1, 1])
    task = pose_problem(Topology.linear(2), 3, costs, 2, "makespan")
    lanes = _schedule(task, build_lanes(task, [2, 1], [1e-4, 1e-4])).to_text().splitlines()
    assert lanes[0].startswith("0F0,0F1,0I0") and lanes[1].startswith("1F0,1I0,1F1")
    assert all(lane.count(letter) == 3 for lane in lanes for letter in "FIW")


@pytest.mark.parametrize("seed", range(10))
def test_candidates_leave_every_worker_one_forward_and_no_more_than_fit(seed):
    task, _ = posed(seed)
    seen = list(warmup_candidates(task))
    assert len(seen) == 4 + 8 + 2
    for warmup in seen:
        assert len(warmup) == task.num_workers
        assert all(1 <= count <= task.fits(worker) for worker, count in enumerate(warmup))


def test_a_search_remembers_and_stops_at_its_budget():
    task, _ = posed(4)
    search = WarmupSearch(task, budget=2)
    first = search.price([1] * task.num_workers, [1.0] * task.num_workers)
    assert search.price([1] * task.num_workers, [1.0] * task.num_workers) == first and search.left == 1
    search.price([2] * task.num_workers, [1.0] * task.num_workers)
    assert search.left == 0 and search.price([3] * task.num_workers, [1.0] * task.num_workers) == float("inf")
    assert len(search.known) == 2, "what was not built is not remembered"


@pytest.mark.parametrize("objective", ["makespan", "span"])
@pytest.mark.parametrize("seed", range(8))
def test_refining_never_makes_it_worse(seed, objective):
    task, _ = posed(seed, objective=objective)
    search = WarmupSearch(task, budget=400)
    for warmup in warmup_candidates(task):
        search.price(warmup, [1.0] * task.num_workers)
    prices = [search.known[key] for key in search.best(3)]
    assert prices == sorted(set(prices)) and prices[0] == min(search.known.values())
    before = dict(search.known)
    refined = search.refine(search.best(1)[0])
    assert search.known[refined] <= min(before.values())
    assert search.reached(search.known[refined]) == (objective == "makespan")
    assert not search.reached(search.known[refined] / 2)


def test_a_problem_says_what_fits_and_numbers_its_actions():
    topology = Topology.looped(2, 2)
    costs = Costs([1] * 4, backward=[1] * 4, activation=[1, 2, 3, 4], hop=0.5)
    task = pose_problem(topology, 5, costs, [9, 13], "span")
    assert task.hop == (0.0, 0.5, 0.5, 0.5) and task.kept == task.held
    numbers = {task.action(op, stage, k) for op in range(3) for stage in range(4) for k in range(5)}
    assert numbers == set(range(task.size)) == set(range(60))
    assert (task.fits(0), task.fits(1)) == (5, 5)
    one = pose_problem(Topology.linear(2), 5, Costs([1] * 2, backward=[1] * 2, activation=[2, 0]), [5, 1], "span")
    assert (one.fits(0), one.fits(1)) == (2, 5), "what keeps nothing always fits"
    wave = pose_problem(Topology.v(2), 5, Costs([1] * 4, backward=[1] * 4, hop=0.5), None, "span")
    assert wave.hop == (0.0, 0.5, 0.0, 0.5), "no message where the V turns"
    with pytest.raises(ScheduleError, match="objective 'speed' is none of 2 known; try makespan or span"):
        pose_problem(topology, 5, costs, None, "speed")
