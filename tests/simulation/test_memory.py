"""What orders keep: against a walk over the actions, and the planner's model that fits it."""
import pytest

from pipeengine.errors import ScheduleError
from pipeengine.schedules import Schedule, Topology
from pipeengine.simulation.costs import Costs
from pipeengine.simulation.memory import memory_model_of, microbatches_in_flight, peak_activations
from pipeengine.synthesis.registry import SCHEDULES, build

SIZES = [(p, m) for p in (1, 2, 3, 4, 6) for m in (1, 2, 3, 5, 8, 12, 25)]


def schedules(name):
    """The schedule in all sizes that it is made for."""
    for p, m in SIZES if name != "auto" else SIZES[:18]:
        try:
            yield build(name, num_workers=p, num_microbatches=m)
        except ScheduleError:
            continue


def walked(schedule, worker):
    """Sets of what each stage of ``worker`` holds before and after each action."""
    holds = {stage: set() for stage in schedule.topology.stages_of(worker)}
    for op, stage, microbatch in schedule.actions(worker):
        if op == "F":
            holds[stage].add(microbatch)
        yield holds
        if op in "BW":
            holds[stage].remove(microbatch)


@pytest.mark.parametrize("name", SCHEDULES)
def test_counts_are_those_of_a_walk(name):
    for schedule in schedules(name):
        topology = schedule.topology
        counts, share = microbatches_in_flight(schedule), topology.shares()
        peaks = peak_activations(schedule)
        for worker in range(topology.num_workers):
            most, whole = dict.fromkeys(topology.stages_of(worker), 0), 0.0
            for holds in walked(schedule, worker):
                most = {stage: max(most[stage], len(held)) for stage, held in holds.items()}
                whole = max(whole, sum(share[stage] * len(held) for stage, held in holds.items()))
            assert {stage: counts[stage] for stage in most} == most
            assert peaks[worker] == pytest.approx(whole)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_planners_model_is_enough_for_the_fullest_worker_and_no_larger_than_needed(name):
    for schedule in schedules(name):
        topology, model = schedule.topology, memory_model_of(schedule)
        allowed = {"gpipe": [], "1f1b": []}
        for worker in range(topology.num_workers):
            own, count = topology.stages_of(worker), schedule.num_microbatches
            allowed["gpipe"].append(count * len(own))
            allowed["1f1b"].append(sum(max(1, min(count, topology.num_stages - stage)) for stage in own))
        most = max(sum(map(len, holds.values())) for worker in range(topology.num_workers)
                   for holds in walked(schedule, worker))
        assert most <= max(allowed[model.schedule])
        assert model.schedule == "1f1b" or most > max(allowed["1f1b"])
        assert all(held <= allowed["gpipe"][topology.worker_of[stage]]
                   for stage, held in enumerate(microbatches_in_flight(schedule)))


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "auto"])
def test_only_orders_that_run_far_ahead_hold_as_much_as_gpipe(name):
    schedule = build(name, num_workers=4, num_microbatches=24)
    assert memory_model_of(schedule).schedule == ("gpipe" if name in ("gpipe", "bfs", "zb-h2") else "1f1b")


def test_an_order_of_ones_own_is_asked_not_its_name():
    """Three forwards ahead on the last of two workers is more than 1F1B's two on the first."""
    ahead = Schedule.from_text("0F0,0F1,0F2,0B0,0B1,0B2\n1F0,1F1,1F2,1B0,1B1,1B2\n", name="1f1b")
    assert microbatches_in_flight(ahead) == (3, 3) and memory_model_of(ahead).schedule == "gpipe"
    small = Schedule.from_text("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n", name="gpipe")
    assert microbatches_in_flight(small) == (2, 1) and memory_model_of(small).schedule == "1f1b"


def test_weight_gradients_keep_their_part_and_backward_needs_its_own():
    """10 bytes per micro-batch, 4 of which wait for W; 3 more while a backward runs."""
    schedule = Schedule.from_text("0F0,0I0,0F1,0I1,0W0,0W1\n")
    costs = Costs([1], [1], [1], activation=[10], weight_activation=[4], transient=[3])
    assert peak_activations(schedule, costs).tolist() == [4 + 10 + 3]
    assert microbatches_in_flight(schedule) == (2,)
    fused = Schedule.from_text("0F0,0B0,0F1,0B1\n")
    assert peak_activations(fused, costs).tolist() == [13]


def test_a_worker_with_nothing_to_do_keeps_nothing():
    idle = Schedule.from_text("0F0,0B0\n1F0,1B0\n", topology=Topology((0, 1, 1)))
    assert microbatches_in_flight(idle) == (1, 1, 0)
