"""The space of configurations against every tuple of numbers, and paths that no order may beat against simulations."""
import itertools
import random

import numpy as np
import pytest

from pipeengine.errors import InputError, ScheduleError
from pipeengine.exploration.paths import any_order
from pipeengine.exploration.space import ONE_STAGE, SCHEDULES, TWO_STAGES, Point, Space, divisors
from pipeengine.exploration.training_state import OPTIMIZERS, state_factor, update_bytes
from pipeengine.schedules import B
from pipeengine.simulation import Costs, simulate
from pipeengine.synthesis import build


@pytest.mark.parametrize("devices, rows", [(1, 1), (1, 6), (4, 4), (6, 12), (8, 3), (12, 18)])
def test_every_configuration_is_a_point_once(devices, rows):
    """All devices are used, all rows are trained, and nothing that can be chosen is left out."""
    space = Space(recompute=("none",))
    points = list(space.points(devices, rows))
    assert len(points) == len(set(points))
    for point in points:
        assert point.replicas * point.workers == devices
        assert point.replicas * point.num_microbatches * point.rows == rows
        assert point.num_stages == point.workers * point.stages_per_worker
        assert point.shard is None or point.replicas > 1, "one replica has nobody to share with"
    sizes = {(point.replicas, point.workers, point.rows) for point in points}
    assert sizes == {(replicas, devices // replicas, each)
                     for replicas, each in itertools.product(range(1, devices + 1), range(1, rows + 1))
                     if devices % replicas == 0 and rows % replicas == 0 and rows // replicas % each == 0}
    for point in points:
        if point.workers > 1:
            assert point.schedule not in (TWO_STAGES if point.stages_per_worker == 1 else ONE_STAGE)


def test_what_is_asked_for_is_all_there_is():
    space = Space(replicas=(2,), stages=(4,), rows=(2,), schedule=("1f1b", "zb-h1"), recompute=("none", "blocks"),
                  shard=("optimizer",))
    points = list(space.points(8, 16))
    assert points and all(point.replicas == 2 and point.num_stages == 4 and point.rows == 2 for point in points)
    assert {(point.schedule, point.recompute) for point in points} == set(itertools.product(
        ("1f1b", "zb-h1"), ("none", "blocks")))
    assert not list(Space(rows=(3,)).points(8, 16)), "3 rows do not divide the share of any replica"
    assert str(points[0]).startswith("2 x 4 workers, 4 micro-batches of 2 rows, 1f1b")


@pytest.mark.parametrize("wrong, told", (
    (dict(schedule=("2f2b",)), "schedule '2f2b'"), (dict(rows=(0,)), "rows is 0"), (dict(stages=(True,)), "stages is"),
    (dict(shard=("gradients",)), "'gradients' is none of"), (dict(replicas=(3,)), "no configuration uses 8 devices")))
def test_what_is_in_no_dimension_is_refused(wrong, told):
    with pytest.raises(InputError, match=told):
        Space(**wrong).validate(8, 16)
    Space().validate(8, 16)


def test_points_of_equal_numbers_are_equal_and_sorted_by_them():
    first, second = Point(1, 2, 1, 4, 8, "1f1b", "none", None, "stages"), Point(1, 2, 1, 4, 8, "bfs", "none", None, "x")
    assert first < second and first == Point(1, 2, 1, 4, 8, "1f1b", "none", None, "stages")


def test_divisors_divide():
    for number in range(1, 200):
        found = divisors(number)
        assert found == tuple(sorted(found)) and set(found) == {n for n in range(1, 201) if number % n == 0}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_sharing_state_takes_none_of_the_weights(optimizer):
    """State that is dealt out goes to nothing with many replicas; the weights themselves stay on each."""
    whole = state_factor(optimizer)
    shared = [state_factor(optimizer, count, "optimizer") for count in (1, 2, 4, 1_000_000)]
    assert shared[0] == whole >= 1.0 and shared == sorted(shared, reverse=True)
    assert shared[-1] == pytest.approx(1.0, abs=1e-4) and state_factor(optimizer, 4) == whole
    assert update_bytes(optimizer, 4, "optimizer") == pytest.approx(update_bytes(optimizer) / 4)
    assert update_bytes(optimizer) > 2 * whole


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(InputError, match="optimizer 'sdg' is none of"):
        state_factor("sdg")


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_simulated_step_is_shorter_than_a_path(name):
    """For costs drawn at random, in whole seconds, which any order must pass on its way; and the bound is of use."""
    best = 0.0
    for seed in range(12):
        draw = random.Random(seed)
        workers, count = draw.randint(2, 4), draw.choice((4, 6, 8, 12))
        try:
            schedule = build(name, num_workers=workers, num_microbatches=count)
        except ScheduleError:
            continue
        topology = schedule.topology
        f, i, w = ([draw.randint(1, 9) for _ in range(topology.num_stages)] for _ in range(3))
        hop = draw.choice((0, 1, 3))
        owner = topology.worker_of
        hops = np.array([hop if a != b else 0 for a, b in zip(owner, owner[1:])] + [0], float)
        whole = any((lane.op == B).any() for lane in schedule.lanes)
        still = np.zeros(topology.num_workers)
        step = simulate(schedule, Costs(f, i, w, hop=hop)).makespan
        stage = np.zeros((topology.num_stages, 7))
        stage[:, 0], stage[:, 1], stage[:, 2] = f, i, w
        bounds = [float((path.counts * stage).sum()) + path.fixed
                  for path in any_order(topology, count, hops, still, still, whole)]
        assert max(bounds) <= step + 1e-9, (seed, bounds, step)
        best = max(best, max(bounds) / step)
    assert best > 0.6, "a bound of nothing would hold too"
