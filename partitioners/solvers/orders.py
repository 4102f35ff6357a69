"""Topological orders worth cutting."""
from __future__ import annotations

import heapq
from collections.abc import Iterator

from partitioners.solvers.problem import Problem

MANY = 64    # items of a net beyond which its neighbours keep their old price


def depth_first(problem: Problem, *, last_first: bool = True) -> list[int]:
    """Follow a branch to its join before starting the next: few values are live at any cut."""
    waiting = [len(before) for before in problem.predecessors]
    stack = [item for item in range(len(problem)) if not waiting[item]]
    if last_first:
        stack.reverse()
    order = []
    while stack:
        item = stack.pop()
        order.append(item)
        ready = []
        for after in problem.successors[item]:
            waiting[after] -= 1
            if not waiting[after]:
                ready.append(after)
        stack += reversed(ready) if last_first else ready
    return order


class _SmallestCut:
    """Ready items in a heap by what taking each would add to the cut; entries are replaced when that changes."""

    def __init__(self, problem: Problem) -> None:
        link = problem.levels[0].link_in
        self.problem = problem
        self.price = [net.seconds(link) for net in problem.nets]
        self.left = [len(net.pins) for net in problem.nets]
        self.begun = [False] * len(problem.nets)
        self.nets_of: list[list[int]] = [[] for _ in problem.items]
        for number, net in enumerate(problem.nets):
            for pin in net.pins:
                self.nets_of[pin].append(number)
        self.heap: list[tuple[float, int, int]] = []
        self.clock, self.stamp = 0, [0] * len(problem)

    def push(self, item: int) -> None:
        """Offer ``item``, or offer it again at today's price."""
        change = sum((0.0 if self.begun[net] else self.price[net]) - (self.price[net] if self.left[net] == 1 else 0.0)
                     for net in self.nets_of[item])
        self.clock += 1
        self.stamp[item] = self.clock
        heapq.heappush(self.heap, (change, -self.clock, item))

    def take(self) -> int:
        """The cheapest item, -1 when none is left."""
        while self.heap:
            _, tick, item = heapq.heappop(self.heap)
            if -tick == self.stamp[item]:
                self.stamp[item] = -1
                return item
        return -1

    def start(self, item: int) -> None:
        """Begin the nets of ``item``, and offer its ready neighbours anew."""
        for net in self.nets_of[item]:
            self.begun[net] = True
            self.left[net] -= 1
        for net in self.nets_of[item]:
            pins = self.problem.nets[net].pins
            for pin in pins if len(pins) <= MANY else ():
                if self.stamp[pin] > 0:
                    self.push(pin)


def smallest_cut(problem: Problem) -> list[int]:
    """Always take the item that leaves the least in flight; the latest ready one among equals."""
    greedy, order = _SmallestCut(problem), []
    waiting = [len(before) for before in problem.predecessors]
    for item, count in enumerate(waiting):
        if not count:
            greedy.push(item)
    while (item := greedy.take()) >= 0:
        order.append(item)
        greedy.start(item)
        for after in problem.successors[item]:
            waiting[after] -= 1
            if not waiting[after]:
                greedy.push(after)
    return order


def through(problem: Problem, chain: list[frozenset[int]]) -> list[int]:
    """The order of the smallest cut, made to pass through every ideal of ``chain``."""
    stage = {}
    for number, ideal in reversed(list(enumerate(chain))):
        stage.update(dict.fromkeys(ideal, number))
    return sorted(smallest_cut(problem), key=lambda item: stage.get(item, len(chain)))


def candidate_orders(problem: Problem) -> Iterator[list[int]]:
    """The recorded order first, then others, without repeats."""
    seen = set()
    for make in (lambda: list(range(len(problem))), lambda: depth_first(problem),
                 lambda: depth_first(problem, last_first=False), lambda: smallest_cut(problem)):
        order = make()
        if tuple(order) not in seen:
            seen.add(tuple(order))
            yield order
