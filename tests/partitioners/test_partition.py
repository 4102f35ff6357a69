"""Known optima of published workloads, answers to the impossible, and promises about larger graphs."""
import json
import random
import re
from pathlib import Path

import networkx as nx
import pytest

from partitioners import Device, InfeasibleError, PartitionError, partition, read_workload, split_sequence, verify

DATA = Path(__file__).parents[1] / "data"
OPTIMA = {
    (name, key): value
    for name, cases in json.loads((DATA / "partition_optima.json").read_text())["optimum"].items()
    for key, value in cases.items()
}


def options(key):
    if key.startswith("bw"):
        bandwidth, stages = key[2:].split(",k")
        return {"bandwidth": float(bandwidth), "num_stages": int(stages)}
    return {} if key.startswith("published") else {"num_stages": int(key[1:].split(",")[0])}


def relabelled(graph, seed):
    """The same graph with other names, another order of nodes and edges, and no recorded order."""
    names, chance = list(graph), random.Random(seed)
    chance.shuffle(names)
    new = nx.DiGraph(**graph.graph)
    new.add_nodes_from((f"x{index}", graph.nodes[name]) for index, name in enumerate(names))
    place = {name: f"x{index}" for index, name in enumerate(names)}
    edges = [(place[u], place[v]) for u, v in graph.edges]
    chance.shuffle(edges)
    new.add_edges_from(edges)
    return new


@pytest.mark.parametrize("name", sorted({name for name, _ in OPTIMA}))
def test_published_optima(name):
    graph = read_workload(DATA / f"{name}.json")
    for (workload, key), optimum in OPTIMA.items():
        if workload == name:
            plan = partition(graph, allow_empty=True, prefer_single_tensor=0, **options(key))
            verify(plan, graph)
            assert plan.proved
            assert plan.bottleneck * 1e3 == pytest.approx(optimum, rel=1e-9), key


@pytest.mark.parametrize("name", ["L_gnmt_training", "L_inceptionv3_training", "O_bert_l-3_inference"])
@pytest.mark.parametrize("seed", [1, 2])
def test_names_and_order_do_not_matter(name, seed):
    graph = relabelled(read_workload(DATA / f"{name}.json"), seed)
    plan = partition(graph, 4, allow_empty=True, prefer_single_tensor=0)
    assert plan.proved
    assert plan.bottleneck * 1e3 == pytest.approx(OPTIMA[name, "k4,0cpu"], rel=1e-9)


@pytest.mark.parametrize("factor", [1e-6, 3.7e5])
def test_scale_does_not_matter(factor):
    graph = read_workload(DATA / "O_bert_l-6_training.json")
    for _, data in graph.nodes(data=True):
        data["forward"] = {name: value * factor for name, value in data["forward"].items()}
        data["transfer"] *= factor
    plan = partition(graph, allow_empty=True, prefer_single_tensor=0)
    assert plan.bottleneck * 1e3 == pytest.approx(OPTIMA["O_bert_l-6_training", "published devices"] * factor, rel=1e-9)


def test_answer_never_depends_on_chance():
    graph = read_workload(DATA / "L_inceptionv3_training.json")
    assert partition(graph, 8, prefer_single_tensor=0) == partition(graph, 8, prefer_single_tensor=0)


@pytest.mark.parametrize(
    "name, stages", [("L_gnmt_training", 2), ("O_bert_l-12_inference", 4), ("L_resnet50_inference", 3)]
)
def test_infeasible_tells_the_least_memory_that_would_do(name, stages):
    graph = read_workload(DATA / f"{name}.json")
    total = sum(data["memory_bytes"] for _, data in graph.nodes(data=True))
    with pytest.raises(InfeasibleError, match="memory of") as caught:
        partition(graph, stages, memory=0.95 * total / stages, allow_empty=True)
    least = float(re.search(r"memory of ([\d,]+)", str(caught.value))[1].replace(",", ""))
    assert partition(graph, stages, memory=least + 1, allow_empty=True).num_stages <= stages
    with pytest.raises(InfeasibleError):
        partition(graph, stages, memory=least * (1 - 1e-6), allow_empty=True)


