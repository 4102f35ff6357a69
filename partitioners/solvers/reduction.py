"""Merging items without losing the optimum.

If ``u`` is the only item right before ``v``, then moving ``v`` to ``u``'s stage keeps the order. It costs that stage at
most ``w_v`` plus the nets of ``v`` that do not touch ``u``, and saves the nets ``{u, v}``. Where that is not positive
the move never hurts (the cut is symmetric and submodular, so ``v``'s old stage gains at least as much), and some
optimum has both together. The same holds backwards for the only item right after ``u``.
"""
from __future__ import annotations

from dataclasses import replace

import numpy as np

from partitioners.graph import Device
from partitioners.solvers.coarse import merge_items
from partitioners.solvers.problem import Problem


class _Merger:
    """Items with their costs, nets and reachability, while pairs are merged."""

    def __init__(self, problem: Problem, careful: bool) -> None:
        size = len(problem)
        self.problem = problem
        self.leader = list(range(size))
        kinds = list(dict.fromkeys(problem.levels))
        self.paying = [kind.device for kind in kinds if kind.device.pays_link]
        self.free = [kind.device for kind in kinds if not kind.device.pays_link]
        self.times = {device: problem.times[device].tolist() for device in problem.times}
        self.bytes = (problem.fixed_bytes + problem.activation_bytes + problem.workspace_bytes).tolist()
        for pins, weight in problem.shared:
            for pin in pins:
                self.bytes[pin] += weight
        self.tight = careful and problem.memory_may_bind()
        self.moved: set[int] = set()
        self.members = [[item] for item in range(size)]
        must = problem.must_hold
        self.keep = [False] * size if must is None else must.tolist()
        self.before, self.after = _reachability(problem)
        self.alive = (1 << size) - 1
        self.nets_of: list[set[int]] = [set() for _ in range(size)]
        link = problem.levels[0].link_in
        self.price = [net.seconds(link) * (2 if net.source < 0 else 1) for net in problem.nets]
        self.pins = [set(net.pins) for net in problem.nets]
        for number, pins in enumerate(self.pins):
            for pin in pins:
                self.nets_of[pin].add(number)
        self.predecessors = [set(items) for items in problem.predecessors]
        self.successors = [set(items) for items in problem.successors]

    def may_move(self, item: int, to: int) -> tuple[bool, bool]:
        """Whether ``item`` may join ``to`` on every paying device, and on every device that does not pay."""
        if self.keep[item] or (self.tight and self.bytes[item] > 0):
            return False, False
        extra = saved = 0.0
        for net in self.nets_of[item]:
            pins = self.pins[net]
            if to not in pins:
                extra += self.price[net]
            elif len(pins) == 2:
                saved += self.price[net]
        # A hair's breadth of rounding must not turn an exact rule into a wrong one.
        slack = saved * (1 - 1e-12) - extra if extra else saved
        paying = all(self.times[device][item] <= slack for device in self._homes(to, self.paying))
        return paying, all(self.times[device][item] <= 0 for device in self._homes(to, self.free))

    def _homes(self, item: int, devices: list[Device]) -> list[Device]:
        return [device for device in devices if self.times[device][item] < np.inf]

    def merge(self, item: int, into: int) -> None:
        """``into`` takes over everything of ``item``."""
        self.leader[item] = into
        self.moved |= set(self.members[item])
        self.members[into] += self.members[item]
        self.alive &= ~(1 << item)
        for device in self.times:
            self.times[device][into] += self.times[device][item]
        self.bytes[into] += self.bytes[item]
        self.keep[into] |= self.keep[item]
        for net in self.nets_of[item]:
            pins = self.pins[net]
            pins.discard(item)
            pins.add(into)
            if len(pins) == 1:
                self.nets_of[into].discard(net)
            else:
                self.nets_of[into].add(net)
        for mine, theirs in ((self.predecessors, self.successors), (self.successors, self.predecessors)):
            for other in mine[item]:
                theirs[other].discard(item)
                if other != into:
                    theirs[other].add(into)
                    mine[into].add(other)
            mine[into].discard(item)

    def only_before(self, item: int) -> int:
        """The one item right before ``item`` in the order, or -1."""
        if not self.predecessors[item]:
            return -1
        last = max(self.predecessors[item], key=lambda other: (self.before[other] & self.alive).bit_count())
        same = (self.before[item] ^ (self.before[last] | 1 << last)) & self.alive
        return -1 if same else last

    def only_after(self, item: int) -> int:
        """The one item right after ``item`` in the order, or -1."""
        if not self.successors[item]:
            return -1
        first = max(self.successors[item], key=lambda other: (self.after[other] & self.alive).bit_count())
        same = (self.after[item] ^ (self.after[first] | 1 << first)) & self.alive
        return -1 if same else first

    def try_pair(self, u: int, v: int, onto_u: bool, onto_v: bool) -> int:
        """Merge ``u`` and its follower ``v`` if a move is harmless; the item that disappeared, or -1."""
        back = self.may_move(v, u) if onto_u else (False, False)
        ahead = self.may_move(u, v) if onto_v else (False, False)
        if all(back) or (back[0] and ahead[0]):
            if not all(back):
                self.moved |= set(self.members[u])
            self.merge(v, u)
            return v
        if all(ahead):
            self.merge(u, v)
            return u
        return -1


