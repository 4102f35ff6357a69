"""Sums among replicas are lines of a program: each stage's once, after its last action, hidden where they can be."""
from dataclasses import replace

import numpy as np
import pytest

from pipeengine.errors import ScheduleError
from pipeengine.program import Program, check, lower, with_reductions
from pipeengine.simulation import OPS, Costs, R, simulate
from pipeengine.synthesis import SCHEDULES, build

RUNNABLE = sorted(set(SCHEDULES) - {"dualpipe"})


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("workers, microbatches", [(2, 4), (4, 8)])
def test_every_stage_is_summed_once_after_its_last_action(name, workers, microbatches):
    program = with_reductions(lower(build(name, num_workers=workers, num_microbatches=microbatches), window=2))
    check(program)
    for worker in range(workers):
        actions = program.actions(worker)
        for stage in program.topology.stages_of(worker):
            lines = [i for i, action in enumerate(actions) if action.stage == stage and action.op in "FBIWR"]
            sums = [i for i in lines if actions[i].op == "R"]
            assert len(sums) == 1 and max(lines) == sums[0] and str(actions[sums[0]]) == f"{stage}R"
    again = Program.from_text(program.to_text(), topology=program.topology, edges=program.edges,
                              num_microbatches=microbatches)
    assert again.to_text() == program.to_text()
    check(again)


def test_the_messages_of_the_last_backward_go_before_the_sum():
    program = with_reductions(lower(build("1f1b", num_workers=2, num_microbatches=2)))
    assert program.to_text().splitlines()[1].endswith("1B1,1SG1@0,1R")


def _changed(program: Program, worker: int, order) -> Program:
    lane = type(program.lanes[worker])(*(column[order] for column in program.lanes[worker]))
    return replace(program, planned=None,
                   lanes=tuple(lane if w == worker else other for w, other in enumerate(program.lanes)))


def test_wrong_sums_are_refused():
    program = with_reductions(lower(build("1f1b", num_workers=2, num_microbatches=2)))
    order = np.arange(len(program.lanes[0].op))
    with pytest.raises(ScheduleError, match="0R comes before"):
        check(_changed(program, 0, np.roll(order, 1)))
    with pytest.raises(ScheduleError, match="1 reductions, of stages .1., for 2"):
        check(_changed(program, 0, order[:-1]))
    moved = _changed(program, 0, order)
    moved.lanes[0].stage[-1], moved.lanes[1].stage[-1] = 1, 0
    with pytest.raises(ScheduleError, match="belongs to worker"):
        check(moved)


def test_sums_hide_behind_the_others_cool_down():
    """Worker 3 of four is done first with 1F1B; only the first stage's sum lengthens the step."""
    schedule = build("1f1b", num_workers=4, num_microbatches=8)
    costs = Costs((1.0,) * 4, backward=(2.0,) * 4)
    alone, summed = simulate(schedule, costs), simulate(schedule, replace(costs, reduce=(1.5,) * 4))
    sums = [(int(w), float(s), float(e)) for w, op, s, e in
            zip(summed.worker, summed.op, summed.start, summed.end) if op == R]
    last = {w: float(alone.end[alone.worker == w].max()) for w in range(4)}
    assert sorted(sums) == [(w, last[w], last[w] + 1.5) for w in range(4)]
    assert summed.makespan == alone.makespan + 1.5
    exposed = summed.makespan - alone.makespan
    assert 1 - exposed / (4 * 1.5) >= 0.6
    assert np.array_equal(summed.busy, alone.busy) and OPS[R] == "R"


def test_sums_of_one_worker_take_turns_and_end_before_the_update():
    schedule = build("interleaved-1f1b", num_workers=2, num_microbatches=4, stages_per_worker=2)
    costs = Costs((1.0,) * 4, backward=(2.0,) * 4, reduce=(5.0,) * 4, optimizer=(1.0,) * 4)
    timeline = simulate(schedule, costs)
    for worker in range(2):
        mine = (timeline.worker == worker) & (timeline.op == R)
        starts, ends = np.sort(timeline.start[mine]), np.sort(timeline.end[mine])
        assert len(starts) == 2 and starts[1] >= ends[0]
        update = (timeline.worker == worker) & (timeline.op == OPS.index("U"))
        assert float(timeline.start[update][0]) >= ends[1]
