"""The planner against every assignment there is, on small random graphs with everything at once."""
import math

import networkx as nx
import pytest
from brute import brute_force
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from partitioners import (
    Cluster,
    Device,
    GraphError,
    Link,
    MemoryModel,
    PartitionError,
    partition,
    split_sequence,
    verify,
)

LOOSE = settings(max_examples=700, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@st.composite
def graphs(draw, largest=6):
    """A DAG of 2 to 6 nodes with costs, memory, classes, ties, co-location, and perhaps backward nodes."""
    count, pick = draw(st.integers(2, largest)), lambda *values: draw(st.sampled_from(values))
    graph = nx.DiGraph()
    for node in range(count):
        data = {
            "forward": pick(0, 1, 2, 3, 5, 0.37, 1.9),
            "output_bytes": pick(0, 1, 2, 5, 20),
            "gradient": pick(True, False),
        }
        for name, values in {"transfer": (0.5, 2.0), "param_bytes": (1, 3), "activation_bytes": (1, 4),
                             "workspace_bytes": (1, 6), "memory_bytes": (1, 6), "shared": ({"a": 3}, {"b": 3}),
                             "allowed": (("acc",), ("cpu",), ("acc", "cpu")), "colocate": (0, 1)}.items():
            chance = {"param_bytes": 2, "activation_bytes": 2}.get(name, 4)
            if draw(st.integers(1, chance)) == 1:
                data[name] = pick(*values)
        if draw(st.booleans()):
            data["forward"] = {"acc": data["forward"], "cpu": data["forward"] * pick(0.5, 1, 5)}
        graph.add_node(node, **data)
    pairs = [(u, v) for u in range(count) for v in range(u + 1, count)]
    graph.add_edges_from(draw(st.lists(st.sampled_from(pairs), max_size=8)))
    if draw(st.booleans()):
        add_backward(graph, draw(st.sets(st.integers(0, count - 1), max_size=8 - count)), draw(st.booleans()))
    return graph


def add_backward(graph, nodes, reads_forward):
    for node in nodes:
        graph.nodes[node].setdefault("colocate", f"pair {node}")
        graph.add_node(
            f"b{node}", forward=1.0, output_bytes=2, is_backward=True, colocate=graph.nodes[node]["colocate"]
        )
        if reads_forward:
            graph.add_edge(node, f"b{node}")
    graph.add_edges_from([(f"b{v}", f"b{u}") for u, v in list(graph.edges) if u in nodes and v in nodes])


def answer(graph, **options):
    """The planner's verified and proved bottleneck; inf where it says that there is none."""
    try:
        plan = partition(graph, prefer_single_tensor=0, **options)
    except (PartitionError, GraphError):
        return math.inf
    verify(plan, graph)
    assert plan.proved and plan.lower_bound == plan.bottleneck
    return plan.bottleneck


RULES = dict(objective=st.sampled_from(["sum", "sum", "overlap"]), count=st.integers(1, 3),
             microbatches=st.sampled_from([1, 2, 4]), memory=st.sampled_from([None, None, 10, 20, 30]),
             link=st.sampled_from([(0.0, 1e30), (0.3, 1.0), (0.0, 4.0), (0.3, 1e30)]),
             model=st.sampled_from([(1.0, "gpipe"), (4.0, "gpipe"), (4.0, "none")]), allow_empty=st.booleans())


@LOOSE
@given(graph=graphs(), cpu=st.booleans(), **RULES)
def test_classes_of_devices(graph, cpu, objective, count, microbatches, memory, link, model, allow_empty):
    accelerator = dict(name="acc", memory=memory, link_in=link, link_out=link)
    devices, truth = [Device("acc", count, memory)], [accelerator] * count
    if cpu:
        devices.append(Device("cpu", 1, pays_link=False))
        truth.append(dict(name="cpu", pays=False, link_in=link, link_out=link))
    found = answer(graph, devices=devices, objective=objective, latency=link[0], bandwidth=link[1],
                   memory_model=MemoryModel(*model), num_microbatches=microbatches, allow_empty=allow_empty)
    best = brute_force(graph, truth, objective=objective, allow_empty=allow_empty, num_microbatches=microbatches,
                       factor=model[0], depth=lambda stage, stages: 1 if model[1] == "none" else microbatches)
    assert found == pytest.approx(best, rel=1e-9)


@LOOSE
@given(graph=graphs(5), speeds=st.lists(st.sampled_from([1.0, 2.0]), min_size=1, max_size=3),
       links=st.tuples(*[st.sampled_from([(0.0, 1.0), (0.2, 4.0), (0.0, 1e30)])] * 2), **RULES)
def test_ordered_devices(graph, speeds, links, objective, count, microbatches, memory, link, model, allow_empty):
    schedule = model[1] if allow_empty else "1f1b"
    last = max(0, len(speeds) - 2)
    cluster = Cluster(tuple(Device("acc", 1, memory, speed) for speed in speeds), ordered=True,
                      links=tuple(Link(rate, latency) for latency, rate in links[:last + 1]))
    truth = [dict(ordered=True, name="acc", memory=memory, speed=speed, link_in=links[min(max(stage - 1, 0), last)],
                  link_out=links[min(stage, last)]) for stage, speed in enumerate(speeds)]
    found = answer(graph, devices=cluster, objective=objective, memory_model=MemoryModel(model[0], schedule),
                   num_microbatches=microbatches, allow_empty=allow_empty)
    best = brute_force(graph, truth, objective=objective, allow_empty=allow_empty, num_microbatches=microbatches,
                       factor=model[0], depth=lambda stage, stages: {"none": 1, "gpipe": microbatches, "1f1b": min(
                           microbatches, stages - stage)}[schedule])
    assert found == pytest.approx(best, rel=1e-9)


@LOOSE
@given(costs=st.lists(st.sampled_from([0.0, 1.0, 2.0, 0.1, 0.7, 1e-9, 5.0]), min_size=1, max_size=8),
       parts=st.integers(1, 4))
def test_sequences(costs, parts):
    from itertools import combinations_with_replacement

    def largest(places):
        return max(sum(costs[a:b]) for a, b in zip(places, places[1:]))
    best = min(largest((0, *places, len(costs)))
               for places in combinations_with_replacement(range(len(costs) + 1), parts - 1))
    places = split_sequence(costs, parts)
    assert len(places) == parts + 1 and (places[0], places[-1]) == (0, len(costs)) and list(places) == sorted(places)
    assert largest(places) == pytest.approx(best, rel=1e-12)
