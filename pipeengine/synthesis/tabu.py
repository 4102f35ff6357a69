"""Better orders by swapping neighbours on the critical path.

Tabu search, as for job shops: Nowicki and Smutnicki, Management Science 1996.
"""
from __future__ import annotations

import random

import numpy as np

from pipeengine.synthesis.problem import SLACK, Problem


class TabuSearch:
    """Tabu search over the lanes of one task: swap two neighbours of the critical path, by estimated length."""

    def __init__(self, task: Problem) -> None:
        self.task = task
        stages, m, owner = task.num_stages, task.microbatches, task.topology.worker_of
        number = np.arange(task.size)
        op, stage = number // (stages * m), number // m % stages
        self.lane_of = np.array(owner)[stage].tolist()
        self.seconds = np.array(task.seconds)[op, stage].tolist()
        held, kept = np.array(task.held), np.array(task.kept)
        self.change = np.stack([held, kept - held, -kept])[op, stage].tolist()
        hop = np.array([*task.hop, 0.0])
        # F waits for the F before it; I for the I after it; the last stage's I for its own F.
        last = (op == 1) & (stage == stages - 1)
        self.on = np.select([(op == 0) & (stage > 0), last, op == 1],
                            [number - m, number - stages * m, number + m], -1).tolist()
        self.on_hop = np.select([op == 0, last, op == 1], [hop[stage], 0.0, hop[stage + 1]], 0.0).tolist()
        end = (op == 0) & (stage == stages - 1)
        self.to = np.select([end, op == 0, (op == 1) & (stage > 0)],
                            [number + stages * m, number + m, number - m], -1).tolist()
        self.to_hop = np.select([end, op == 0, op == 1], [0.0, hop[stage + 1], hop[stage]], 0.0).tolist()
        self.own = np.where(op > 0, number - stages * m, -1).tolist()

    def heads(self, lanes: list[list[int]]) -> tuple[list[float], list[int]]:
        """Ends of all actions, and an order in which they can run."""
        seconds, on, on_hop, to, lane_of = self.seconds, self.on, self.on_hop, self.to, self.lane_of
        end, order = [-1.0] * self.task.size, []
        position, free = [0] * len(lanes), [0.0] * len(lanes)
        ready = list(range(len(lanes)))[::-1]
        while ready:
            r = ready.pop()
            lane, at, now = lanes[r], position[r], free[r]
            while at < len(lane):
                x = lane[at]
                other = on[x]
                if other >= 0:
                    if end[other] < 0:
                        break
                    now = max(now, end[other] + on_hop[x])
                now += seconds[x]
                end[x] = now
                order.append(x)
                at += 1
                if to[x] >= 0 and lane_of[to[x]] != r:
                    ready.append(lane_of[to[x]])
            position[r], free[r] = at, now
        assert len(order) == self.task.size, "a swap on the critical path never makes a circle"
        return end, order

    def tails(self, lanes: list[list[int]], order: list[int]) -> tuple[list[float], list[int]]:
        """Seconds from each action's start to the end of everything that must follow, and the next of its lane."""
        after = [-1] * self.task.size
        for lane in lanes:
            for x, y in zip(lane, lane[1:]):
                after[x] = y
        tail, to, to_hop, seconds = [0.0] * (self.task.size + 1), self.to, self.to_hop, self.seconds
        for x in reversed(order):
            longest, other = tail[after[x]], to[x]
            if other >= 0 and tail[other] + to_hop[x] > longest:
                longest = tail[other] + to_hop[x]
            tail[x] = longest + seconds[x]
        return tail, after

    def improve(self, lanes: list[list[int]], rounds: int, bound: float) -> tuple[float, list[list[int]]]:
        """The best order seen within ``rounds`` swaps, or the first that reaches ``bound`` seconds, and its seconds."""
        lanes, best, chosen = [list(lane) for lane in lanes], float("inf"), lanes
        draw, tabu = random.Random(0), {}
        for turn in range(rounds):
            end, order = self.heads(lanes)
            length = max(end[lane[-1]] for lane in lanes)
            if length < best - 1e-12:
                best, chosen = length, [list(lane) for lane in lanes]
            if best <= bound * (1 + SLACK):
                break
            moves = self._moves(lanes, end, *self.tails(lanes, order), length)
            allowed = [(price * (1 + 1e-6 * draw.random()), r, j) for price, r, j in moves
                       if price < best * (1 - SLACK) or tabu.get((lanes[r][j + 1], lanes[r][j]), -1) < turn]
            if not allowed:
                break
            _, r, j = min(allowed)
            x, y = lanes[r][j], lanes[r][j + 1]
            lanes[r][j], lanes[r][j + 1] = y, x
            tabu[x, y] = turn + 8 + draw.randrange(12)
        return best, chosen

    def _moves(self, lanes: list[list[int]], end: list[float], tail: list[float], after: list[int],
               length: float) -> list[tuple[float, int, int]]:
        """(estimated length, lane, position) of every swap on the critical path that memory and order allow."""
        moves, near, seconds, change = [], length * (1 - SLACK), self.seconds, self.change
        for r, lane in enumerate(lanes):
            kept, cap = 0.0, self.task.cap[r] * (1 + SLACK)
            for j in range(len(lane) - 1):
                x, y = lane[j], lane[j + 1]
                before, kept = kept, kept + change[x]
                if (end[x] + tail[x] - seconds[x] < near or end[y] + tail[y] - seconds[y] < near
                        or end[y] - seconds[y] > end[x] + length * SLACK or self.on[y] == x or self.own[y] == x
                        or before + change[y] > cap):
                    continue
                moves.append((self._estimate(end[lane[j - 1]] if j else 0.0, x, y, end, tail, after), r, j))
        return moves

    def _estimate(self, free: float, x: int, y: int, end: list[float], tail: list[float], after: list[int]) -> float:
        """Longest path through ``x`` or ``y`` once they are swapped."""
        on, to, seconds = self.on, self.to, self.seconds
        start_y = max(free, end[on[y]] + self.on_hop[y]) if on[y] >= 0 else free
        start_x = start_y + seconds[y]
        if on[x] >= 0:
            start_x = max(start_x, end[on[x]] + self.on_hop[x])
        tail_x = tail[after[y]]
        if to[x] >= 0:
            tail_x = max(tail_x, tail[to[x]] + self.to_hop[x])
        tail_x += seconds[x]
        tail_y = max(tail_x, tail[to[y]] + self.to_hop[y]) if to[y] >= 0 else tail_x
        return max(start_y + seconds[y] + tail_y, start_x + tail_x)
