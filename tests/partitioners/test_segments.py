"""Segments of an order priced by rectangles, cuts chosen among them, and problems merged: against plain counting."""
import random
from itertools import combinations, combinations_with_replacement

import networkx as nx
import numpy as np
import pytest

from partitioners import Cluster, Device, Link, MemoryModel, partition
from partitioners.solvers.bounds import shared_work, simple_bound
from partitioners.solvers.coarse import (
    crossing_seconds,
    crossing_tensors,
    merge_items,
    merge_nets,
    merge_runs,
    promising_positions,
)
from partitioners.solvers.lattice import lattice
from partitioners.solvers.memory import hopeless, item_bytes, memory_problem, stage_bytes, with_memory
from partitioners.solvers.problem import Net, build_problem, reorder
from partitioners.solvers.recompute import Choice, choose_recomputed
from partitioners.solvers.segments import (
    Plane,
    add_cut,
    add_received,
    add_sent,
    best_cuts,
    fewest_cuts,
    holds_all,
    meets,
    segment_loads,
)


def drawn_graph(seed, size=8):
    """A DAG with ties, scratch and parameters on some nodes."""
    draw, graph = random.Random(seed), nx.DiGraph()
    for node in range(size):
        graph.add_node(node, order=node, forward=draw.choice((0.0, 1.0, 2.0, 3.5)), backward=draw.choice((0.0, 2.0)),
                       output_bytes=draw.choice((0, 1, 4)), gradient=draw.random() < 0.7,
                       param_bytes=draw.choice((0, 3)), activation_bytes=draw.choice((0, 5)),
                       workspace_bytes=draw.choice((0, 2)))
        if draw.random() < 0.2:
            graph.nodes[node]["shared"] = {"tie": 6}
        if node and draw.random() < 0.9:
            graph.add_edge(draw.randrange(node), node)
    for _ in range(size // 2):
        graph.add_edge(*sorted(draw.sample(range(size), 2)))
    return graph


def drawn(seed, size=8, count=3, memory=None, allow_empty=True):
    devices = (Device("gpu", count, memory),)
    return build_problem(drawn_graph(seed, size), cluster=Cluster(devices, links=(Link(2.0, 0.25),)), num_stages=count,
                         objective="sum", memory_model=MemoryModel(2.0, "gpipe"), num_microbatches=2,
                         allow_empty=allow_empty)


SEEDS = range(20)


# -- rectangles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_a_plane_is_the_sum_of_its_rectangles(seed):
    draw, size = random.Random(seed), 7
    plane, expected = Plane(size), np.zeros((size + 1, size + 1))
    for _ in range(draw.randint(0, 9)):
        rectangle, weight = [draw.randint(0, size + 1) for _ in range(4)], draw.uniform(-2, 2)
        plane.add(tuple(rectangle), weight)
        expected[rectangle[0]:rectangle[1], rectangle[2]:rectangle[3]] += weight
    assert plane.total() == pytest.approx(expected, abs=1e-12)


def segments(size):
    return combinations_with_replacement(range(size + 1), 2)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_a_segment_holds_of_a_net(seed):
    """Some, all, its source, its readers: each against sets."""
    draw, size = random.Random(seed), 7
    pins = tuple(sorted(draw.sample(range(size), draw.randint(2, 5))))
    net = Net(draw.choice(pins), pins, 0.0, 0.0, 0.0)
    planes = {name: Plane(size) for name in ("some", "all", "cut", "sent", "received")}
    for rectangle in meets(pins, size):
        planes["some"].add(rectangle, 1.0)
    planes["all"].add(holds_all(pins, size), 1.0)
    for name, add in (("cut", add_cut), ("sent", add_sent), ("received", add_received)):
        add(planes[name], net, 1.0, size)
    totals = {name: plane.total() for name, plane in planes.items()}
    for a, b in segments(size):
        inside = set(range(a, b)) & set(pins)
        expected = {"some": bool(inside), "all": inside == set(pins), "cut": bool(inside) and inside != set(pins),
                    "sent": net.source in inside and inside != set(pins),
                    "received": net.source not in inside and bool(inside)}
        assert {name: bool(round(total[a, b], 9)) for name, total in totals.items()} == expected, (a, b, pins)


@pytest.mark.parametrize("seed", SEEDS)
def test_loads_are_work_and_what_crosses(seed):
    problem = drawn(seed)
    (kind,) = problem.levels
    loads = segment_loads(problem, kind)
    for a, b in combinations(range(len(problem) + 1), 2):
        inside = set(range(a, b))
        cut = [net for net in problem.nets if inside & set(net.pins) and not inside >= set(net.pins)]
        expected = problem.times[kind.device][a:b].sum() + sum(
            net.seconds(kind.link_in) * (2 if net.source < 0 else 1) for net in cut)
        assert loads[a, b] == pytest.approx(expected)
    assert (loads[np.tri(len(problem) + 1, k=-1, dtype=bool)] == np.inf).all() and (np.diag(loads) == 0).all()


# -- cuts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allow_empty", (True, False))
@pytest.mark.parametrize("seed", SEEDS)
def test_cuts_are_the_best_of_all(seed, allow_empty):
    problem = drawn(seed, allow_empty=allow_empty)
    (kind,) = problem.levels
    loads = {kind: segment_loads(problem, kind)}
    size = len(problem)
    every = [(0, *cut, size) for cut in combinations_with_replacement(range(size + 1), 2)]
    worst = {cut: max(loads[kind][a, b] for a, b in zip(cut, cut[1:])) for cut in every}
    found = best_cuts(problem, loads)
    if min(worst.values()) == np.inf:
        assert found is None
        return
    assert found.bottleneck == min(worst.values())
    assert max(loads[kind][a, b] for a, b in zip(found.positions, found.positions[1:])) == found.bottleneck
    at = np.array([2, 5])
    fewer = best_cuts(problem, loads, at)
    allowed = [value for cut, value in worst.items() if set(cut) <= {0, 2, 5, size}]
    assert (fewer.bottleneck if fewer else np.inf) == min(allowed)


@pytest.mark.parametrize("seed", SEEDS)
def test_fewest_cuts_are_the_cheapest_within_the_limit(seed):
    """Of all cuts without a load above it, by what crosses them; of those the lowest bottleneck."""
    problem = drawn(seed)
    (kind,) = problem.levels
    loads, size, draw = {kind: segment_loads(problem, kind)}, len(problem), random.Random(seed)
    count = np.array([0, *(draw.randint(0, 3) for _ in range(size - 1)), 0])
    limit = best_cuts(problem, loads).bottleneck * draw.choice((1.0, 1.2, 2.0))

    def price(cut):
        parts = list(zip(cut, cut[1:]))
        worst = max(loads[kind][a, b] for a, b in parts)
        return (sum(count[b] for a, b in parts if a < b), worst) if worst <= limit else (np.inf, np.inf)
    least = min(price((0, *cut, size)) for cut in combinations_with_replacement(range(size + 1), 2))
    total, cuts = fewest_cuts(problem, loads, count, limit, np.arange(size + 1))
    assert (total, cuts.bottleneck) == least
    assert price(cuts.positions) == least
    assert fewest_cuts(problem, loads, count, -1.0, np.arange(size + 1)) is None


def test_a_lattice_of_a_chain_is_its_segments():
    graph = nx.path_graph(6, create_using=nx.DiGraph)
    nx.set_node_attributes(graph, {node: dict(forward=1.0 + node, output_bytes=4) for node in graph})
    problem = build_problem(graph, cluster=Cluster((Device("gpu", 2),), links=(Link(2.0),)), num_stages=2,
                            objective="sum", memory_model=MemoryModel(), num_microbatches=1, allow_empty=True)
    (kind,) = problem.levels
    found = lattice(problem, 100)
    assert found.loads[kind] == pytest.approx(segment_loads(problem, kind))
    assert found.items == tuple(frozenset(range(count)) for count in range(7))
    assert found.stages(problem, (0, 2, 6)) == ((0, 1), (2, 3, 4, 5)) and lattice(problem, 6) is None


@pytest.mark.parametrize("seed", SEEDS)
def test_bounds_are_below_every_plan(seed):
    problem = drawn(seed)
    bound, proof = simple_bound(problem)
    plan = partition(drawn_graph(seed), devices=[Device("gpu", 3)], latency=0.25, bandwidth=2.0, num_microbatches=2,
                     allow_empty=True)
    assert shared_work(problem) <= bound <= plan.bottleneck * (1 + 1e-9)
    assert ("one item alone" in proof) == (bound > shared_work(problem) or bound == problem.times[
        problem.levels[0].device].max())


# -- problems made smaller --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_another_order_and_back_is_the_same(seed):
    problem, draw = drawn(seed), random.Random(seed)
    waiting, order = list(range(len(problem))), []
    while waiting:
        order.append(draw.choice([i for i in waiting if not set(problem.predecessors[i]) & set(waiting)]))
        waiting.remove(order[-1])
    moved = reorder(problem, order)
    assert all(u < v for u, v in moved.edges) and moved.items == tuple(problem.items[i] for i in order)
    back = reorder(moved, np.argsort(order).tolist())
    assert (back.items, sorted(back.edges), back.nets, back.crossing) == (
        problem.items, sorted(problem.edges), problem.nets, problem.crossing)
    assert all((back.times[device] == problem.times[device]).all() for device in problem.times)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_crosses_each_position(seed):
    problem = drawn(seed)
    link = problem.levels[0].link_in
    for at in range(len(problem) + 1):
        over = [net for net in problem.nets if net.pins[0] < at <= net.pins[-1]]
        assert crossing_seconds(problem)[at] == pytest.approx(sum(net.seconds(link) for net in over), abs=1e-12)
        assert crossing_tensors(problem)[at] == sum(pins[0] < at <= pins[-1] for pins in problem.crossing)


@pytest.mark.parametrize("seed", SEEDS)
def test_promising_positions_are_one_of_each_window(seed):
    problem = drawn(seed, size=20)
    for windows in (1, 3, 6, 20):
        chosen = promising_positions(problem, windows)
        assert 1 <= len(chosen) <= windows and (np.diff(chosen) > 0).all()
        assert 1 <= chosen[0] and chosen[-1] <= len(problem)
    (only,) = promising_positions(problem, 1)
    assert crossing_seconds(problem)[only] == pytest.approx(crossing_seconds(problem)[1:].min(), abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_merging_adds_up_and_any_cut_between_runs_costs_the_same(seed):
    """Loads of segments that begin and end where runs do, and the bytes of their stages."""
    problem, draw = drawn(seed, size=10), random.Random(seed)
    (kind,) = problem.levels
    ends = np.array(sorted(draw.sample(range(1, len(problem)), 3)))
    merged = merge_runs(problem, ends)
    places = [0, *ends.tolist(), len(problem)]
    assert len(merged) == 4 and merged.items == tuple(
        sum(problem.items[a:b], ()) for a, b in zip(places, places[1:]))
    assert segment_loads(merged, kind) == pytest.approx(segment_loads(problem, kind)[np.ix_(places, places)])
    for number, (a, b) in enumerate(zip(places, places[1:])):
        assert item_bytes(merged, [number], 2) == pytest.approx(item_bytes(problem, list(range(a, b)), 2))
        assert stage_bytes(problem, sum(problem.items[a:b], ()), 2) == item_bytes(problem, list(range(a, b)), 2)


def test_merging_items_keeps_an_order():
    """A diamond whose arms are joined with its ends, crosswise in number."""
    graph = nx.DiGraph([("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")])
    nx.set_node_attributes(graph, {node: dict(forward=1.0) for node in graph})
    problem = build_problem(graph, cluster=Cluster((Device("gpu", 2),)), num_stages=2, objective="sum",
                            memory_model=MemoryModel(), num_microbatches=1, allow_empty=True)
    merged = merge_items(problem, [0, 3, 0, 3])
    assert list(map(set, merged.items)) == [{"a", "c"}, {"b", "d"}] and merged.edges == ((0, 1),)
    assert merged.times[merged.levels[0].device].tolist() == [2.0, 2.0]
    with pytest.raises(AssertionError, match="merging made a cycle"):
        merge_items(problem, [0, 1, 2, 0])


def test_nets_between_the_same_items_are_one():
    nets = [Net(0, (0, 1), 1.0, 2.0, 3.0), Net(0, (0, 1), 0.5, 0.0, 1.0), Net(-1, (0, 1), 0.0, 1.0, 1.0),
            Net(2, (2,), 9.0, 9.0, 9.0)]
    assert merge_nets(nets) == (Net(0, (0, 1), 1.5, 2.0, 4.0), Net(-1, (0, 1), 0.0, 1.0, 1.0))
    assert Net(0, (0, 1), 1.0, 2.0, 8.0).seconds(Link(4.0, 0.5)) == 1.0 + 2 * 0.5 + 8 / 4


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_memory_alone_is_a_bound_on_what_fits(seed):
    """A plan's fullest stage fills no less of a device than the bytes shared out, or the largest item's, would."""
    plan = partition(drawn_graph(seed), devices=[Device("gpu", 3, 1000.0)], num_microbatches=2, allow_empty=True,
                     memory_model=MemoryModel(2.0, "gpipe"))
    problem = memory_problem(drawn(seed, memory=1000.0))
    assert simple_bound(problem)[0] <= max(stage.memory_bytes for stage in plan.stages) / 1000.0 * (1 + 1e-9)
    (kind,) = problem.levels
    (whole,) = drawn(seed, memory=1000.0).levels
    loads = segment_loads(problem, kind)
    for a, b in combinations(range(len(problem) + 1), 2):
        need = problem.fixed_bytes[a:b].sum() + whole.in_flight * problem.activation_bytes[a:b].sum()
        assert loads[a, b] == pytest.approx(need / 1000.0), "a load is the share of a device that is full"


def test_devices_of_another_size_have_the_same_times():
    problem = drawn(3, memory=50.0)
    larger = with_memory(problem, 80.0)
    assert [kind.device.memory for kind in larger.levels] == [80.0] and len(larger.times) == 1
    assert (next(iter(larger.times.values())) == next(iter(problem.times.values()))).all()
    assert with_memory(drawn(3), 80.0).levels == drawn(3).levels, "who has no limit gets none"


def test_what_can_never_fit_is_named():
    graph = drawn_graph(1)
    graph.nodes[4].update(param_bytes=1e9, colocate="pair")
    graph.nodes[5].update(colocate="pair")
    options = dict(num_stages=3, objective="sum", memory_model=MemoryModel(2.0, "gpipe"), num_microbatches=2,
                   allow_empty=True)
    small, none = (build_problem(graph, cluster=Cluster((Device("gpu", 3, memory),)), **options)
                   for memory in (1e6, None))
    said = hopeless(small)
    assert "4, 5 must share a stage and need" in said and "bytes) but a device has 1,000,000 bytes" in said
    assert hopeless(none) is None and hopeless(drawn(1, memory=1e6)) is None


@pytest.mark.parametrize("seed", range(60))
def test_what_is_recomputed_is_the_cheapest_that_fits(seed):
    """Against every subset; scratch is the largest of what is chosen."""
    draw = random.Random(seed)
    choices = [Choice(draw.choice((0.5, 1.0, 2.0, 3.0)), draw.choice((0.0, 2.0, 3.0, 5.0)),
                      draw.choice((0.0, 1.0, 4.0))) for _ in range(draw.randint(0, 7))]
    held, scratch, room = draw.uniform(5, 20), draw.choice((0.0, 2.0)), draw.uniform(3, 18)

    def need(chosen):
        return held - sum(choices[i].saved for i in chosen) + max([scratch, *(choices[i].scratch for i in chosen)])
    fitting = [chosen for count in range(len(choices) + 1) for chosen in combinations(range(len(choices)), count)
               if need(chosen) <= room]
    found = choose_recomputed(choices, held, scratch, room)
    if not fitting:
        assert found is None
        return
    assert need(found) <= room * (1 + 1e-9) and len(set(found)) == len(found)
    cheapest = min(sum(choices[i].seconds for i in chosen) for chosen in fitting)
    assert sum(choices[i].seconds for i in found) == pytest.approx(cheapest)


def test_of_very_many_choices_none_is_needless():
    """Too many to try all: what is chosen fits, and without any one of them it would not."""
    draw = random.Random(0)
    choices = [Choice(draw.uniform(1, 2), draw.uniform(1, 3), 0.0) for _ in range(200)]
    for excess in (0.5, 20.0, 200.0):
        found = choose_recomputed(choices, 1000.0, 0.0, 1000.0 - excess)
        saved = sum(choices[i].saved for i in found)
        assert saved >= excess * (1 - 1e-6)
        assert all(saved - choices[i].saved < excess for i in found)
