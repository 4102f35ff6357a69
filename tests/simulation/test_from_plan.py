"""A plan's figures become costs: seconds and bytes of stages, and what messages take of whom."""
import networkx as nx
import pytest

import partitioners
from pipeengine.errors import ScheduleError
from pipeengine.report.run import predict
from pipeengine.simulation.from_plan import costs_of, edges_of
from pipeengine.simulation.link_times import LinkTimes
from pipeengine.synthesis.registry import SCHEDULES, build

SLOW = LinkTimes(latency_seconds=0.25, send_overhead_seconds=0.125, bytes_per_second=16.0)


def plan_of(num_stages=3, **more):
    """``num_stages`` equal nodes in a chain: 1 s forward, 2 s backward, 8 bytes to the next."""
    graph = nx.DiGraph()
    for number in range(num_stages):
        graph.add_node(str(number), forward=1.0, backward=2.0, output_bytes=8, param_bytes=4, activation_bytes=5,
                       gradient=True, **more)
        if number:
            graph.add_edge(str(number - 1), str(number))
    return partitioners.partition(graph, num_stages)


def test_free_links_leave_the_stages_alone():
    costs = costs_of(plan_of(), LinkTimes.free())
    assert (costs.forward, costs.backward) == ((1.0,) * 3, (2.0,) * 3)
    assert costs.input_grad == costs.weight_grad == (1.0,) * 3, "halved where a schedule halves it"
    assert costs.activation == (5.0,) * 3 and costs.edge_bytes == {(0, 1): 8.0, (1, 2): 8.0}
    assert [costs.latency(edge) for edge in edges_of(plan_of())] == [0.0, 0.0]


def test_who_sends_spends_the_overhead():
    """The first two stages send activations in forward, the last two gradients in backward."""
    plan = plan_of()
    costs = costs_of(plan, SLOW)
    assert costs.forward == (1.125, 1.125, 1.0) and costs.backward == (2.0, 2.125, 2.125)
    assert [costs.latency(edge) for edge in edges_of(plan)] == [0.25 + 8 / 16] * 2


def test_own_seconds_of_weight_gradients_are_kept_apart():
    """The overhead of a gradient's message belongs to the half that makes it."""
    plan = plan_of(weight_grad=0.5, kept_bytes=3)
    costs = costs_of(plan, SLOW)
    assert costs.weight_grad == (0.5,) * 3 and costs.input_grad == (1.5, 1.625, 1.625)
    assert [i + w for i, w in zip(costs.input_grad, costs.weight_grad)] == list(costs.backward)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in ("auto", "dualpipe")])
def test_links_only_ever_lengthen_a_step(name):
    schedule = build(name, num_workers=2, num_microbatches=4)
    plan = plan_of(schedule.topology.num_stages)
    free = predict(plan, schedule, LinkTimes.free()).makespan
    times = [predict(plan, schedule, LinkTimes(latency, overhead, rate)).makespan
             for latency, overhead, rate in ((0.25, 0, None), (0.25, 0.125, None), (0.25, 0.125, 16.0))]
    assert free < times[0] < times[1] < times[2]


@pytest.mark.parametrize("wrong", [dict(latency_seconds=-1.0), dict(latency_seconds=float("inf")),
                                   dict(send_overhead_seconds=float("nan")), dict(bytes_per_second=0.0)])
def test_links_that_cannot_be_are_refused(wrong):
    with pytest.raises(ScheduleError, match="a message takes .* give finite seconds of 0 or more, and a rate over 0"):
        LinkTimes(**wrong)


def test_replicas_sum_their_gradients_after_the_last_backward():
    """2 (n - 1) / n of a stage's trained bytes go out, in 2 (n - 1) messages, once per step."""
    assert LinkTimes(1e-3, 1e-4, 1e3).sum_seconds(100.0, 4) == pytest.approx(6 * 1.1e-3 + 1.5 * 100 / 1e3)
    assert LinkTimes(1e-3, 1e-4, 1e3).sum_seconds(100.0, 1) == 0.0
    plan, schedule = plan_of(), build("1f1b", num_workers=3, num_microbatches=4)
    alone, together = predict(plan, schedule, SLOW), predict(plan, schedule, SLOW, num_replicas=2)
    sums = [row for row in together.to_dict()["op"] if row == "R"]
    assert len(sums) == 3 and together.makespan == pytest.approx(alone.makespan + SLOW.sum_seconds(4.0, 2))
