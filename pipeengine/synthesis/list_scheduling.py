"""Orders made greedily in time: at each free moment I, else F, else W, else wait.

List scheduling: input gradients first, weight gradients into gaps, for a grid of warm-ups and patiences, one worker's
at a time after that. The gap filling goes back to Qi et al., Zero Bubble, ICLR 2024, section 3.
"""
from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence

from pipeengine.synthesis.problem import SLACK, Problem


class WarmupSchedule:
    """One order for one stage per worker, made in time: at each free moment I, else F, else W, else wait.

    Worker r takes F while fewer than ``warmup[r]`` micro-batches are between its F and I, and fills a wait
    with W when the wait is at least ``patience[r]`` of it.
    """

    def __init__(self, task: Problem, warmup: Sequence[int], patience: Sequence[float]) -> None:
        p, m, never = task.num_workers, task.microbatches, float("inf")
        self.task, self.warmup = task, warmup
        self.waits_for_w = [share * seconds for share, seconds in zip(patience, task.seconds[2])]
        self.arrived = [[[0.0 if r == 0 else never] * m for r in range(p)], [[never] * m for _ in range(p)]]
        self.done = [[0] * p for _ in range(3)]
        self.kept, self.first, self.free = [0.0] * p, [0.0] * p, [0.0] * p
        self.room = [task.cap[r] * (1 + SLACK) - task.held[r] for r in range(p)]
        self.lanes: list[list[int]] = [[] for _ in range(p)]
        self.heap = [(0.0, r) for r in range(p)]

    def build(self) -> float | None:
        """The objective's value, in seconds; None when memory blocks."""
        while self.heap:
            now, r = heapq.heappop(self.heap)
            if now >= self.free[r]:
                self._choose(now, r)
        if min(self.done[2]) < self.task.microbatches:
            return None
        if self.task.objective == "makespan":
            return max(self.free)
        return max(end - start for end, start in zip(self.free, self.first))

    def _choose(self, now: float, r: int) -> None:
        never, m = float("inf"), self.task.microbatches
        f, i, w = self.done[0][r], self.done[1][r], self.done[2][r]
        next_f = self.arrived[0][r][f] if f < m and f - i < self.warmup[r] else never
        next_i = self.arrived[1][r][i] if i < f else never
        room = self.kept[r] <= self.room[r]
        wait = min(next_i, next_f if room else never)
        if f + i == 0:
            self.first[r] = max(now, next_f)
        if next_i <= now:
            self._run(1, r, i, now)
        elif next_f <= now and room:
            self._run(0, r, f, now)
        elif w < i and (next_f <= now or wait - now >= self.waits_for_w[r]):
            self._run(2, r, w, now)
        elif wait < never:
            heapq.heappush(self.heap, (wait, r))

    def _run(self, op: int, r: int, k: int, now: float) -> None:
        task = self.task
        end = self.free[r] = now + task.seconds[op][r]
        self.done[op][r] += 1
        self.lanes[r].append(task.action(op, r, k))
        heapq.heappush(self.heap, (end, r))
        if op == 0:
            self.kept[r] += task.held[r]
            if r + 1 < task.num_workers:
                self._arrive(0, r + 1, k, end + task.hop[r + 1])
            else:
                self._arrive(1, r, k, end)
        elif op == 1:
            self.kept[r] -= task.held[r] - task.kept[r]
            if r:
                self._arrive(1, r - 1, k, end + task.hop[r])
        else:
            self.kept[r] -= task.kept[r]

    def _arrive(self, op: int, r: int, k: int, time: float) -> None:
        self.arrived[op][r][k] = time
        if self.free[r] <= time:
            heapq.heappush(self.heap, (time, r))


def build_lanes(task: Problem, warmup: Sequence[int], patience: Sequence[float]) -> list[list[int]]:
    """The action numbers of each worker in the order that these settings lead to."""
    schedule = WarmupSchedule(task, warmup, patience)
    schedule.build()
    return schedule.lanes


def warmup_candidates(task: Problem) -> Iterable[list[int]]:
    """Forwards before the first gradient, by when it arrives; times a few factors; the ladders of 1F1B and ZB-H2."""
    p = task.num_workers
    forward, inputs, _ = task.seconds
    for patience in (1.0, 0.9, 0.8, 0.6):
        yield _until_gradient(task, patience)
    trips = [sum(forward[r:]) + sum(inputs[r + 1:]) + 2 * sum(task.hop[r + 1:]) for r in range(p)]
    for factor in (1.0, 0.8, 0.9, 1.1, 0.7, 1.2, 1.4, 9.0):
        yield [max(1, min(task.fits(r), round(factor * trip / (forward[r] or 1.0)))) for r, trip in enumerate(trips)]
    for depth in (1, 2):
        yield [min(task.fits(r), depth * (p - 1 - r) + 1) for r in range(p)]


def _until_gradient(task: Problem, patience: float) -> list[int]:
    """Forwards that each worker has time for until its first gradient comes.

    One more where the rest is over ``patience`` of a forward; such a one makes the gradient late for all workers
    before.
    """
    forward, inputs, _ = task.seconds
    chosen, trip, late = [], 0.0, 0.0
    for r in reversed(range(task.num_workers)):
        trip += forward[r]
        wait, seconds = trip + late, forward[r] or 1.0
        count = max(1, min(task.fits(r), math.ceil(wait / seconds - patience - SLACK)))
        late += max(0.0, count * forward[r] - wait)
        trip += inputs[r] + 2 * task.hop[r]
        chosen.append(count)
    return chosen[::-1]


PATIENCES = (0.3, 1.0, 1e-4, 0.6, 0.9, 1.5, 3.0)


