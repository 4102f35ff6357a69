"""Integer programmes over ideals: on graphs small enough for all ideals, bounds hold from both sides, and close in."""
import random
import time

import networkx as nx
import pytest

from partitioners import Cluster, Device, Link, MemoryModel
from partitioners.solvers.chain_search import backwards, best_chain
from partitioners.solvers.orders import through
from partitioners.solvers.problem import build_problem, reorder
from partitioners.solvers.search import loads_of
from partitioners.solvers.segments import best_cuts
from partitioners.solvers.sweeps import Bracket, Sweeper, narrow

pytest.importorskip("scipy")


def branching(seed, stages, memory=None):
    """Branches between joins, where the ideals grow with their product."""
    chance, graph, join = random.Random(seed), nx.DiGraph(), 0
    graph.add_node(join)
    for _ in range(3):
        ends = []
        for _ in range(chance.randint(1, 3)):
            before = join
            for _ in range(chance.randint(1, 2)):
                graph.add_edge(before, len(graph))
                before = len(graph) - 1
            ends.append(before)
        join = len(graph)
        graph.add_edges_from((end, join) for end in ends)
    for node in graph:
        graph.nodes[node].update(forward=chance.uniform(0.5, 3), output_bytes=chance.choice([1, 2, 4]), order=node,
                                 memory_bytes=chance.choice([1, 2, 3]), param_bytes=0)
    return build_problem(graph, cluster=Cluster((Device("acc", stages, memory),), links=(Link(4.0, 0.1),)),
                         num_stages=stages, objective="sum", memory_model=MemoryModel(1.0), num_microbatches=1,
                         allow_empty=True)


def chain_of(problem, known):
    """The exact optimum and its ideals."""
    found = best_chain(problem, known, limit=100_000, deadline=time.monotonic() + 60)
    held, ideals = frozenset(), []
    for stage in found.stages:
        held |= set(stage)
        ideals.append(frozenset(held))
    return found.bottleneck, tuple(ideals)


@pytest.mark.parametrize(
    "seed, stages, memory", [(0, 2, None), (1, 3, None), (2, 4, None), (3, 3, 14), (4, 4, 12), (5, 5, None)]
)
def test_the_optimum_is_always_inside_the_bracket(seed, stages, memory):
    problem = branching(seed, stages, memory)
    best, _ = chain_of(problem, float("inf"))
    whole = float(problem.times[problem.levels[0].device].sum())

    def evaluate(chain):
        ordered = reorder(problem, through(problem, chain))
        cuts = best_cuts(ordered, loads_of(ordered))
        return cuts.bottleneck if cuts else float("inf")
    bracket = None
    start = Bracket(whole, 0.0, (frozenset(range(len(problem))),))
    for bracket in narrow(problem, start, evaluate, gap=1e-3, deadline=time.monotonic() + 20):
        assert bracket.lower <= best * (1 + 1e-9) and best <= bracket.upper * (1 + 1e-9)
    assert bracket.upper - bracket.lower < 0.2 * bracket.upper


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("turn", [lambda problem: problem, backwards], ids=["forwards", "backwards"])
def test_nothing_feasible_is_ever_refuted(seed, turn):
    problem = turn(branching(seed, 3))
    best, ideals = chain_of(problem, float("inf"))
    near, far, late = Sweeper(problem), Sweeper(backwards(problem)), time.monotonic() + 60
    held = near.held(list(ideals)) + [1.0] * (3 - len(ideals))
    for guide in (held, [0.2, 0.3, 1.0], [0.7, 0.9, 1.0], [0.0, 0.0, 0.0]):
        reached = near.dual(best * (1 + 1e-6), guide, 0.01, late)
        assert len(reached) < 3 and all(most >= work - 1e-9 for most, work in zip(reached, held))
        assert far.meets(best * (1 + 1e-6), reached, 3, late)
    reached = near.dual(0.5 * best, [0.0, 0.0, 0.0], 0.0, late)
    assert len(reached) == 3 or not far.meets(0.5 * best, reached, 3, late)
