"""What is proved of an order before anything is cut: no cut, and no costs, go below it."""
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeengine.errors import ScheduleError
from pipeengine.exploration import point_search
from pipeengine.exploration.bottlenecks import bottlenecks, hard_weights, of_mixed
from pipeengine.exploration.judge import Scene, schedule_of
from pipeengine.exploration.point_search import Look, PointSearch
from pipeengine.exploration.row_costs import blend, chains
from pipeengine.exploration.space import ONE_STAGE, SCHEDULES
from pipeengine.simulation import Costs, simulate

sys.path.insert(0, str(Path(__file__).parent))
from exhaustive import best_cut  # noqa: E402
from test_truth import instance  # noqa: E402


def order(name):
    return name, 3, 7, 1 if name in ONE_STAGE else 2


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_costs_make_a_step_shorter_than_a_path(name):
    schedule, dice = schedule_of(*order(name)), np.random.default_rng(3)
    mixed = dice.uniform(0.5, 2, (schedule.topology.num_stages, 7))
    walks = [*bottlenecks(*order(name), (0.3, 0.3)), *of_mixed(schedule, mixed, 1)]
    for _ in range(10):
        held = dice.uniform(0.1, 3, (schedule.topology.num_stages, 3))
        costs = Costs(*(tuple(each) for each in (*held.T, held[:, 1] + held[:, 2])))
        makespan = simulate(schedule, costs).makespan
        assert max(float((walk.counts * held).sum()) for walk in walks) <= makespan * (1 + 1e-9)


def test_there_is_a_path_through_each_slow_worker():
    walks = bottlenecks("1f1b", 4, 8, 1, (0.33, 0.33))
    assert {int(walk.counts.sum(axis=1).argmax()) for walk in walks} == {0, 1, 2, 3}
    assert all(walk.counts.max() > 4 for walk in walks)


@pytest.mark.parametrize("name", ["1f1b", "zb-v", "interleaved-1f1b"])
def test_hard_weights_leave_no_stage_cheap(name):
    weights = hard_weights(*order(name), (0.33, 0.33), True)
    assert weights.sum() == pytest.approx(1.0)
    assert weights.min() >= 0


@pytest.mark.parametrize("seed", range(200, 204))
def test_no_cut_of_a_point_beats_what_is_told_before_cutting(seed, monkeypatch):
    graph, hardware, space, training = instance(seed)
    chain_for, dice = chains(lambda rows: blend({1: graph}, rows), 8), random.Random(seed)
    monkeypatch.setattr(point_search, "FEW_CUTS", 0)
    points = [point for point in space.points(hardware.num_devices, training.global_rows) if point.workers > 1]
    for point in dice.sample(points, min(10, len(points))):
        try:
            schedule = schedule_of(point.schedule, point.workers, point.num_microbatches, point.stages_per_worker)
        except ScheduleError:
            continue
        truth = best_cut(blend({1: graph}, point.rows), point, schedule, hardware, training)
        for cutoff in (1.05 * truth, 2 * truth):
            search = PointSearch(Scene(point, hardware, training), chain_for(point.rows, point.recompute), cutoff)
            verdict = search.run(dice.choice((Look.BOUND, Look.ORDER, Look.SEARCH)))
            assert min(verdict.bound, cutoff) <= truth * (1 + 1e-9), f"{point}: {verdict.bound} above {truth}"