class WarmupSearch:
    """Remembers what settings lead to; builds ``budget`` orders at most."""

    def __init__(self, task: Problem, budget: int) -> None:
        self.task, self.left = task, budget
        self.known: dict[tuple[tuple[int, ...], tuple[float, ...]], float] = {}

    def price(self, warmup: Sequence[int], patience: Sequence[float]) -> float:
        """The objective's value of these settings in seconds; inf when memory blocks or the budget is spent."""
        key = tuple(warmup), tuple(patience)
        if key not in self.known:
            if self.left <= 0:
                return float("inf")
            self.left -= 1
            price = WarmupSchedule(self.task, *key).build()
            self.known[key] = float("inf") if price is None else price
        return self.known[key]

    def reached(self, bound: float) -> bool:
        """Whether some setting's makespan is as short as any can be."""
        return self.task.objective == "makespan" and min(self.known.values()) <= bound * (1 + SLACK)

    def best(self, number: int) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
        """The ``number`` best settings of different price."""
        chosen: dict[float, tuple[tuple[int, ...], tuple[float, ...]]] = {}
        for key, price in sorted(self.known.items(), key=lambda item: item[1]):
            if price < float("inf"):
                chosen.setdefault(round(price, 9), key)
        return list(chosen.values())[:number]

    def refine(self, key: tuple[tuple[int, ...], tuple[float, ...]]) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Change one worker's setting at a time while that helps."""
        warmup, patience = list(key[0]), list(key[1])
        price = before = self.price(warmup, patience)
        for _ in range(3):
            for r in range(self.task.num_workers):
                for settings, values in ((warmup, [max(1, warmup[r] + step) for step in (-1, 1, 2)]),
                                         (patience, (1e-4, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 3.0, 9.0))):
                    for value in values:
                        old, settings[r] = settings[r], value
                        new = self.price(warmup, patience)
                        if new < price - 1e-12:
                            price = new
                        else:
                            settings[r] = old
            if price >= before - 1e-12:
                break
            before = price
        return tuple(warmup), tuple(patience)


class InterleavedSchedule:
    """One order for several stages per worker, made in time: at each free moment I, else F, else W, else wait.

    A micro-batch enters when its activations of all stages have room everywhere, and when fewer than ``flying`` are
    between their first F and last I: so all that have entered can end, whatever the memory.
    """

    def __init__(self, task: Problem, flying: int, patience: float) -> None:
        self.task, self.flying, self.patience = task, flying, patience
        self.mine = [task.topology.stages_of(r) for r in range(task.num_workers)]
        self.here: list[list[list[int]]] = [[[] for _ in range(task.num_stages)] for _ in range(3)]
        self.entered = self.left = 0
        whole = [sum(task.held[s] for s in mine) for mine in self.mine]
        self.whole, self.room = whole, [cap * (1 + SLACK) for cap in task.cap]
        self.free = [0.0] * task.num_workers
        self.lanes: list[list[int]] = [[] for _ in range(task.num_workers)]
        self.events: list[tuple[float, int, int]] = [(0.0, r, -1) for r in range(task.num_workers)]

    def build(self) -> float:
        """The makespan in seconds."""
        count = self.task.size
        while self.events:
            now, r, action = heapq.heappop(self.events)
            if action >= 0:
                op, rest = divmod(action, self.task.num_stages * self.task.microbatches)
                self.here[op][rest // self.task.microbatches].append(rest % self.task.microbatches)
            # Whatever else happens at this time happens first.
            if self.free[r] <= now and not (self.events and self.events[0][0] <= now and self.events[0][1] == r):
                count -= self._choose(now, r)
        assert not count, "every micro-batch that has entered can end"
        return max(self.free)

    def _choose(self, now: float, r: int) -> int:
        for op in (1, 0):
            ready = [(self.here[op][s][0], -s) for s in self.mine[r] if self.here[op][s]]
            if ready:
                return self._run(op, r, -min(ready)[1], now)
        if 0 in self.mine[r] and self.entered < min(self.task.microbatches, self.left + self.flying) and all(
                whole <= room for whole, room in zip(self.whole, self.room)):
            self.here[0][0].append(self.entered)
            self.entered += 1
            self.room = [room - whole for whole, room in zip(self.whole, self.room)]
            return self._run(0, r, 0, now)
        ready = [(self.here[2][s][0], s) for s in self.mine[r] if self.here[2][s]]
        if ready:
            s = min(ready)[-1]
            coming = min((time for time, lane, _ in self.events if lane == r), default=float("inf"))
            if coming - now >= self.patience * self.task.seconds[2][s]:
                return self._run(2, r, s, now)
        return 0

    def _run(self, op: int, r: int, s: int, now: float) -> int:
        task, k = self.task, self.here[op][s].pop(0)
        end = self.free[r] = now + task.seconds[op][s]
        self.lanes[r].append(task.action(op, s, k))
        self.room[r] += (0.0, task.held[s] - task.kept[s], task.kept[s])[op]
        last, owner = task.num_stages - 1, task.topology.worker_of
        if op == 0:
            to, stage, hop = (1, s, 0.0) if s == last else (0, s + 1, task.hop[s + 1])
            heapq.heappush(self.events, (end + hop, owner[stage], task.action(to, stage, k)))
        elif op == 1:
            heapq.heappush(self.events, (end, r, task.action(2, s, k)))
            if s:
                heapq.heappush(self.events, (end + task.hop[s], owner[s - 1], task.action(1, s - 1, k)))
            else:
                self.left += 1
        # What has room now may enter at its own worker.
        heapq.heappush(self.events, (end, owner[0], -1))
        heapq.heappush(self.events, (end, r, -1))
        return 1
