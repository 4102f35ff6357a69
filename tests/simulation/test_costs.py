"""Costs, where the seconds of a step go, and its end: laws over random costs, and words for what cannot be."""
import random
from dataclasses import replace

import numpy as np
import pytest

from pipeengine.errors import ScheduleError
from pipeengine.schedules import LETTERS, Edge, Schedule, Topology
from pipeengine.simulation import OPS, Costs, R, Timeline, breakdown, peak_activations, simulate
from pipeengine.simulation.simulator import _reductions
from pipeengine.synthesis import build


def drawn(seed, count):
    draw = random.Random(seed)
    return Costs(*([draw.uniform(0.3, 2) for _ in range(count)] for _ in range(3)), hop=draw.choice((0, 0.1, 0.6)),
                 activation=[draw.uniform(1, 5) for _ in range(count)])


# -- costs ------------------------------------------------------------------------------------------------------------


def test_a_backward_is_its_halves_unless_it_is_given():
    assert Costs([1], [2], [3]).backward == (5,)
    assert Costs([1], [2], [3], backward=[4]).backward == (4,), "a fused one may be faster"
    assert Costs([1], backward=[4]) == Costs([1], [2], [2], [4])
    assert Costs([1], input_grad=[2]).backward == (2,) and Costs([1]).backward == (0,)


def test_one_number_stands_for_every_stage():
    costs = Costs([1, 2, 3], backward=4, activation=7, exchange=0.5)
    assert costs.backward == (4,) * 3 and costs.activation == (7,) * 3 and costs.exchange == (0.5,) * 3
    assert Costs(np.array([1.0, 2.0]), backward=np.array([2.0, 2.0])).input_grad == (1.0, 1.0)
    assert Costs(2.0, backward=1.0).forward == (2.0,), "one stage"


@pytest.mark.parametrize("wrong, message", [
    (dict(forward=[1, -1]), "forward is -1 to 1; times and sizes are finite and not negative"),
    (dict(forward=[1, float("inf")]), "forward is 1 to inf"),
    (dict(forward=[1, 1], backward=[1]), "backward has 1 entries for 2 stages; give one per stage"),
    (dict(forward=[1, 1], activation=[1, 2, 3]), "activation has 3 entries for 2 stages"),
    (dict(forward=[1], optimizer=[-2]), "optimizer is -2 to -2"),
    (dict(forward=[1], hop=-1), "hop is -1 seconds"),
    (dict(forward=[1], hop=float("inf")), "a hop takes 0 or more"),
    (dict(forward=[1], bandwidth=0), "bandwidth 0 bytes per second; a hop takes 0 or more, a bandwidth is over 0"),
    (dict(forward=[1], edge_bytes={(0, 1): -8.0}), "edge_bytes is -8 to -8")])
def test_what_cannot_be_is_refused_by_name_and_number(wrong, message):
    with pytest.raises(ScheduleError, match=message):
        Costs(**wrong)


def test_a_message_takes_a_hop_and_its_bytes():
    costs = Costs([1] * 3, hop=0.5, bandwidth=4.0, edge_bytes={(0, 1): 8.0})
    assert [costs.latency(Edge(*edge)) for edge in ((0, 1), (1, 2), (0, 2))] == [2.5, 0.5, 0.5]
    assert Costs([1] * 2, hop=0.5, edge_bytes={(0, 1): 8.0}).latency(Edge(0, 1)) == 0.5, "infinitely fast"


@pytest.mark.parametrize("topology", [Topology.linear(3), Topology.v(2), Topology.looped(2, 3),
                                      Topology.bidirectional(2)])
def test_uniform_workers_work_alike(topology):
    costs = Costs.uniform(topology, forward=6.0, input_grad=3.0, weight_grad=12.0, weight_activation=0.25)
    for name, whole in (("forward", 6.0), ("input_grad", 3.0), ("weight_grad", 12.0), ("backward", 15.0)):
        worked = np.bincount(topology.worker_of, getattr(costs, name))
        assert worked == pytest.approx([whole * topology.num_routes] * topology.num_workers), name
    assert np.array(costs.weight_activation) == pytest.approx(np.array(costs.activation) / 4)


@pytest.mark.parametrize("seed", range(10))
def test_durations_are_looked_up(seed):
    costs, draw = drawn(seed, 4), np.random.default_rng(seed)
    op, stage = draw.integers(0, 4, 30), draw.integers(0, 4, 30)
    by_letter = {"F": costs.forward, "B": costs.backward, "I": costs.input_grad, "W": costs.weight_grad}
    assert costs.duration(op, stage).tolist() == [by_letter[LETTERS[o]][s] for o, s in zip(op, stage)]


