"""A cost graph in its recorded order: sums up to every place where it may be cut, and the price of any cuts.

The places are those that few tensors cross, and none inside nodes that must stay together. Seconds and bytes of one
micro-batch.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import networkx as nx
import numpy as np

from partitioners import Boundary, Cluster, Device, MemoryModel, Plan, StageCost, Tie
from partitioners.plan import price_stages
from partitioners.solvers import build_problem, crossing_tensors

FEW_TENSORS = 2         # that may cross a place, where there are enough such places
MOST_PLACES = 700       # a long order is cut only at so many, evenly spread over its work


@dataclass(frozen=True)
class Figures:
    """One entry per node, in order: seconds and bytes as the cost graph has them, and those of parameters that are
    trained, shared ones included."""

    forward: np.ndarray
    backward: np.ndarray
    weight_grad: np.ndarray
    param_bytes: np.ndarray
    frozen_bytes: np.ndarray
    grown_bytes: np.ndarray
    activation_bytes: np.ndarray
    kept_bytes: np.ndarray
    workspace_bytes: np.ndarray

    @classmethod
    def of(cls, graph: nx.DiGraph, order: tuple) -> Figures:
        """The figures of ``graph``'s nodes in ``order``."""
        def column(name: str) -> np.ndarray:
            return np.array([float(graph.nodes[node].get(name, 0.0)) for node in order])
        shared = np.array([sum(size for name, size in (graph.nodes[node].get("shared") or {}).items()
                               if name not in (graph.nodes[node].get("frozen") or ())) for node in order], float)
        return cls(column("forward"), column("backward"), column("weight_grad"), column("param_bytes"),
                   column("frozen_bytes"), column("param_bytes") - column("frozen_bytes") + shared,
                   column("activation_bytes"), column("kept_bytes"), column("workspace_bytes"))


