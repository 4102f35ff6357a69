"""Small spaces: the search finds the optimum of exhaustive enumeration, and its bound is never above it."""
import random
import sys
from pathlib import Path

import networkx as nx
import pytest

from partitioners import Link
from pipeengine.exploration import Space
from pipeengine.exploration.branch_and_bound import search_space
from pipeengine.exploration.hardware import Hardware
from pipeengine.exploration.row_costs import blend, chains
from pipeengine.exploration.space import Training

sys.path.insert(0, str(Path(__file__).parent))
from exhaustive import best_of_all, block_of  # noqa: E402

SCHEDULES = ("gpipe", "1f1b", "zb-h1", "interleaved-1f1b", "interleaved-zb", "zb-v", "bfs")


def instance(seed):
    """A random model of 4 to 6 nodes, devices and a space, all dimensions open; memory that mostly binds."""
    dice = random.Random(seed)
    graph, count = nx.DiGraph(), dice.randint(4, 6)
    names = [f"blocks.{i // 2}.{i % 2}" if dice.random() < 0.8 else f"node{i}" for i in range(count)]
    for place, name in enumerate(names):
        forward = dice.uniform(0.5, 2)
        backward = forward * dice.uniform(1, 2)
        activation = dice.randint(0, 40)
        graph.add_node(name, forward=forward, backward=backward, weight_grad=backward * dice.choice((0, 0.3, 0.5)),
                       param_bytes=dice.choice((0, 10, 20, 40)) if place else 10, activation_bytes=activation,
                       kept_bytes=dice.randint(0, 20), workspace_bytes=dice.randint(0, 10),
                       output_bytes=dice.randint(1, 8), gradient=True, order=place)
        if place:
            graph.add_edge(names[place - 1], name)
        if place > 1 and dice.random() < 0.2:
            graph.add_edge(names[place - 2], name)
    for path in {block_of(name) for name in names} - {""}:
        members = [name for name in names if block_of(name) == path]
        outside = {u for name in members for u in graph.predecessors(name)} - set(members)
        for name in members:
            graph.nodes[name]["block"] = path
        graph.nodes[members[0]]["block_bytes"] = sum(graph.nodes[u]["output_bytes"] for u in outside)
    if not any(graph.nodes[name]["weight_grad"] for name in names):
        graph.nodes[names[0]]["weight_grad"] = 0.1
    hardware = Hardware(dice.choice((2, 3, 4)), dice.choice((None, 150, 250, 400, 700)),
                        Link(dice.choice((10.0, 100.0)), 0.01), Link(dice.choice((2.0, 20.0)), 0.05),
                        dice.choice((None, 2)), dice.choice((None, 500.0)))
    rows = dice.choice((4, 6, 8))
    space = Space(rows=(1, 2), schedule=tuple(dice.sample(SCHEDULES, 4)), stages_per_worker=(1, 2),
                  recompute=dice.choice((("none",), ("stages",), ("none", "stages", "blocks"))),
                  shard=(None, "optimizer"), near=("stages", "replicas"))
    return graph, hardware, space, Training(rows)


def compare(seed):
    graph, hardware, space, training = instance(seed)

    def graph_for(rows):
        return blend({1: graph}, rows)
    truth, point = best_of_all(graph_for, space, hardware, training)
    outcome = search_space(space, hardware, training, chains(graph_for, 8))
    assert outcome.lower_bound <= truth * (1 + 1e-9), f"seed {seed}: told bound above {point}"
    if point is None:
        assert outcome.best is None, f"seed {seed}: {outcome.best.point} does not fit"
        return 0
    assert outcome.best is not None, f"seed {seed}: {point} takes {truth}"
    assert outcome.best.seconds == pytest.approx(truth, rel=1e-9), f"seed {seed}: {outcome.best.point} beside {point}"
    return 1


@pytest.mark.parametrize("seeds", [range(0, 6), range(6, 12)], ids=str)
def test_the_search_finds_the_optimum_of_all(seeds):
    assert sum(map(compare, seeds)) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("start", range(12, 200, 47))
def test_the_search_finds_the_optimum_of_all_everywhere(start):
    assert sum(map(compare, range(start, start + 47))) >= 20