@pytest.mark.parametrize("seed", range(10))
def test_recomputing_pays_a_forward_for_what_it_does_not_keep(seed):
    """Stage by stage; nothing happens to the others, and never is less kept than nothing."""
    costs = drawn(seed, 4)
    again = costs.recomputing([1, 3], kept=2.0)
    for stage in range(4):
        if stage in (1, 3):
            assert again.backward[stage] == costs.backward[stage] + costs.forward[stage]
            assert again.input_grad[stage] == costs.input_grad[stage] + costs.forward[stage]
            assert again.activation[stage] + again.transient[stage] == pytest.approx(costs.activation[stage])
            assert again.activation[stage] == min(2.0, costs.activation[stage])
        else:
            assert (again.backward[stage], again.activation[stage], again.transient[stage]) == (
                costs.backward[stage], costs.activation[stage], 0.0)
        assert (again.forward, again.weight_grad) == (costs.forward, costs.weight_grad)
    assert costs.recomputing([]) == replace(costs, transient=(0.0,) * 4)
    schedule = build("1f1b", num_workers=4, num_microbatches=6)
    assert (peak_activations(schedule, again) <= peak_activations(schedule, costs) + 1e-9).all()
    assert simulate(schedule, again).makespan >= simulate(schedule, costs).makespan


# -- where the seconds go ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1", "interleaved-1f1b", "zb-v", "dualpipe-v"])
@pytest.mark.parametrize("seed", range(4))
def test_the_parts_of_a_makespan_add_up(name, seed):
    schedule = build(name, num_workers=3, num_microbatches=7)
    costs = replace(drawn(seed, schedule.topology.num_stages), exchange=None, optimizer=None)
    parts = breakdown(schedule, costs)
    whole = parts.ideal + parts.fill_drain + parts.imbalance + parts.communication
    assert whole == pytest.approx(simulate(schedule, costs).makespan)
    assert parts.fill_drain >= -1e-9 and parts.communication >= -1e-9
    assert parts.ideal == pytest.approx(simulate(schedule, costs).busy.mean())


def test_equal_workers_with_free_messages_only_fill_and_drain():
    parts = breakdown(build("gpipe", num_workers=4, num_microbatches=8))
    assert (parts.ideal, parts.fill_drain, parts.imbalance, parts.communication) == pytest.approx((24, 9, 0, 0))
    with_end = Costs([1] * 4, [1] * 4, [1] * 4, exchange=[5] * 4, optimizer=[7] * 4)
    assert breakdown(build("gpipe", num_workers=4, num_microbatches=8), with_end) == parts, "the end is no part of it"


# -- the end of a step ------------------------------------------------------------------------------------------------


def timeline_of(costs, name="1f1b", p=2, m=2):
    return simulate(build(name, num_workers=p, num_microbatches=m), costs)


def of(timeline, letter):
    """(worker, stage, start, end) of one letter."""
    mine = timeline.op == OPS.index(letter)
    return list(zip(*(column[mine].tolist() for column in (timeline.worker, timeline.stage, timeline.start,
                                                             timeline.end))))


def test_sums_among_replicas_run_while_the_worker_goes_on_and_end_before_the_update():
    """GPipe over two workers: worker 1 is through at 4, worker 0 at 6."""
    costs = Costs([1.0, 1.0], backward=[1.0, 1.0], reduce=[0.5, 3.0], optimizer=[0.25, 0.25])
    timeline = timeline_of(costs, "gpipe")
    assert of(timeline, "B")[-1][3] < timeline.makespan
    ends = {stage: end for _, stage, _, end in sorted(of(timeline, "B"), key=lambda entry: entry[3])}
    assert of(timeline, "R") == [(0, 0, ends[0], ends[0] + 0.5), (1, 1, ends[1], ends[1] + 3.0)]
    assert of(timeline, "U") == [(0, -1, ends[0] + 0.5, ends[0] + 0.75), (1, -1, ends[1] + 3.0, ends[1] + 3.25)]
    assert timeline.busy.tolist() == [4.25, 4.25], "a sum keeps no worker busy"


