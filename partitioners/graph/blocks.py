"""What can be computed again in backward as one piece: blocks, or single nodes where a graph names no blocks."""
from __future__ import annotations

import math
from dataclasses import dataclass

import networkx as nx

from partitioners.graph.cost_graph import Node, topological_order


@dataclass(frozen=True)
class Block:
    """Nodes that a stage which holds them all may compute again in backward, as one piece.

    Then ``kept_bytes`` (what the block reads) stay per micro-batch in place of its ``activation_bytes``, and its
    backward has ``workspace_bytes`` of scratch: all activations come back at once.
    """

    label: str
    nodes: tuple[Node, ...]
    kept_bytes: float
    activation_bytes: float
    workspace_bytes: float

    @property
    def saved_bytes(self) -> float:
        """Bytes per micro-batch that recomputation frees; 0 where it would not."""
        return max(0.0, self.activation_bytes - self.kept_bytes)


def blocks_of(graph: nx.DiGraph) -> tuple[Block, ...]:
    """The blocks that node attribute ``block`` names, in the order of production.

    In a graph without any, every node with activations is one that keeps nothing and needs no scratch: whoever made the
    graph has said all there is in ``activation_bytes``.
    """
    members: dict[str, list[Node]] = {}
    named = any(data.get("block") is not None for _, data in graph.nodes(data=True))
    for node in topological_order(graph):
        data = graph.nodes[node]
        label = data.get("block") if named else str(node) if data.get("activation_bytes") else None
        if label is not None:
            members.setdefault(label, []).append(node)
    return tuple(_block(graph, label, nodes, named) for label, nodes in members.items())


def _block(graph: nx.DiGraph, label: str, nodes: list[Node], named: bool) -> Block:
    data = [graph.nodes[node] for node in nodes]
    activations = math.fsum(each.get("activation_bytes", 0.0) for each in data)
    kept = math.fsum(each.get("block_bytes", 0.0) for each in data)
    return Block(label, tuple(nodes), kept, activations,
                 data[-1].get("workspace_bytes", 0.0) + activations if named else 0.0)
