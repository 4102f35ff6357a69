"""The parts of the bound: one worker alone against all sets of jobs, heads and tails against every order."""
import random
from itertools import combinations

import pytest

from pipeengine.schedules import Topology
from pipeengine.simulation import Costs
from pipeengine.synthesis.bound import _alone, _earliest, _following, _forced, lower_bound
from pipeengine.synthesis.problem import pose_problem


def jobs_of(seed):
    draw = random.Random(seed)
    return [(draw.randint(0, 9) / 2, draw.randint(0, 6) / 2, draw.randint(0, 9) / 2) for _ in range(draw.randint(1, 7))]


@pytest.mark.parametrize("seed", range(60))
def test_one_worker_alone_takes_what_its_worst_set_of_jobs_takes(seed):
    """With interruptions the least end is the largest (first head + all seconds + last tail) over sets of jobs."""
    jobs = jobs_of(seed)
    sets = [chosen for count in range(1, len(jobs) + 1) for chosen in combinations(jobs, count)]
    worst = max(min(head for head, *_ in chosen) + sum(seconds for _, seconds, _ in chosen)
                + min(tail for *_, tail in chosen) for chosen in sets)
    assert _alone(jobs) == pytest.approx(worst)


def test_one_worker_alone_interrupts_for_the_longer_tail():
    """Two seconds of a job without a tail, one second of one with three, the rest of the first::

        0     1     2     3     4     5
        long  long  urgent.long
                          tail--tail--tail-
    """
    assert _alone([(0.0, 3.0, 0.0), (2.0, 1.0, 3.0)]) == 6.0
    assert _alone([(0.0, 3.0, 0.0), (2.0, 1.0, 0.0)]) == 4.0
    assert _alone([(5.0, 1.0, 0.0)]) == 6.0, "nobody works before there is work"


def random_problem(seed, cap=None):
    draw = random.Random(seed)
    p, m = draw.randint(1, 4), draw.randint(1, 6)
    costs = Costs(*([draw.uniform(0.3, 1.5) for _ in range(p)] for _ in range(3)), hop=draw.choice((0.0, 0.2)),
                  activation=[1] * p, weight_activation=[draw.choice((0.0, 0.5, 1.0))] * p)
    return pose_problem(Topology.linear(p), m, costs, cap, "makespan"), costs


@pytest.mark.parametrize("seed", range(20))
def test_heads_and_tails_grow_the_way_micro_batches_go(seed):
    """The k-th starts no earlier than the one before, needs no longer after it, and nothing is below zero."""
    task, _ = random_problem(seed, cap=1 + seed % 3)
    for heads, tails in zip(_earliest(task), _following(task)):
        for head, tail in zip(heads, tails):
            assert head == sorted(head) and min(head) >= 0
            assert tail == sorted(tail, reverse=True) and min(tail) >= 0
    forward, inputs, weights = _earliest(task)
    for stage in range(task.num_stages):
        for k in range(task.microbatches):
            assert forward[stage][k] + task.seconds[0][stage] <= inputs[stage][k] + 1e-9
            assert inputs[stage][k] + task.seconds[1][stage] == weights[stage][k]


@pytest.mark.parametrize("seed", range(20))
def test_memory_makes_a_bound_larger_never_smaller(seed):
    task, costs = random_problem(seed)
    bounds = [lower_bound(task.topology, task.microbatches, costs, cap) for cap in (1, 1.5, 2, 3, 100)]
    assert bounds == sorted(bounds, reverse=True)
    work = max(task.microbatches * sum(row[stage] for row in task.seconds) for stage in range(task.num_stages))
    assert bounds[-1] >= work * (1 - 1e-9), "no worker is faster than its own work"


def test_how_many_weight_gradients_memory_forces():
    """Room for two micro-batches, half of each kept between I and W."""
    costs = Costs([1.0], [1.0], [1.0], activation=[1], weight_activation=[0.5])
    task = pose_problem(Topology.linear(1), 8, costs, 2, "makespan")
    assert _forced(task, 0, 2, 0) == 0, "two fit"
    assert _forced(task, 0, 3, 1) == 1, "a third one does not until half of the first goes"
    assert _forced(task, 0, 4, 4) == 0
    nothing_kept = pose_problem(Topology.linear(1), 8, Costs([1.0], [1.0], [1.0], activation=[1],
                                                             weight_activation=[0.0]), 2, "makespan")
    assert _forced(nothing_kept, 0, 3, 0) == 4, "more than there are: weight gradients free nothing"
    several = pose_problem(Topology.looped(1, 2), 8, Costs.uniform(Topology.looped(1, 2)), 1, "makespan")
    assert _forced(several, 0, 8, 0) == 0, "the room of several stages is not split here"


def test_one_stage_and_one_micro_batch_is_its_own_bound():
    assert lower_bound(Topology.linear(1), 1, Costs([1.0], [2.0], [0.5])) == 3.5
    assert lower_bound(Topology.linear(1), 5, Costs([1.0], [2.0], [0.5])) == 17.5
    two = Costs([1.0, 1.0], [1.0, 1.0], [1.0, 1.0], hop=0.25)
    assert lower_bound(Topology.linear(2), 1, two) == 1 + 0.25 + 1 + 1 + 0.25 + 1 + 1
