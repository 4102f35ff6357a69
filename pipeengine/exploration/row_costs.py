"""Cost graphs for micro-batches of other numbers of rows: recorded, or between recordings in proportion."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import networkx as nx

from pipeengine.exploration.chain import Chain

SIZES = ("forward", "backward", "weight_grad", "activation_bytes", "kept_bytes", "output_bytes", "workspace_bytes",
         "block_bytes", "transfer")
RECORDED_NODES = 1500       # up to which every number of rows is recorded; beyond, the fewest and the most


def blend(graphs: Mapping[int, nx.DiGraph], rows: int) -> nx.DiGraph:
    """Costs at ``rows``, on the line through the two nearest known numbers of rows; through 0 where one is known.

    Seconds bend up from the line at most by what starting an operation takes, so between two of them none is too low.
    """
    if rows in graphs:
        return graphs[rows]
    known = sorted(graphs, key=lambda each: (abs(each - rows), each))[:2]
    first = graphs[known[0]]
    made = first.copy()
    for node, data in made.nodes(data=True):
        for name in SIZES:
            if data.get(name):
                data[name] = _between(known, [graphs[each].nodes[node].get(name, 0.0) for each in known], rows)
    about = dict(first.graph.get("made_with", {}))
    if about.get("flops"):
        about["flops"] *= rows / known[0]
    made.graph["made_with"] = {**about, "rows": rows, "num_microbatches": 1}
    return made


def _between(known: list[int], values: list[float], rows: int) -> float:
    if len(known) == 1:
        return values[0] * rows / known[0]
    share = (rows - known[0]) / (known[1] - known[0])
    return max(0.0, values[0] + share * (values[1] - values[0]))


def chains(graph_for: Callable[[int], nx.DiGraph], most_stages: int) -> Callable[[int, str], Chain]:
    """Chains by rows and way of recomputing, each made once."""
    @cache
    def chain_for(rows: int, whole_blocks: bool) -> Chain:
        return Chain.of(graph_for(rows), whole_blocks=whole_blocks, most_stages=most_stages)
    return lambda rows, recompute: chain_for(rows, recompute == "blocks")


def graphs_of(record: Callable[[int], nx.DiGraph], wanted: tuple[int, ...]) -> Callable[[int], nx.DiGraph]:
    """Cost graphs at the ``wanted`` rows, each recorded where the model is small; else two, and lines between."""
    known = {wanted[0]: record(wanted[0])}
    small = len(known[wanted[0]]) <= RECORDED_NODES
    for rows in wanted[1:] if small else wanted[-1:]:
        if rows not in known:
            known[rows] = record(rows)

    @cache
    def graph_for(rows: int) -> nx.DiGraph:
        return blend(known, rows)
    return graph_for
