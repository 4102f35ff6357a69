"""The simulator against published closed forms and against a slow, obvious one."""
import random

import pytest

from pipeengine.errors import ScheduleError
from pipeengine.schedules.schedule import Edge
from pipeengine.simulation.costs import Costs
from pipeengine.simulation.memory import peak_activations
from pipeengine.simulation.simulator import simulate
from pipeengine.simulation.timeline import Timeline
from pipeengine.synthesis.registry import SCHEDULES, build


def obvious(schedule, costs, edges):
    """Ends of all actions by repeated sweeps over the lanes: slow, and shares no code with the solver."""
    owner, end, free = schedule.topology.worker_of, {}, [0.0] * schedule.topology.num_workers
    lanes = [schedule.actions(w)[::-1] for w in range(len(free))]
    times = {"F": costs.forward, "B": costs.backward, "I": costs.input_grad, "W": costs.weight_grad}

    def needs(op, s, m):
        if op == "F":
            return [(("F", e.source, m), e) for e in edges if e.target == s and e.activation and visited(e, m)]
        if op == "W":
            return [(("D", s, m), None)]
        return [(("F", s, m), None)] + [(("D", e.target, m), e) for e in edges
                                        if e.source == s and e.gradient and visited(e, m)]

    visits = schedule.topology.visits(schedule.num_microbatches)

    def visited(edge, m):
        return visits[edge.source, m] and visits[edge.target, m]

    paired = [list(pair)[::-1] for pair in schedule.pairs] or [[False] * len(lane) for lane in lanes]
    while any(lanes):
        moved = False
        for w, lane in enumerate(lanes):
            while lane and all(key in end for part in block(lane, paired[w]) for key, _ in needs(*part)):
                parts = block(lane, paired[w])
                ready = [free[w]] + [end[key] + (costs.latency(e) if e and owner[e.source] != owner[e.target] else 0)
                                     for part in parts for key, e in needs(*part)]
                free[w] = max(ready) + sum(times[op][s] for op, s, _ in parts)
                for op, s, m in parts:
                    lane.pop(), paired[w].pop()
                    end["D" if op in "BI" else op, s, m] = free[w]
                moved = True
        assert moved, "stuck"
    return end


def block(lane, paired):
    """The next action, or the next two where they are one block."""
    return lane[:-3:-1] if paired[-1] else lane[-1:]


def random_costs(schedule, seed):
    draw, stages = random.Random(seed), schedule.topology.num_stages
    return Costs(*([draw.uniform(0.5, 2) for _ in range(stages)] for _ in range(3)), hop=draw.choice([0, 0.1, 0.7]))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", SCHEDULES)
def test_times_are_those_of_the_obvious_simulator(name, seed):
    schedule = build(name, num_workers=4, num_microbatches=8)
    costs, edges = random_costs(schedule, seed), list(schedule.topology.chain())
    if schedule.topology.num_routes == 1 and schedule.topology.num_stages >= 4 and seed % 2:
        edges += [Edge(0, 3), Edge(1, 3, gradient=False), Edge(0, 2, activation=False)]
    timeline = simulate(schedule, costs, edges)
    truth = obvious(schedule, costs, edges)
    letters = ["F", "D", "D", "W"]
    for op, s, m, end in zip(timeline.op, timeline.stage, timeline.microbatch, timeline.end[schedule.visible]):
        assert end == pytest.approx(truth[letters[op], s, m], rel=1e-12)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_closed_form_of_the_linear_schedules(name):
    for p in range(1, 9):
        for m in (1, 3, 8):
            schedule = build(name, num_workers=p, num_microbatches=m)
            timeline = simulate(schedule, Costs([1.0] * p, [1.5] * p, [0.5] * p))
            assert timeline.makespan == pytest.approx((m + p - 1) * 3.0)
            peaks = [m] * p if name == "gpipe" else [min(m, p - r) for r in range(p)]
            assert peak_activations(schedule).tolist() == peaks


def test_latency_of_one_f_one_b_is_paid_per_microbatch():
    schedule = build("1f1b", num_workers=4, num_microbatches=8)
    timeline = simulate(schedule, Costs.uniform(schedule.topology, hop=0.25))
    assert timeline.makespan == pytest.approx((8 + 4 - 1) * 3 + 2 * 0.25 * ((4 - 1) * 8 / 4 + 4 - 2))


def test_end_of_step_waits_for_shared_gradients():
    schedule = build("gpipe", num_workers=2, num_microbatches=1)
    costs = Costs([1, 1], backward=[2, 2], exchange=[0.5, 0.5], optimizer=[0.25, 0.75])
    timeline = simulate(schedule, costs)
    assert timeline.last.tolist() == [6.75, 7.25]
    assert [t for t, w in zip(timeline.start, timeline.worker) if w == 1] == [1, 2, 6, 6.5]


def test_recomputation_costs_a_forward_and_saves_memory():
    schedule = build("gpipe", num_workers=2, num_microbatches=4)
    costs = Costs([1, 1], backward=[2, 2], activation=[10, 10])
    again = costs.recomputing([0], kept=1)
    assert again.backward == (3, 2)
    assert peak_activations(schedule, again).tolist() == [4 + 9, 40]


def test_timeline_goes_through_json_and_measures_idle():
    timeline = simulate(build("gpipe", num_workers=2, num_microbatches=2))
    again = Timeline.from_json(timeline.to_json())
    assert again.to_dict() == timeline.to_dict()
    assert again.busy.tolist() == [6, 6]
    assert again.idle_share.tolist() == pytest.approx([1 / 3, 1 / 3])
    assert again.span == 9 and again.makespan == 9


def test_costs_for_other_stages_are_refused():
    with pytest.raises(ScheduleError, match="costs are for 3 stages, schedule gpipe has 2"):
        simulate(build("gpipe", num_workers=2, num_microbatches=1), Costs([1] * 3, backward=[1] * 3))