def test_two_stages_of_a_worker_are_summed_one_after_the_other():
    """The V's worker 0 is through with its last stage first, whose sum is long: that of its first one waits."""
    schedule = build("zb-v", num_workers=2, num_microbatches=3)
    costs = Costs([1.0] * 4, [1.0] * 4, [1.0] * 4, reduce=[1.0, 1.0, 1.0, 20.0])
    sums = [entry for entry in of(simulate(schedule, costs), "R") if entry[0] == 0]
    assert [stage for _, stage, *_ in sums] == [3, 0]
    assert sums[0][3] - sums[0][2] == 20.0 and sums[1][2] == sums[0][3]


@pytest.mark.parametrize("seed", range(8))
def test_sums_never_overlap_on_a_worker_and_start_after_their_stage(seed):
    schedule = build("interleaved-1f1b", num_workers=3, num_microbatches=5, stages_per_worker=3)
    costs, draw = drawn(seed, 9), random.Random(seed)
    timeline, seconds = simulate(schedule, costs), [draw.choice((0.0, 0.5, 4.0)) for _ in range(9)]
    found = list(_reductions(timeline, seconds))
    assert sorted(stage for _, stage, *_ in found) == [stage for stage in range(9) if seconds[stage]]
    for worker in range(3):
        own = sorted((begin, end, stage) for at, stage, begin, end in found if at == worker)
        assert all(one[1] <= two[0] for one, two in zip(own, own[1:]))
        for begin, end, stage in own:
            assert end - begin == pytest.approx(seconds[stage])
            assert begin >= timeline.end[timeline.stage == stage].max()
    assert list(_reductions(timeline, ())) == []


def test_workers_without_shared_gradients_do_not_wait_for_those_with_some():
    costs = Costs([1.0] * 3, backward=[1.0] * 3, exchange=[1.0, 0.0, 1.0])
    timeline = timeline_of(costs, p=3, m=1)
    assert of(timeline, "X") == [(0, -1, 6.0, 7.0), (2, -1, 6.0, 7.0)]
    assert timeline.last.tolist() == [7.0, 5.0, 7.0]


def test_an_order_that_stops_says_how_far_it_got():
    """Worker 1 wants micro-batch 1 first, worker 0 its gradient of micro-batch 0 before it sends that."""
    circle = Schedule.from_text("0F0,0B0,0F1,0B1\n1F1,1F0,1B1,1B0\n", name="circle")
    with pytest.raises(ScheduleError, match=r"schedule circle stops after 1 of 8 actions; check\(\) shows the cycle"):
        simulate(circle)


# -- timelines from elsewhere -----------------------------------------------------------------------------------------


def test_a_measured_timeline_counts_what_it_sees():
    """A message and a sum between two actions: the worker computes two of five seconds."""
    timeline = Timeline.from_columns([1, 1, 1, 1], ["F", "SA", "R", "B"], [1] * 4, [2] * 4, [1, 2, 2, 5], [2, 3, 5, 6])
    assert (timeline.num_workers, timeline.num_microbatches) == (2, 3)
    assert timeline.makespan == 5 and timeline.busy.tolist() == [0, 2]
    assert timeline.idle_share.tolist() == [1.0, pytest.approx(0.6)]
    assert (timeline.first.tolist(), timeline.last.tolist()) == ([0, 1], [0, 6])
    assert timeline.computes.tolist() == [True, False, False, True] and timeline.op[2] == R
    again = Timeline.from_columns(timeline.worker, timeline.op, timeline.stage, timeline.microbatch, timeline.start,
                                  timeline.end, num_workers=4, peak_bytes=[1, 2, 3, 4])
    assert again.num_workers == 4 and again.peak_bytes == (1, 2, 3, 4) and again.busy.tolist() == [0, 2, 0, 0]


def test_an_empty_timeline_is_one_too():
    empty = Timeline.from_columns([], [], [], [], [], [])
    assert (empty.makespan, empty.span, empty.num_workers) == (0.0, 0.0, 0)
    assert Timeline.from_json(empty.to_json()).to_dict() == empty.to_dict() and "0 entries" in repr(empty)
    assert Timeline.from_columns([], [], [], [], [], [], num_workers=2).idle_share.tolist() == [0, 0]


def test_columns_that_do_not_fit_are_refused():
    with pytest.raises(ScheduleError, match=r"columns of \[2, 1, 1, 1, 1, 1\] entries"):
        Timeline.from_columns([0, 1], ["F"], [0], [0], [0.0], [1.0])
    with pytest.raises(ScheduleError, match="this is no timeline: end, op missing of 6 columns"):
        Timeline.from_dict(dict(worker=[], stage=[], microbatch=[], start=[]))