@dataclass(frozen=True)
class Chain:
    """Nodes in order; ``places[j]`` is how many of them stand before place j (the first 0, the last all).

    ``again`` are the figures when every block that the graph names runs its forward twice, and ``blocks`` the path of
    each node's block ("" for none). ``shared``: name, bytes, positions of the readers, and whether it is trained.
    """

    graph: nx.DiGraph
    order: tuple
    places: np.ndarray
    plain: Figures
    again: Figures
    blocks: tuple[str, ...]
    edges: np.ndarray                   # positions of producer and reader
    shared: tuple[tuple[str, float, tuple[int, ...], bool], ...]

    @classmethod
    def of(cls, graph: nx.DiGraph, *, whole_blocks: bool = False, most_stages: int = 1) -> Chain:
        """The chain of ``graph``; with ``whole_blocks`` it is not cut inside repeated blocks."""
        problem = build_problem(graph, cluster=Cluster((Device(),)), num_stages=1, objective="sum",
                                memory_model=MemoryModel(), num_microbatches=1, allow_empty=True)
        order = sum(problem.items, ())
        ends = np.cumsum([len(item) for item in problem.items])
        blocks = tuple(graph.nodes[node].get("block") or "" for node in order)
        crossing = crossing_tensors(problem)[1:-1]
        allowed = np.ones(len(crossing), bool)
        if whole_blocks:
            allowed = np.array([not blocks[end - 1] or blocks[end - 1] != blocks[end] for end in ends[:-1]], bool)
        places = _thinned(_few_tensors(ends[:-1], crossing, allowed, most_stages),
                          np.array([graph.nodes[node].get("forward", 0.0) for node in order]))
        place_of = {node: position for position, node in enumerate(order)}
        edges = np.array([(place_of[u], place_of[v]) for u, v in graph.edges], np.int64).reshape(-1, 2)
        gives = np.array([bool(graph.nodes[u].get("gradient")) for u, _ in graph.edges], bool)
        places = _linked(places, edges[gives] if gives.any() else edges, len(order))
        return cls(graph, order, np.concatenate(([0], places, [len(order)])), Figures.of(graph, order),
                   _computed_again(graph, order, blocks), blocks, edges, _shared(graph, order))

    def __len__(self) -> int:
        return len(self.places) - 1

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sums of one entry per node up to every place."""
        return np.concatenate(([0.0], np.cumsum(values)))[self.places]

    @cached_property
    def returns(self) -> bool:
        """Whether gradients come back over the boundaries."""
        return any(data.get("gradient") for _, data in self.graph.nodes(data=True))

    @cached_property
    def own_parameters(self) -> np.ndarray:
        """Bytes of trained parameters up to every place, shared ones with their first reader."""
        first = self.plain.param_bytes - self.plain.frozen_bytes
        for _, size, readers, trained in self.shared:
            first[readers[0]] += size * trained
        return self.sums(first)

    @cached_property
    def must_hold(self) -> np.ndarray:
        """How many nodes with parameters stand before each place; nodes, where none has any."""
        has = np.array([bool(self.graph.nodes[node].get("param_bytes") or self.graph.nodes[node].get("shared"))
                        for node in self.order])
        return self.sums(has if has.any() else np.ones(len(has))).astype(int)

    @cached_property
    def crossing_bytes(self) -> np.ndarray:
        """Bytes that cross each place forward, each value once; the ends have none."""
        size = np.array([float(self.graph.nodes[node].get("output_bytes", 0.0)) for node in self.order])
        last = np.arange(len(self.order))
        if len(self.edges):
            np.maximum.at(last, self.edges[:, 0], self.edges[:, 1])
        steps = np.zeros(len(self.order) + 1)
        np.add.at(steps, np.arange(len(self.order)) + 1, size)
        np.add.at(steps, last + 1, -size)
        return np.maximum(np.cumsum(steps)[self.places], 0.0)

    def stage_of(self, cuts: tuple[int, ...]) -> np.ndarray:
        """The stage of every node, for stages between the places ``cuts`` (both ends included)."""
        return np.repeat(np.arange(len(cuts) - 1), np.diff(self.places[list(cuts)]))

    def price(self, cuts: tuple[int, ...], until: tuple[int, ...], grain: str) -> Plan:
        """A sketch of the plan: stages, boundaries and ties as ``partitioners`` prices them, without names.

        A stage keeps nothing inside its blocks before the place ``until`` (``grain`` ``"blocks"``), or only what it
        receives (``"stages"``) where that is not its start.
        """
        stage_of = self.stage_of(cuts)
        held = [dict.fromkeys(stage_of[list(readers)].tolist()) for _, _, readers, _ in self.shared]
        read = [[(size, trained) for (_, size, _, trained), stages in zip(self.shared, held) if stage in stages]
                for stage in range(len(cuts) - 1)]
        shared = [(sum(size for size, _ in own), sum(size for size, trained in own if not trained)) for own in read]
        at = self.places.tolist()
        stages = tuple(self._stage(at[a], at[c if grain == "blocks" else a], at[b], shared[stage])
                       for stage, (a, b, c) in enumerate(zip(cuts, cuts[1:], until)))
        ties = tuple(Tie(name, tuple(sorted(stages_of)), round(size), trained)
                     for (name, size, _, trained), stages_of in zip(self.shared, held) if len(stages_of) > 1)
        plan = Plan(len(stages), {}, stages, self._boundaries(stage_of), ties, 0.0, 0.0, 0.0, "", "overlap", "")
        whole = [stage for stage, place in enumerate(until) if place > cuts[stage] and grain == "stages"]
        return price_stages(plan, whole) if whole else plan

    def _stage(self, start: int, until: int, end: int, shared: tuple[float, float]) -> StageCost:
        part = {name: np.concatenate((getattr(self.again, name)[start:until], getattr(self.plain, name)[until:end]))
                for name in Figures.__dataclass_fields__}
        total = {name: float(values.sum()) for name, values in part.items()}
        load = total["forward"] + total["backward"]
        return StageCost(total["forward"], total["backward"], 0.0, load, total["param_bytes"] + shared[0],
                         total["activation_bytes"], 0.0, 0.0, end - start, weight_grad=total["weight_grad"],
                         frozen_bytes=total["frozen_bytes"] + shared[1], kept_bytes=total["kept_bytes"],
                         workspace_bytes=_scratch(part, grown=False), first_workspace_bytes=_scratch(part, grown=True))

    def _boundaries(self, stage_of: np.ndarray) -> tuple[Boundary, ...]:
        home, reader = stage_of[self.edges[:, 0]], stage_of[self.edges[:, 1]]
        far = home != reader
        values: dict[tuple[int, int], list[int]] = {}
        gradients: dict[tuple[int, int], list[int]] = {}
        readers: dict[int, set[int]] = {}
        for node, stage in zip(self.edges[far, 0].tolist(), reader[far].tolist()):
            readers.setdefault(node, set()).add(stage)
        for node in sorted(readers):
            own, others = int(stage_of[node]), sorted(readers[node])
            for stage in others:
                values.setdefault((own, stage), []).append(node)
            if self.graph.nodes[self.order[node]].get("gradient"):
                for pair in zip((own, *others), others):
                    gradients.setdefault(pair, []).append(node)

        def described(nodes: list[int]) -> tuple[tuple[str, ...], int]:
            return (tuple(str(self.order[node]) for node in nodes),
                    round(sum(self.graph.nodes[self.order[node]].get("output_bytes", 0.0) for node in nodes)))
        return tuple(Boundary(*pair, *described(values.get(pair, [])), *described(gradients.get(pair, [])))
                     for pair in sorted({*values, *gradients}))


def _few_tensors(ends: np.ndarray, crossing: np.ndarray, allowed: np.ndarray, most_stages: int) -> np.ndarray:
    """Ends of items where few tensors cross: as few as leave four places per stage, or all there are."""
    for most in sorted({FEW_TENSORS, *crossing[crossing > FEW_TENSORS].tolist()}):
        chosen = ends[allowed & (crossing <= most)]
        if len(chosen) >= 4 * most_stages:
            return chosen
    return ends[allowed]


def _linked(places: np.ndarray, edges: np.ndarray, size: int) -> np.ndarray:
    """Places where what comes next reads from what comes just before, so that every stage waits for the one before."""
    kept: list[int] = []
    by_reader = edges[np.argsort(edges[:, 1], kind="stable")]
    ends = np.append(places, size)[1:]
    for place, end in zip(places.tolist(), ends.tolist()):
        low, high = np.searchsorted(by_reader[:, 1], (place, end))
        sources = by_reader[low:high, 0]
        if ((sources < place) & (sources >= (kept[-1] if kept else 0))).any():
            kept.append(place)
    return np.array(kept, np.int64)


def _thinned(places: np.ndarray, forward: np.ndarray) -> np.ndarray:
    if len(places) <= MOST_PLACES:
        return places
    work = np.cumsum(forward)[places - 1] + 1e-9 * forward.sum() * np.arange(len(places))
    wanted = np.linspace(work[0], work[-1], MOST_PLACES)
    return places[np.unique(np.searchsorted(work, wanted * (1 - 1e-12)))]


def _scratch(part: dict[str, np.ndarray], grown: bool) -> float:
    """As ``partitioners`` has it: the most bytes on top while a backward walks the nodes from the last to the first."""
    change = -part["activation_bytes"][::-1] + (part["grown_bytes"][::-1] if grown else 0.0)
    after = np.cumsum(change)
    during = np.concatenate(([0.0], after[:-1])) + part["workspace_bytes"][::-1] if len(after) else np.zeros(1)
    return float(max(0.0, during.max(), after[-1] if len(after) else 0.0))


def _computed_again(graph: nx.DiGraph, order: tuple, blocks: tuple[str, ...]) -> Figures:
    """Every block keeps only what it reads, and runs its forward again in a backward that is not in halves."""
    plain = Figures.of(graph, order)
    backward, kept, workspace = plain.backward.copy(), plain.activation_bytes.copy(), plain.workspace_bytes.copy()
    members: dict[str, list[int]] = {}
    for position, path in enumerate(blocks):
        if path:
            members.setdefault(path, []).append(position)
    weight, halves = plain.weight_grad.copy(), plain.kept_bytes.copy()
    for positions in members.values():
        backward[positions] += plain.forward[positions]
        workspace[positions[-1]] += plain.activation_bytes[positions].sum()
        kept[positions] = weight[positions] = halves[positions] = 0.0
        kept[positions[0]] = sum(float(graph.nodes[order[position]].get("block_bytes", 0.0)) for position in positions)
    return replace(plain, backward=backward, activation_bytes=kept, workspace_bytes=workspace, weight_grad=weight,
                   kept_bytes=halves)


def _shared(graph: nx.DiGraph, order: tuple) -> tuple[tuple[str, float, tuple[int, ...], bool], ...]:
    readers: dict[str, tuple[float, list[int]]] = {}
    frozen: set[str] = set()
    for position, node in enumerate(order):
        frozen.update(graph.nodes[node].get("frozen") or ())
        for name, size in (graph.nodes[node].get("shared") or {}).items():
            readers.setdefault(name, (float(size), []))[1].append(position)
    return tuple((name, size, tuple(positions), name not in frozen)
                 for name, (size, positions) in sorted(readers.items()))