def _reachability(problem: Problem) -> tuple[list[int], list[int]]:
    """Bit sets of all items before and after each."""
    size = len(problem)
    before, after = [0] * size, [0] * size
    for item in range(size):
        for other in problem.predecessors[item]:
            before[item] |= before[other] | 1 << other
    for item in reversed(range(size)):
        for other in problem.successors[item]:
            after[item] |= after[other] | 1 << other
    return before, after


def can_reduce(problem: Problem) -> bool:
    """The rule holds for the sum objective, equal links, and at most one device that does not pay."""
    links = {link for kind in problem.levels for link in (kind.link_in, kind.link_out)}
    if problem.counts is None:
        free = sum(not kind.device.pays_link for kind in problem.levels)
    else:
        free = sum(count for kind, count in zip(problem.levels, problem.counts) if not kind.device.pays_link)
    return problem.objective == "sum" and len(links) == 1 and free <= 1


def reduce_problem(problem: Problem) -> Problem:
    """A smaller problem with the same optimum; every solution of it is one of ``problem``."""
    return merge_items(problem, _merged(problem, careful=True).leader) if can_reduce(problem) else problem


def reduce_around_memory(problem: Problem) -> tuple[Problem, Problem]:
    """Two smaller problems where memory binds: one of fewer solutions, and one that forgets the bytes of moved items.

    Moving an item may then exceed a memory limit, so the optimum lies between theirs.
    """
    merger = _merged(problem, careful=False)
    moved = sorted(merger.moved)
    bare = [array.copy() for array in (problem.fixed_bytes, problem.activation_bytes, problem.workspace_bytes)]
    for array in bare:
        array[moved] = 0.0
    shared = tuple((tuple(pin for pin in pins if pin not in merger.moved), size) for pins, size in problem.shared)
    relaxed = replace(problem, fixed_bytes=bare[0], activation_bytes=bare[1], workspace_bytes=bare[2],
                      shared=tuple((pins, size) for pins, size in shared if pins))
    return merge_items(problem, merger.leader), merge_items(relaxed, merger.leader)


def _merged(problem: Problem, careful: bool) -> _Merger:
    """Merge until no pair can be; ``leader`` then points straight to the survivors."""
    merger = _Merger(problem, careful)
    work = set(range(len(problem)))
    while work:
        again: set[int] = set()
        for item in sorted(work):
            if not merger.alive >> item & 1:
                continue
            gone = _merge_around(merger, item)
            if gone >= 0:
                kept = merger.leader[gone]
                again |= {kept} | merger.predecessors[kept] | merger.successors[kept]
        work = again
    leader = merger.leader
    for item in range(len(leader)):
        while leader[leader[item]] != leader[item]:
            leader[item] = leader[leader[item]]
    return merger


def _merge_around(merger: _Merger, item: int) -> int:
    u = merger.only_before(item)
    if u >= 0:
        gone = merger.try_pair(u, item, True, merger.only_after(u) == item)
        if gone >= 0:
            return gone
    v = merger.only_after(item)
    if v >= 0:
        return merger.try_pair(item, v, merger.only_before(v) == item, True)
    return -1
