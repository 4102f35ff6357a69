"""The period of 1F1B, several stages per worker, recomputation: small truths by brute force."""
import itertools
import json
import random

import networkx as nx
import pytest
from brute import brute_force_variant
from test_partition import DATA

from partitioners import InfeasibleError, MemoryModel, PartitionError, Plan, partition, read_workload, verify
from partitioners.solvers.period import period


def chain(times, **more):
    graph = nx.path_graph(len(times), create_using=nx.DiGraph)
    for node, cost in zip(graph, times):
        graph.nodes[node].update(forward=cost, output_bytes=1, gradient=True, param_bytes=1, order=node, **more)
    return graph


def cuts_of(length, stages):
    return ((0, *inner, length) for inner in itertools.combinations(range(1, length), stages - 1))


def test_period_of_published_examples():
    assert period([3.0] * 8, [0.5] * 7) == pytest.approx(3.4375)      # 3.44 for latency 0.25
    assert period([3.0] * 8, [1.5] * 7) == pytest.approx(4.3125)      # 4.31 for latency 0.75
    assert period([1.0, 5.0, 1.0], [0.0, 0.0]) == 5.0


@pytest.mark.parametrize("seed", range(30))
def test_shortest_period_of_chains(seed):
    chance = random.Random(seed)
    times = [chance.choice([1, 2, 3, 5, 0.5]) for _ in range(chance.randint(3, 8))]
    stages, latency = chance.randint(2, min(4, len(times))), chance.choice([0.0, 0.2, 1.0])
    plan = partition(chain(times), stages, objective="1f1b", latency=latency, prefer_single_tensor=0)
    verify(plan, chain(times))
    best = min(period([sum(times[a:b]) for a, b in zip(cuts, cuts[1:])], [2 * latency] * (stages - 1))
               for cuts in cuts_of(len(times), stages))
    assert plan.bottleneck == pytest.approx(best, rel=1e-6)
    assert plan.lower_bound <= best * (1 + 1e-9)


@pytest.mark.parametrize("worker_of", (None, (0, 1, 1, 0), (0, 1, 2, 0)))
@pytest.mark.parametrize("seed", range(20))
def test_several_stages_per_worker_on_chains(seed, worker_of):
    chance = random.Random(seed)
    times = [chance.choice([1, 2, 3, 5, 0.5]) for _ in range(chance.randint(4, 8))]
    home = {"stages_per_worker": 2} if worker_of is None else {"worker_of": worker_of}
    plan = partition(chain(times), 4, **home, latency=0.1, prefer_single_tensor=0)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    verify(plan, chain(times))

    def worst(cuts):
        loads = [sum(times[a:b]) + 0.2 * ((a > 0) + (b < len(times))) for a, b in zip(cuts, cuts[1:])]
        return max(
            sum(load for load, home in zip(loads, worker_of or (0, 1, 0, 1)) if home == worker) for worker in range(3)
        )

    assert plan.bottleneck == pytest.approx(min(map(worst, cuts_of(len(times), 4))))


def test_two_stages_per_worker_beat_one():
    graph = read_workload(DATA / "L_gnmt_training.json")
    plan = partition(graph, 12, stages_per_worker=2, allow_empty=True, prefer_single_tensor=0)
    verify(plan, graph)
    assert plan.bottleneck < 0.9 * 107.0044e-3
    assert plan.gap < 0.04


@pytest.mark.parametrize("seed", range(30))
def test_recomputation_on_chains(seed):
    chance = random.Random(seed)
    graph = chain([chance.choice([1, 2, 3]) for _ in range(chance.randint(3, 6))])
    for node in graph:
        graph.nodes[node].update(backward=2.0, activation_bytes=chance.choice([0, 4, 4, 8]))
    stages, memory = 2, chance.choice([16, 24, 32])
    best = min((max(_cheapest(graph, range(a, b), memory) for a, b in zip(cuts, cuts[1:]))
                for cuts in cuts_of(len(graph), stages)), default=float("inf"))
    options = dict(memory=memory, num_microbatches=2, recompute=True, prefer_single_tensor=0,
                   memory_model=MemoryModel(1.0, "gpipe"))
    if best == float("inf"):
        with pytest.raises(InfeasibleError):
            partition(graph, stages, **options)
        return
    plan = partition(graph, stages, **options)
    verify(plan, graph)
    assert plan.lower_bound <= best * (1 + 1e-9) and best * (1 - 1e-9) <= plan.bottleneck <= best + 3.0


def _cheapest(graph, nodes, memory):
    """Least load of one stage over every choice of what to recompute."""
    best, nodes = float("inf"), list(nodes)
    for flags in itertools.product((False, True), repeat=len(nodes)):
        need = sum(graph.nodes[node]["param_bytes"] + 2 * graph.nodes[node]["activation_bytes"] * (not flag)
                   for node, flag in zip(nodes, flags))
        if need <= memory:
            best = min(best, sum(graph.nodes[node]["forward"] * (1 + flag) + 2.0 for node, flag in zip(nodes, flags)))
    return best


