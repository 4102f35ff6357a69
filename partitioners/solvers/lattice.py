"""Every pair of ideals that a stage may lie between, priced."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from partitioners.graph import Node
from partitioners.solvers.ideal_pricing import IdealPricer
from partitioners.solvers.ideals import Ideals, TooMany
from partitioners.solvers.problem import Kind, Problem


@dataclass(frozen=True)
class Lattice:
    """All ideals of a small problem, like the positions of an order: what a stage from one to another costs.

    ``loads`` per kind, inf where no stage leads; ``items`` are those of each ideal, the empty one first, the full one
    last.
    """
    loads: dict[Kind, np.ndarray]
    items: tuple[frozenset[int], ...]

    def stages(self, problem: Problem, places: tuple[int, ...]) -> tuple[tuple[Node, ...], ...]:
        """Nodes of the stages between these ideals."""
        return tuple(tuple(node for item in sorted(self.items[b] - self.items[a]) for node in problem.items[item])
                     for a, b in zip(places, places[1:]))


def lattice(problem: Problem, limit: int) -> Lattice | None:
    """The lattice of a problem with at most ``limit`` ideals."""
    try:
        ideals = Ideals(problem, limit)
    except TooMany:
        return None
    tables = {}
    must = None if problem.must_hold is None else ideals.sums(problem.must_hold.astype(float))
    for kind in dict.fromkeys(problem.levels):
        pricer = IdealPricer(ideals, kind)
        table = np.array([pricer.loads(ideal, 0, len(ideals)) for ideal in range(len(ideals))])
        if must is None:
            np.fill_diagonal(table, 0.0)
        else:
            table[must[None, :] <= must[:, None]] = np.inf
        tables[kind] = table
    return Lattice(tables, tuple(frozenset(ideals.items(ideal)) for ideal in range(len(ideals))))
