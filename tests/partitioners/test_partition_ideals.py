"""Ideals: counted right, and priced as the segments of any order through them are."""
import networkx as nx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_partition_brute import graphs

from partitioners import Cluster, Device, GraphError, Link, MemoryModel
from partitioners.solvers.chain_search import backwards
from partitioners.solvers.ideal_pricing import IdealPricer
from partitioners.solvers.ideals import Ideals, TooMany
from partitioners.solvers.problem import build_problem, reorder
from partitioners.solvers.reduction import reduce_problem
from partitioners.solvers.segments import segment_loads


def problem_of(graph, *, memory=None, objective="sum", links=((0.1, 2.0),), count=2):
    devices = tuple(Device(name, 1, memory) for name in ("acc", "cpu"))[:count]
    cluster = Cluster(devices, ordered=len(links) > 1, links=tuple(Link(rate, latency) for latency, rate in links))
    return build_problem(graph, cluster=cluster, num_stages=count, objective=objective,
                         memory_model=MemoryModel(1.0, "gpipe"), num_microbatches=2, allow_empty=True)


def down_sets(problem):
    """Every ideal, by trying all subsets."""
    found = []
    for mask in range(1 << len(problem)):
        items = {item for item in range(len(problem)) if mask >> item & 1}
        if all(u in items or v not in items for u, v in problem.edges):
            found.append(frozenset(items))
    return found


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(graph=graphs(), objective=st.sampled_from(["sum", "overlap"]), memory=st.sampled_from([None, 12, 25]),
       links=st.sampled_from([((0.1, 2.0),), ((0.1, 2.0), (0.0, 8.0))]))
def test_ideals_are_priced_like_segments(graph, objective, memory, links):
    try:
        problem = problem_of(graph, memory=memory, objective=objective, links=links)
    except GraphError:
        return
    ideals = Ideals(problem, 10_000)
    sets = [frozenset(ideals.items(ideal)) for ideal in range(len(ideals))]
    assert sorted(map(sorted, sets)) == sorted(map(sorted, down_sets(problem)))
    assert (np.diff(ideals.work) >= 0).all()
    kind = problem.levels[-1]
    pricer = IdealPricer(ideals, kind)
    for base, held in enumerate(sets):
        loads = pricer.loads(base, base, len(ideals))
        for other in range(base, len(ideals)):
            if not held <= sets[other]:
                assert np.isinf(loads[other - base])
                continue
            order = sorted(held) + sorted(sets[other] - held) + sorted(set(range(len(problem))) - sets[other])
            expected = segment_loads(reorder(problem, order), kind)[len(held), len(sets[other])]
            assert loads[other - base] == pytest.approx(expected, rel=1e-12, abs=1e-12)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(graph=graphs())
def test_reduction_keeps_an_order(graph):
    try:
        problem = problem_of(graph)
    except GraphError:
        return
    small = reduce_problem(problem)
    assert all(u < v for u, v in small.edges)
    assert sorted(map(str, sum(small.items, ()))) == sorted(map(str, graph))
    assert small.times[small.levels[0].device].sum() == pytest.approx(problem.times[problem.levels[0].device].sum())


def test_backwards_twice_is_the_same():
    problem = problem_of(nx.DiGraph([("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")]))
    again = backwards(backwards(problem))
    assert (again.items, sorted(again.edges)) == (problem.items, sorted(problem.edges))


def test_too_many_ideals_are_not_enumerated():
    graph = nx.empty_graph(40, create_using=nx.DiGraph)
    with pytest.raises(TooMany, match="more than 10,000 ideals"):
        Ideals(problem_of(graph, count=1), 10_000)
    assert len(Ideals(problem_of(nx.path_graph(40, create_using=nx.DiGraph), count=1), 10_000)) == 41
