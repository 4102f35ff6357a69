"""Best cuts of a fixed order: all segment loads at once, then a min-max dynamic programme over them.

A net with items p1 < ... < pr changes the load of segments [a, b) on r + 1 rectangles of the (a, b) plane, so all n^2
loads come from one 2-D difference array and two running sums.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from partitioners.solvers.problem import Kind, Net, Problem

Rectangle = tuple[int, int, int, int]     # first and last + 1 start, first and last + 1 end


class Plane:
    """Sums of weighted rectangles over all segments ``[a, b)`` of ``n`` items."""

    def __init__(self, num_items: int) -> None:
        self.size = num_items + 2
        self.cells: list[int] = []
        self.weights: list[float] = []

    def add(self, rectangle: Rectangle, weight: float) -> None:
        """Add ``weight`` to every segment whose start and end lie in ``rectangle``."""
        first, last, low, high = rectangle
        if first >= last or low >= high:
            return
        size = self.size
        self.cells += (first * size + low, last * size + low, first * size + high, last * size + high)
        self.weights += (weight, -weight, -weight, weight)

    def total(self) -> np.ndarray:
        """The ``(n + 1, n + 1)`` sums."""
        grid = np.bincount(self.cells, self.weights, self.size ** 2) if self.cells else np.zeros(self.size ** 2)
        grid = grid.reshape(self.size, self.size)
        np.cumsum(grid, axis=0, out=grid)
        np.cumsum(grid, axis=1, out=grid)
        return grid[:-1, :-1]


def meets(pins: tuple[int, ...], num_items: int) -> Iterator[Rectangle]:
    """Segments that hold at least one of ``pins``."""
    before = -1
    for pin in pins:
        yield before + 1, pin + 1, pin + 1, num_items + 1
        before = pin


def holds_all(pins: tuple[int, ...], num_items: int) -> Rectangle:
    """Segments that hold every one of ``pins``."""
    return 0, pins[0] + 1, pins[-1] + 1, num_items + 1


def add_received(plane: Plane, net: Net, weight: float, num_items: int) -> None:
    """Segments that read the value and do not produce it."""
    readers = tuple(pin for pin in net.pins if pin != net.source)
    for rectangle in meets(readers, num_items):
        plane.add(rectangle, weight)
    source = net.source
    before = max((pin for pin in readers if pin < source), default=-1)
    after = min((pin for pin in readers if pin > source), default=num_items)
    plane.add((0, source + 1, source + 1, num_items + 1), -weight)
    plane.add((before + 1, source + 1, source + 1, after + 1), weight)


def add_sent(plane: Plane, net: Net, weight: float, num_items: int) -> None:
    """Segments that produce the value and do not hold all its readers."""
    plane.add((0, net.source + 1, net.source + 1, num_items + 1), weight)
    plane.add(holds_all(net.pins, num_items), -weight)


def add_cut(plane: Plane, net: Net, weight: float, num_items: int) -> None:
    """Segments that hold some but not all of the net."""
    for rectangle in meets(net.pins, num_items):
        plane.add(rectangle, weight)
    plane.add(holds_all(net.pins, num_items), -weight)


def segment_loads(problem: Problem, kind: Kind) -> np.ndarray:
    """Seconds of every segment ``[a, b)`` as one stage of ``kind``; inf where it cannot be one."""
    size = len(problem)
    work = _differences(problem.times[kind.device])
    if kind.device.pays_link:
        received, sent = Plane(size), Plane(size)
        if problem.objective == "sum":
            sent = received
        for net in problem.nets:
            cost_in, cost_out = net.seconds(kind.link_in), net.seconds(kind.link_out)
            if net.source < 0:
                add_cut(received, net, cost_in, size)
                add_cut(sent, net, cost_out, size)
            elif problem.objective == "sum" and cost_in == cost_out:
                add_cut(received, net, cost_in, size)
            else:
                add_received(received, net, cost_in, size)
                add_sent(sent, net, cost_out, size)
        if problem.objective == "sum":
            work += np.maximum(received.total(), 0.0)
        else:
            work = np.maximum(work, np.maximum(received.total(), sent.total()))
    _forbid(problem, kind, work)
    return work


def _differences(values: np.ndarray) -> np.ndarray:
    """Sums of all segments; inf for those that hold an infinite value."""
    finite = np.where(np.isfinite(values), values, 0.0)
    sums = np.concatenate(([0.0], np.cumsum(finite)))
    table = sums[None, :] - sums[:, None]
    if len(finite) and not np.isfinite(values).all():
        bad = np.concatenate(([0], np.cumsum(~np.isfinite(values))))
        table[bad[None, :] != bad[:, None]] = np.inf
    return table


def segment_memory(problem: Problem, kind: Kind) -> np.ndarray:
    """Bytes that every segment needs as one stage of ``kind``, before any recomputation."""
    size = len(problem)
    memory = _differences(problem.fixed_bytes + kind.in_flight * problem.activation_bytes)
    if problem.shared:
        plane = Plane(size)
        for pins, weight in problem.shared:
            for rectangle in meets(pins, size):
                plane.add(rectangle, weight)
        memory += plane.total()
    if problem.workspace_bytes.any():
        memory += segment_workspace(problem)
    return memory


def segment_workspace(problem: Problem) -> np.ndarray:
    """Scratch bytes of every segment: those of the item that needs most."""
    return _running_maxima(problem.workspace_bytes)


def _running_maxima(values: np.ndarray) -> np.ndarray:
    """Largest value of every segment ``[a, b)``."""
    size = len(values)
    table = np.zeros((size + 1, size + 1))
    for end in range(1, size + 1):
        np.maximum(table[:end, end - 1], values[end - 1], out=table[:end, end])
    return table


def _forbid(problem: Problem, kind: Kind, loads: np.ndarray) -> None:
    """Write inf where a segment is backwards, too large, or lacks what every stage must hold."""
    size = len(problem)
    if kind.device.memory is not None and problem.memory_may_bind():
        loads[segment_memory(problem, kind) > kind.device.memory * (1 + 1e-12)] = np.inf
    must = problem.must_hold
    if must is None:
        loads[np.tri(size + 1, k=-1, dtype=bool)] = np.inf
        np.fill_diagonal(loads, 0.0)
    else:
        sums = np.concatenate(([0], np.cumsum(must)))
        loads[sums[None, :] <= sums[:, None]] = np.inf


@dataclass(frozen=True)
class Cuts:
    """Positions ``0 = p0 <= p1 <= ... <= n`` of an order, the level of each run between them, and the largest load."""
    positions: tuple[int, ...]
    levels: tuple[int, ...]
    bottleneck: float


def states(problem: Problem) -> tuple[list[tuple[int, ...]], dict[tuple[int, ...], list[tuple[tuple[int, ...], int]]]]:
    """States of devices used, in order, and for each the ways in: (state before, level of the stage added)."""
    if problem.counts is None:
        chain = [(used,) for used in range(problem.num_stages + 1)]
        return chain, {chain[0]: [], **{chain[j + 1]: [(chain[j], j)] for j in range(problem.num_stages)}}
    used = sorted(product(*(range(count + 1) for count in problem.counts)), key=lambda state: (sum(state), state))
    ways = {state: [(tuple(value - (other == level) for other, value in enumerate(state)), level)
                    for level in range(len(state)) if state[level]] for state in used}
    return used, ways


def best_cuts(problem: Problem, loads: dict[Kind, np.ndarray], positions: np.ndarray | None = None) -> Cuts | None:
    """Cuts with the smallest possible largest load; None if there are none. O(stages n^2).

    Only ``positions`` may be cut, if given. Among equals, earlier cuts win, so the answer never depends on chance. The
    places may also be ideals: whatever ``loads`` has rows for, from the empty one to the full one.
    """
    size = len(next(iter(loads.values()))) - 1
    places = np.arange(size + 1) if positions is None else np.unique(np.concatenate(([0], positions, [size])))
    tables = {kind: table if positions is None else table[np.ix_(places, places)] for kind, table in loads.items()}
    order, ways = states(problem)
    reach = {order[0]: np.where(places == 0, 0.0, np.inf)}
    for state in order[1:]:
        best = np.full(len(places), np.inf)
        for before, level in ways[state]:
            np.minimum(best, _extend(reach[before], tables[problem.levels[level]]), out=best)
        reach[state] = best
    ends = order if problem.allow_empty else [order[-1]]
    end = min(ends, key=lambda state: reach[state][-1])
    if not np.isfinite(reach[end][-1]):
        return None
    return _walk_back(problem, tables, places, reach, ways, end)


def _extend(reach: np.ndarray, table: np.ndarray) -> np.ndarray:
    """``min over a of max(reach[a], table[a, b])`` for every b."""
    alive = np.flatnonzero(np.isfinite(reach))
    if not len(alive):
        return np.full(table.shape[1], np.inf)
    low, high = alive[0], alive[-1] + 1
    return np.maximum(reach[low:high, None], table[low:high]).min(axis=0)


def _walk_back(problem: Problem, tables: dict[Kind, np.ndarray], places: np.ndarray, reach: dict,
               ways: dict, state: tuple[int, ...]) -> Cuts:
    place, target = len(places) - 1, reach[state][-1]
    cuts, levels = [place], []
    while ways[state]:
        for before, level in ways[state]:
            values = np.maximum(reach[before], tables[problem.levels[level]][:, place])
            start = int(values.argmin())
            if values[start] <= reach[state][place]:
                break
        cuts.append(start)
        levels.append(level)
        place, state = start, before
    return Cuts(tuple(int(places[cut]) for cut in reversed(cuts)), tuple(reversed(levels)), float(target))


def fewest_cuts(problem: Problem, loads: dict[Kind, np.ndarray], count: np.ndarray, limit: float,
                positions: np.ndarray) -> tuple[float, Cuts] | None:
    """Cuts at some of ``positions`` with no load above ``limit`` whose sum of ``count`` is least, of those the ones
    with the lowest bottleneck; and that sum. None if there are none. O(stages n^2)."""
    places = np.unique(np.concatenate(([0], positions, [len(count) - 1])))
    tables = {kind: table[np.ix_(places, places)] for kind, table in loads.items()}
    prices = {kind: _prices(table, count[places], limit) for kind, table in tables.items()}
    order, ways = states(problem)
    total = {order[0]: np.where(places == 0, 0.0, np.inf)}
    worst = {order[0]: np.where(places == 0, 0.0, np.inf)}
    came: dict = {}
    for state in order[1:]:
        found = [_cheapest(total[before], worst[before], prices[problem.levels[level]], tables[problem.levels[level]])
                 for before, level in ways[state]]
        choice = np.lexsort((np.array([each[1] for each in found]), np.array([each[0] for each in found])), axis=0)[0]
        total[state], worst[state], starts = (np.choose(choice, [each[part] for each in found]) for part in range(3))
        came[state] = choice, starts
    ends = order if problem.allow_empty else [order[-1]]
    end = min(ends, key=lambda state: (total[state][-1], worst[state][-1]))
    if not np.isfinite(total[end][-1]):
        return None
    cuts, levels, state = [len(places) - 1], [], end
    while ways[state]:
        choice, starts = came[state]
        state, level = ways[state][int(choice[cuts[-1]])]
        cuts.append(int(starts[cuts[-1]]))
        levels.append(level)
    return float(total[end][-1]), Cuts(tuple(int(places[cut]) for cut in reversed(cuts)), tuple(reversed(levels)),
                                       float(worst[end][-1]))


def _prices(table: np.ndarray, count: np.ndarray, limit: float) -> np.ndarray:
    """What ends at each place of a segment; nothing for an empty one, inf where a segment is above ``limit``."""
    prices = np.where(table <= limit, count.astype(float), np.inf)
    empty = np.diag_indices(len(count))
    prices[empty] = np.where(table[empty] <= limit, 0.0, np.inf)
    return prices


def _cheapest(total: np.ndarray, worst: np.ndarray, prices: np.ndarray,
              table: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every end: the least sum, the smallest largest load with it, and where that segment starts."""
    alive = np.flatnonzero(np.isfinite(total))
    if not len(alive):
        return np.full(len(total), np.inf), np.full(len(total), np.inf), np.zeros(len(total), int)
    rows = slice(alive[0], alive[-1] + 1)
    sums = total[rows, None] + prices[rows]
    least = sums.min(axis=0)
    largest = np.where((sums == least) & np.isfinite(sums), np.maximum(worst[rows, None], table[rows]), np.inf)
    starts = largest.argmin(axis=0)
    return least, largest[starts, np.arange(len(total))], starts + alive[0]
