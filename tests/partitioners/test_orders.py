"""Orders and positions that the solvers begin with: each against what its definition says of a small graph."""
import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from test_partition_brute import graphs
from test_partition_ideals import down_sets
from test_partition_ideals import problem_of as made_problem

from partitioners import GraphError
from partitioners.plan.plan import deal
from partitioners.solvers.bounds import shared_work, simple_bound
from partitioners.solvers.coarse import crossing_seconds, crossing_tensors, merge_items, merge_runs, promising_positions
from partitioners.solvers.lattice import lattice
from partitioners.solvers.memory import held_bytes, item_bytes, memory_problem, with_memory
from partitioners.solvers.orders import candidate_orders, through
from partitioners.solvers.problem import reorder


def problem_of(graph, **options):
    """The problem of a graph, passing over those whose nodes may run nowhere."""
    try:
        return made_problem(graph, **options)
    except GraphError:
        assume(False)


cases = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@cases
@given(graph=graphs())
def test_every_order_is_topological_and_tried_once(graph):
    problem = problem_of(graph)
    orders = list(candidate_orders(problem))
    assert orders[0] == list(range(len(problem))), "the recorded order comes first"
    assert len({tuple(order) for order in orders}) == len(orders)
    for order in orders:
        place = {item: number for number, item in enumerate(order)}
        assert sorted(order) == list(range(len(problem)))
        assert all(place[u] < place[v] for u, v in problem.edges)


@cases
@given(graph=graphs())
def test_an_order_goes_through_the_ideals_that_it_must(graph):
    """Every chain of two ideals: the items of the first stand first, those of the second next."""
    problem = problem_of(graph)
    ideals = down_sets(problem)
    for small in ideals[:8]:
        for large in [ideal for ideal in ideals if small < ideal][:8]:
            order = through(problem, [small, large])
            assert set(order[:len(small)]) == small and set(order[:len(large)]) == large
            place = {item: number for number, item in enumerate(order)}
            assert all(place[u] < place[v] for u, v in problem.edges)


@cases
@given(graph=graphs())
def test_what_crosses_a_position_is_what_both_sides_hold(graph):
    problem = problem_of(graph)
    seconds, tensors = crossing_seconds(problem), crossing_tensors(problem)
    link = problem.levels[0].link_in
    assert len(seconds) == len(tensors) == len(problem) + 1
    for position in range(len(problem) + 1):
        nets = [net for net in problem.nets if min(net.pins) < position <= max(net.pins)]
        assert np.isclose(seconds[position], sum(net.seconds(link) for net in nets))
        assert tensors[position] == sum(min(pins) < position <= max(pins) for pins in problem.crossing)


@cases
@given(graph=graphs())
def test_promising_positions_are_positions_and_the_last_stays(graph):
    problem = problem_of(graph)
    for windows in (1, 2, 5):
        found = promising_positions(problem, windows)
        assert 1 <= len(found) <= windows and (np.diff(found) > 0).all()
        assert found[0] >= 1 and found[-1] <= len(problem)


@cases
@given(graph=graphs())
def test_merging_loses_nothing(graph):
    """Time and bytes are those of the parts, and a merged problem has no edge that leads back."""
    problem = problem_of(graph)
    half = len(problem) // 2 + 1
    for merged in (merge_runs(problem, np.array([half])), merge_items(problem, list(range(len(problem))))):
        nodes = [node for item in merged.items for node in item]
        assert len(nodes) == len(set(nodes)) and set(nodes) == {node for item in problem.items for node in item}
        assert all(u < v for u, v in merged.edges)
        for device, times in problem.times.items():
            assert np.isclose(merged.times[device].sum(), times.sum()) or not np.isfinite(times).all()
        assert np.isclose(merged.fixed_bytes.sum(), problem.fixed_bytes.sum())
        assert np.isclose(merged.activation_bytes.sum(), problem.activation_bytes.sum())


@cases
@given(graph=graphs())
def test_a_lattice_has_every_ideal_and_no_stage_costs_less_than_its_work(graph):
    problem = problem_of(graph)
    ideals = down_sets(problem)
    assert lattice(problem, len(ideals) - 1) is None
    found = lattice(problem, len(ideals))
    assert set(found.items) == set(ideals) and found.items[0] == frozenset()
    assert found.items[-1] == frozenset(range(len(problem)))
    for kind, loads in found.loads.items():
        times = problem.times[kind.device]
        for a, small in enumerate(found.items):
            for b, large in enumerate(found.items):
                if small < large and np.isfinite(loads[a, b]):
                    work = sum(times[item] for item in large - small)
                    assert loads[a, b] >= work * (1 - 1e-9)
                if not small <= large:
                    assert loads[a, b] == np.inf


@cases
@given(graph=graphs())
def test_a_bound_without_search_is_below_every_cut(graph):
    problem = problem_of(graph, links=((0.0, 1e9),))
    bound, reason = simple_bound(problem)
    fastest = np.min([problem.times[kind.device] for kind in problem.levels], axis=0)
    assert bound >= shared_work(problem) * (1 - 1e-12) and bound >= fastest.max() * (1 - 1e-12) and reason
    for ideal in down_sets(problem):
        rest = [item for item in range(len(problem)) if item not in ideal]
        assert bound <= max(fastest[list(ideal)].sum(), fastest[rest].sum()) * (1 + 1e-9)


@cases
@given(graph=graphs())
def test_memory_is_priced_as_it_is_counted(graph):
    """Of items that share nothing: the shares of a device's memory are its bytes over its size."""
    problem = problem_of(graph, memory=40)
    priced = memory_problem(problem)
    for kind, other in zip(problem.levels, priced.levels):
        times = priced.times[other.device]
        for item in range(len(problem)):
            if np.isfinite(times[item]):
                own = problem.fixed_bytes[item] + kind.in_flight * problem.activation_bytes[item]
                assert np.isclose(times[item], own / 40)
    everything = list(range(len(problem)))
    assert item_bytes(problem, everything, 2) >= held_bytes(problem, everything, 2) >= held_bytes(problem, [], 2) == 0
    assert all(kind.device.memory == 7 for kind in with_memory(problem, 7).levels)


@cases
@given(graph=graphs())
def test_reordering_keeps_every_cost_with_its_node(graph):
    problem = problem_of(graph)
    for order in candidate_orders(problem):
        other = reorder(problem, order)
        assert [problem.items[item] for item in order] == list(other.items)
        for device in problem.times:
            assert other.times[device].tolist() == problem.times[device][order].tolist()


def test_stages_are_dealt_out_evenly():
    for stages in range(1, 13):
        for each in range(1, 5):
            owners = deal(stages, each)
            counts = np.bincount(owners)
            assert len(owners) == stages and counts.max() - counts.min() <= 1 and counts.max() <= each
