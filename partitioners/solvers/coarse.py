"""Long orders made short: only promising positions stay cuttable."""
from __future__ import annotations

import heapq
from dataclasses import replace

import numpy as np

from partitioners.solvers.problem import Net, Problem


def crossing_seconds(problem: Problem) -> np.ndarray:
    """Seconds that the values in flight cost at each position ``0 .. n`` of the order."""
    steps = np.zeros(len(problem) + 2)
    link = problem.levels[0].link_in
    for net in problem.nets:
        price = net.seconds(link)
        steps[net.pins[0] + 1] += price
        steps[net.pins[-1] + 1] -= price
    return np.cumsum(steps)[:-1]


def crossing_tensors(problem: Problem) -> np.ndarray:
    """How many tensors cross each position of the order."""
    steps = np.zeros(len(problem) + 2, int)
    for pins in problem.crossing:
        steps[pins[0] + 1] += 1
        steps[pins[-1] + 1] -= 1
    return np.cumsum(steps)[:-1]


def promising_positions(problem: Problem, num_windows: int) -> np.ndarray:
    """Of each of ``num_windows`` windows of equal work, the position where least crosses (fewest tensors, then
    first)."""
    work = np.min([np.where(np.isfinite(times), times, 0.0) for times in problem.times.values()], axis=0)
    share = work / (work.sum() or 1.0) + 1.0 / (4 * len(problem))
    window = (np.cumsum(share) / share.sum() * num_windows * (1 - 1e-12)).astype(int)
    cost, tensors = crossing_seconds(problem)[1:], crossing_tensors(problem)[1:]
    ranked = np.lexsort((np.arange(len(problem)), tensors, cost.round(15), window))
    first = np.concatenate(([True], np.diff(window[ranked]) > 0))
    return np.sort(ranked[first] + 1)


def merge_runs(problem: Problem, ends: np.ndarray) -> Problem:
    """The problem whose items are the runs of ``problem`` that end at ``ends`` (the last one is added)."""
    ends = np.unique(np.concatenate((ends, [len(problem)])))
    return _merge(problem, np.searchsorted(ends, np.arange(len(problem)), side="right"))


def merge_items(problem: Problem, leader: list[int]) -> Problem:
    """The problem whose items are those of ``problem`` with the same ``leader``, in a topological order."""
    waiting = {item: set() for item in leader}
    after = {item: set() for item in leader}
    for u, v in problem.edges:
        if leader[u] != leader[v]:
            waiting[leader[v]].add(leader[u])
            after[leader[u]].add(leader[v])
    counts = {item: len(before) for item, before in waiting.items()}
    ready = [item for item, count in counts.items() if not count]
    heapq.heapify(ready)
    place: dict[int, int] = {}
    while ready:
        item = heapq.heappop(ready)
        place[item] = len(place)
        for other in after[item]:
            counts[other] -= 1
            if not counts[other]:
                heapq.heappush(ready, other)
    assert len(place) == len(waiting), "merging made a cycle"
    return _merge(problem, np.array([place[item] for item in leader]))


def _merge(problem: Problem, run: np.ndarray) -> Problem:
    """Sum up the items with the same number in ``run``, which numbers a topological order."""
    size = int(run.max()) + 1
    members: list[list] = [[] for _ in range(size)]
    for item, number in enumerate(run.tolist()):
        members[number] += problem.items[item]
    number_of = run.tolist()

    def moved(pins: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted({number_of[pin] for pin in pins}))

    def summed(values: np.ndarray) -> np.ndarray:
        return np.bincount(run, values, size)
    workspace = np.zeros(size)
    np.maximum.at(workspace, run, problem.workspace_bytes)
    edges = {(number_of[u], number_of[v]) for u, v in problem.edges if number_of[u] != number_of[v]}
    return replace(
        problem, items=tuple(map(tuple, members)), edges=tuple(sorted(edges)),
        nets=merge_nets(replace(net, source=number_of[net.source] if net.source >= 0 else -1, pins=moved(net.pins))
                        for net in problem.nets),
        shared=tuple((moved(pins), size) for pins, size in problem.shared),
        times={device: summed(values) for device, values in problem.times.items()},
        pieces=tuple(replace(piece, pins=moved(piece.pins)) for piece in problem.pieces),
        fixed_bytes=summed(problem.fixed_bytes), activation_bytes=summed(problem.activation_bytes),
        workspace_bytes=workspace,
        crossing=tuple(pins for pins in map(moved, problem.crossing) if len(pins) > 1),
        has_parameters=summed(problem.has_parameters) > 0)


def merge_nets(nets) -> tuple[Net, ...]:
    """Nets that can still be cut, those with the same source and items as one."""
    sums: dict[tuple[int, tuple[int, ...]], list[float]] = {}
    for net in nets:
        if len(net.pins) > 1:
            entry = sums.setdefault((net.source, net.pins), [0.0, 0.0, 0.0])
            entry[0] += net.fixed
            entry[1] += net.messages
            entry[2] += net.bytes
    return tuple(Net(source, pins, *entry) for (source, pins), entry in sums.items())
