"""Topological orders worth cutting."""
from __future__ import annotations

import heapq
from collections.abc import Iterator

from partitioners.problem import Problem


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


def smallest_cut(problem: Problem) -> list[int]:
    """Always take the item that leaves the least in flight; the latest ready one among equals."""
    nets_of: list[list[int]] = [[] for _ in problem.items]
    for number, net in enumerate(problem.nets):
        for pin in net.pins:
            nets_of[pin].append(number)
    link = problem.levels[0].link_in
    price = [net.seconds(link) for net in problem.nets]
    left = [len(net.pins) for net in problem.nets]
    begun = [False] * len(left)
    waiting = [len(before) for before in problem.predecessors]

    def change(item: int) -> float:
        return sum((0.0 if begun[net] else price[net]) - (price[net] if left[net] == 1 else 0.0) for net in nets_of[item])

    clock, heap, order, stamp = 0, [], [], [0] * len(problem)

    def push(item: int) -> None:
        nonlocal clock
        clock += 1
        stamp[item] = clock
        heapq.heappush(heap, (change(item), -clock, item))

    for item in range(len(problem)):
        if not waiting[item]:
            push(item)
    while heap:
        _, tick, item = heapq.heappop(heap)
        if -tick != stamp[item]:
            continue
        stamp[item] = -1
        order.append(item)
        _start(item, nets_of, begun, left)
        for after in problem.successors[item]:
            waiting[after] -= 1
            if not waiting[after]:
                push(after)
        for net in nets_of[item]:
            if len(problem.nets[net].pins) <= 64:
                for pin in problem.nets[net].pins:
                    if stamp[pin] > 0:
                        push(pin)
    return order


def _start(item: int, nets_of: list[list[int]], begun: list[bool], left: list[int]) -> None:
    for net in nets_of[item]:
        begun[net] = True
        left[net] -= 1


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