def test_infeasible_tells_how_many_stages_would_do():
    graph = nx.path_graph(6, create_using=nx.DiGraph)
    for node in graph:
        graph.nodes[node].update(forward=1.0, memory_bytes=10)
    with pytest.raises(
        InfeasibleError, match="60 B in all, 30 B a stage .* and a device has 20 B; try memory of 30 bytes.*or 3 stages"
    ):
        partition(graph, 2, memory=20)
    assert partition(graph, 3, memory=20).bottleneck == 2.0


def test_one_item_too_large_is_named():
    graph = nx.DiGraph()
    graph.add_node("embedding", forward=1.0, memory_bytes=100)
    with pytest.raises(InfeasibleError, match="embedding.*100 bytes.*has 50 bytes"):
        partition(graph, 1, memory=50)


@pytest.mark.parametrize(
    "option",
    [
        {"num_stages": 0},
        {"num_stages": 2.5},
        {"num_stages": "2"},
        {"num_microbatches": 0},
        {"stages_per_worker": 0},
        {"gap": -1},
        {"time_limit": -1},
        {"memory": -1},
        {"memory": "80GB"},
        {"bandwidth": 0},
        {"bandwidth": float("nan")},
        {"latency": -1},
        {"prefer_single_tensor": "0.05"},
    ],
    ids=str,
)
def test_impossible_options_are_named(option):
    graph = nx.path_graph(4, create_using=nx.DiGraph)
    with pytest.raises(PartitionError, match=next(iter(option))):
        partition(graph, **{"num_stages": 2, **option})


def test_what_co_location_ties_together_is_told():
    graph = nx.path_graph(4, create_using=nx.DiGraph)
    graph.nodes[0]["colocate"] = graph.nodes[2]["colocate"] = "tied"
    with pytest.raises(PartitionError, match="colocate='tied' ties 3 of the 4 nodes together, from '0' to '2'"):
        partition(graph, 3)


def test_tight_memory_where_ideals_are_many():
    graph = read_workload(DATA / "L_gnmt_training.json")
    plan = partition(graph, 8, memory=1_125_188_481, allow_empty=True, prefer_single_tensor=0)
    verify(plan, graph)
    assert plan.proved


def test_two_kinds_of_device_share_by_speed():
    graph = nx.path_graph(6, create_using=nx.DiGraph)
    for node in graph:
        graph.nodes[node]["forward"] = 1.0
    plan = partition(graph, devices=[Device("old", 1, speed=1.0), Device("new", 1, speed=2.0)])
    assert plan.bottleneck == 2.0
    assert sorted((stage.device, stage.num_nodes) for stage in plan.stages) == [("new", 4), ("old", 2)]


def test_long_chain_is_exact():
    chance = random.Random(0)
    costs = [chance.lognormvariate(0, 1) for _ in range(3000)]
    graph = nx.path_graph(3000, create_using=nx.DiGraph)
    for node, cost in zip(graph, costs):
        graph.nodes[node].update(forward=cost, param_bytes=1)
    plan = partition(graph, 24, prefer_single_tensor=0)
    places = split_sequence(costs, 24)
    assert plan.proved
    assert plan.bottleneck == pytest.approx(max(sum(costs[a:b]) for a, b in zip(places, places[1:])), rel=1e-12)


def test_huge_graph_has_an_honest_gap():
    chance, graph = random.Random(1), nx.DiGraph()
    for node in range(25_000):
        graph.add_node(node, forward=chance.lognormvariate(0, 1), output_bytes=1e6, param_bytes=1, order=node)
        graph.add_edges_from((max(0, node - 1 - int(chance.expovariate(0.4))), node) for _ in range(2) if node)
    plan = partition(graph, 32, bandwidth=1e8, prefer_single_tensor=0)
    verify(plan, graph)
    assert 0 < plan.gap < 0.05