def branching(chance, colocated):
    graph = nx.DiGraph()
    for node in range(chance.randint(4, 6)):
        graph.add_node(node, forward=chance.choice([1, 2, 3, 5, 0.5]), backward=chance.choice([0, 2.0]), order=node,
                       output_bytes=chance.choice([0, 1, 2]), gradient=chance.random() < 0.7,
                       param_bytes=chance.choice([1, 1, 2]), activation_bytes=chance.choice([0, 2, 4]))
        graph.nodes[node].update({"colocate": 0} if colocated and chance.random() < 0.2 else {})
        graph.nodes[node].update({"shared": {"w": 2}} if chance.random() < 0.1 else {})
        graph.add_edges_from(
            (before, node) for before in chance.sample(range(node), min(node, chance.choice([1, 1, 2])))
        )
    return graph


def with_blocks(chance, graph):
    """Neighbours in the order of production form blocks; some nodes belong to none."""
    label = 0
    for node in graph:
        label += chance.random() < 0.5
        graph.nodes[node].update(workspace_bytes=chance.choice([0, 0, 1, 3]))
        if label % 3:
            graph.nodes[node].update(block=f"block {label}", block_bytes=chance.choice([0, 0, 1]))
    return graph


@pytest.mark.parametrize("variant", ("1f1b", "recompute", "blocks", "turns"))
@pytest.mark.parametrize("seed", range(5))
def test_variants_on_random_graphs(variant, seed):
    chance = random.Random(seed)
    for _ in range(25):
        graph = branching(chance, colocated=variant != "recompute")
        graph = with_blocks(chance, graph) if variant == "blocks" else graph
        stages, batches = chance.choice([3, 4] if variant == "turns" else [2, 3]), chance.choice([1, 2])
        total = sum(data["param_bytes"] + batches * data["activation_bytes"] for _, data in graph.nodes(data=True))
        latency, bandwidth = chance.choice([(0.0, 1e30), (0.2, 4.0), (1.0, 1.0)])
        memory = chance.choice([0.3, 0.4, 0.5, 0.6] if variant in ("recompute", "blocks") else [None, 0.5, 0.7])
        limits = dict(latency=latency, bandwidth=bandwidth, memory=memory and memory * total, num_microbatches=batches)
        best = brute_force_variant(graph, stages, variant, **limits)
        asked = {"1f1b": {"objective": "1f1b"}, "turns": {"stages_per_worker": 2}}.get(variant, {"recompute": True})
        try:
            plan = partition(graph, stages, prefer_single_tensor=0, memory_model=MemoryModel(1.0, "gpipe"), **limits,
                             **asked)
        except PartitionError:
            assert best == float("inf")
            continue
        verify(plan, graph)
        assert plan.lower_bound <= best * (1 + 1e-9)
        assert plan.bottleneck == pytest.approx(best, rel=1e-9)


def test_recomputation_only_where_memory_needs_it():
    graph = chain([1.0, 1.0, 1.0, 1.0], backward=2.0, activation_bytes=10)
    roomy = partition(graph, 2, memory=1000, recompute=True)
    tight = partition(graph, 2, memory=18, recompute=True)
    assert all(not stage.recomputed for stage in roomy.stages) and roomy.bottleneck == 6.0
    assert [stage.recomputed for stage in tight.stages] != [(), ()] and tight.bottleneck == 7.0
    with pytest.raises(InfeasibleError):
        partition(graph, 2, memory=18)


@pytest.mark.parametrize("worker_of", ((0, 1), (0, 2, 2, 0), (), (0, 1, 1, 0, 1)))
def test_workers_that_do_not_fit_the_stages_are_refused(worker_of):
    with pytest.raises(PartitionError, match="must name the worker of each of the 4 stages"):
        partition(chain([1, 2, 3, 4]), 4, worker_of=worker_of)


def test_what_cannot_be_combined_is_refused():
    with pytest.raises(PartitionError, match="cannot be combined"):
        partition(chain([1, 2, 3, 4]), 4, objective="1f1b", stages_per_worker=2)
    with pytest.raises(PartitionError, match="none of sum, overlap, 1f1b"):
        partition(chain([1, 2]), 2, objective="fastest")


@pytest.mark.parametrize("seed", range(8))
def test_several_stages_per_worker_where_few_cuts_are_allowed(seed):
    """Skips and nodes without parameters forbid most cuts; climbing starts among those, and must not turn a stage
    round."""
    chance = random.Random(seed)
    graph = chain([chance.random() for _ in range(24)])
    names = list(graph)
    for name in chance.sample(names, 14):
        graph.nodes[name]["param_bytes"] = 0
    for start in range(0, 20, 2):
        graph.add_edge(names[start], names[-1])
    plan = partition(graph, 8, stages_per_worker=2, prefer_single_tensor=0.5)
    verify(plan, graph)
    assert len(set(plan.stage_of.values())) == 8


@pytest.mark.parametrize("seed", range(12))
def test_of_cuts_that_suit_the_workers_alike_the_most_even_stages_are_taken(seed):
    """A step fills and drains in single stages, so none should be heavier than need be."""
    chance = random.Random(seed)
    times = [chance.choice([1, 2, 3]) for _ in range(12)]
    plan = partition(chain(times), 4, stages_per_worker=2, prefer_single_tensor=0.1)
    verify(plan, chain(times))

    def stages(cuts):
        return [sum(times[a:b]) for a, b in zip(cuts, cuts[1:])]
    found = [(max(own[0] + own[2], own[1] + own[3]), max(own)) for own in map(stages, cuts_of(12, 4))]
    best = min(found)[0]
    assert plan.lower_bound <= best <= plan.bottleneck <= best * 1.1
    assert max(stage.load for stage in plan.stages) <= 1.02 * min(
        heaviest for load, heaviest in found if load <= best * 1.1
    )
