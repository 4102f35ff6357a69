"""The cost graph: what is refused by name, and what survives a round trip."""
import json
import math
from pathlib import Path

import networkx as nx
import pytest

from partitioners import GraphError, PipeEngineError, check, digest, from_json, read_pipedream, read_workload, to_json
from partitioners.graph.cost_graph import topological_order

DATA = Path(__file__).parents[1] / "data"


def chain(length: int = 3) -> nx.DiGraph:
    graph = nx.DiGraph()
    for index in range(length):
        graph.add_node(
            f"n{index}", forward=1.0, backward=2.0, output_bytes=8, param_bytes=4, gradient=True, order=index
        )
    nx.add_path(graph, list(graph))
    return graph


@pytest.mark.parametrize("name, value", [("forward", -1.0), ("backward", math.nan), ("param_bytes", math.inf),
                                         ("forward", {"gpu": -1}), ("output_bytes", "8"), ("shared", {"w": -3}),
                                         ("allowed", "cpu"), ("transfer", -1), ("allowed", 5), ("shared", "w"),
                                         ("colocate", {"a": 1}), ("order", "first"), ("gradient", "no"),
                                         ("param_bytes", 10 ** 400)])
def test_bad_attribute_is_named(name, value):
    graph = chain()
    graph.nodes["n1"][name] = value
    with pytest.raises(GraphError, match=f"'n1'.*{name}"):
        check(graph)


def test_cycle_is_named():
    graph = chain()
    graph.add_edge("n2", "n0")
    with pytest.raises(GraphError, match="cycle: .*n0"):
        check(graph)


def test_unknown_id_is_named():
    obj = to_json(chain())
    obj["edges"].append(["n0", "n9"])
    with pytest.raises(GraphError, match="n9"):
        from_json(obj)


@pytest.mark.parametrize("change, said", [
    (lambda obj: obj["nodes"][0].update(time=5), "'1'.*time=5"),
    (lambda obj: obj["nodes"][0].update(time={"acc": "3"}), "'1'.*time.*'3'"),
    (lambda obj: obj["nodes"][0].update(memory="3GB"), "'1'.*memory='3GB'"),
    (lambda obj: obj["nodes"][0].update(allowed=3), "'1'.*allowed=3"),
    (lambda obj: obj["nodes"][0].update(backward="yes"), "'1'.*backward='yes'"),
    (lambda obj: obj["nodes"].append(obj["nodes"][0]), "two nodes have the id 1"),
    (lambda obj: obj.update(colocate=5), "colocate is 5"),
    (lambda obj: obj.update(colocate=[5]), "group 0 is 5"),
    (lambda obj: obj.update(colocate=[[[1]]]), r"unknown node \[1\]"),
    (lambda obj: obj.update(device_classes=5), "device class.*found 5"),
    (lambda obj: obj["device_classes"][0].pop("count"), "device class.*name and count"),
    (lambda obj: obj["device_classes"][0].update(count="6"), "count '6'"),
    (lambda obj: obj["device_classes"][0].update(memory="16GB"), "memory '16GB'")])
def test_what_is_wrong_with_a_workload_file_is_named(change, said):
    obj = json.loads((DATA / "L_bert24_inference.json").read_text())
    change(obj)
    with pytest.raises(PipeEngineError, match=said):
        read_workload(obj)


def test_damaged_profile_is_named():
    with pytest.raises(GraphError, match="'node1'.*no costs"):
        read_pipedream("node1 -- Input0 -- no costs\n")


def test_empty_graph_is_refused():
    with pytest.raises(GraphError, match="no nodes"):
        check(nx.DiGraph())


def test_json_round_trip():
    graph = chain()
    graph.nodes["n1"].update(shared={"w": 16}, colocate="a", allowed=("gpu",), forward={"gpu": 1.0}, label="m.n")
    again = from_json(json.loads(json.dumps(to_json(graph))))
    assert dict(again.nodes(data=True)) == dict(graph.nodes(data=True))
    assert list(again.edges) == list(graph.edges)


def test_digest_follows_structure_not_costs():
    graph, other = chain(), chain()
    other.nodes["n1"]["forward"] = 7.0
    assert digest(graph) == digest(other)
    other.add_edge("n0", "n2")
    assert digest(graph) != digest(other)


def test_recorded_order_wins_where_it_is_one():
    graph = nx.DiGraph()
    graph.add_nodes_from([("a", {"order": 2}), ("b", {"order": 1}), ("c", {"order": 3})])
    graph.add_edges_from([("a", "c"), ("b", "c")])
    assert topological_order(graph) == ["b", "a", "c"]
    graph.nodes["c"]["order"] = 0
    assert topological_order(graph) == ["b", "a", "c"]


def test_workload_counts_milliseconds():
    graph = read_workload(DATA / "L_bert24_inference.json")
    obj = json.loads((DATA / "L_bert24_inference.json").read_text())
    for node in obj["nodes"]:
        assert graph.nodes[node["id"]]["forward"]["acc"] == node["time"]["acc"] * 1e-3
        assert graph.nodes[node["id"]]["transfer"] == node["out_cost"] * 1e-3
    assert [device.count for device in graph.graph["devices"]] == [6, 1]


def test_pipedream_profile():
    text = (
        "node1 -- Input0 -- forward_compute_time=0.000, backward_compute_time=0.000, activation_size=0.0, "
        "parameter_size=0.000\n"
        "node2 -- Conv -- forward_compute_time=2.000, backward_compute_time=4.000, activation_size=[8.0; 2.0], "
        "parameter_size=3.000\n"
        "\tnode1 -- node2\n"
    )
    graph = read_pipedream(text)
    assert graph.nodes["node2"] | {"label": ""} == {
        "forward": 0.002, "backward": 0.004, "output_bytes": 10.0, "activation_bytes": 10.0, "param_bytes": 3.0,
        "gradient": True, "label": ""}
    with pytest.raises(GraphError, match="node9"):
        read_pipedream(text + "\tnode2 -- node9\n")
