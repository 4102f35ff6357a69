"""Orders made for the costs at hand: ``auto``, and a bound that no order can beat.

Three steps. Deal actions greedily in time, input gradients first, weight gradients into gaps, for a grid of warm-ups
and patiences, one worker's at a time after that; add what the built-in schedules do; then swap neighbours
on the critical path (tabu search, as for job shops: Nowicki and Smutnicki, Management Science 1996). The gap filling
goes back to Qi et al., Zero Bubble, ICLR 2024, section 3. Deterministic: every worker of a job finds the same order.
"""
from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Iterable, Sequence

import numpy as np

from pipeengine.errors import ScheduleError
from pipeengine.program import check
from pipeengine.schedules import SCHEDULES, build
from pipeengine.schedules.form import B, F, I, Lane, Schedule, Topology, W
from pipeengine.timeline import Costs, peak_activations, simulate

_SLACK = 1e-9
OBJECTIVES = ("makespan", "span")


@dataclass(frozen=True)
class _Task:
    """What to order. Actions are numbers: ``(op * num_stages + stage) * microbatches + k``, op 0, 1, 2 for F, I, W."""
    topology: Topology
    microbatches: int
    seconds: tuple[tuple[float, ...], ...]
    hop: tuple[float, ...]
    held: tuple[float, ...]
    kept: tuple[float, ...]
    cap: tuple[float, ...]
    objective: str

    @cached_property
    def num_stages(self) -> int:
        return self.topology.num_stages

    @cached_property
    def num_workers(self) -> int:
        return self.topology.num_workers

    def action(self, op: int, stage: int, k: int) -> int:
        return (op * self.num_stages + stage) * self.microbatches + k

    @cached_property
    def size(self) -> int:
        return 3 * self.num_stages * self.microbatches

    def fits(self, worker: int) -> int:
        """Micro-batches that ``worker`` can hold at once."""
        held = min(self.held[stage] for stage in self.topology.stages_of(worker))
        whole = self.cap[worker] / held + _SLACK if held else self.microbatches
        return max(1, min(self.microbatches, int(whole)))


def _task(topology: Topology, microbatches: int, costs: Costs, max_peak: float | Sequence[float] | None,
          objective: str) -> _Task:
    if objective not in OBJECTIVES:
        raise ScheduleError(f"objective {objective!r} is none of {len(OBJECTIVES)} known; try {' or '.join(OBJECTIVES)}")
    if len(costs.forward) != topology.num_stages:
        raise ScheduleError(f"costs are for {len(costs.forward)} stages, {topology.num_workers} workers hold "
                            f"{topology.num_stages}; give one entry per stage")
    held = np.array(costs.activation) if costs.activation is not None else topology.shares()
    kept = held if costs.weight_activation is None else np.array(costs.weight_activation)
    whole = np.bincount(topology.worker_of, held, topology.num_workers)
    cap = topology.num_workers * whole if max_peak is None else np.broadcast_to(np.asarray(max_peak, float), whole.shape)
    if (cap < whole * (1 - _SLACK)).any():
        worker = int((whole - cap).argmax())
        raise ScheduleError(f"worker {worker} may keep {cap[worker]:,.6g} of activations, one micro-batch needs "
                            f"{whole[worker]:,.6g}; try micro-batches of fewer rows, or recomputation")
    owner = topology.worker_of
    hop = [0.0] + [costs.latency(edge) if owner[edge.source] != owner[edge.target] else 0.0 for edge in topology.chain()]
    return _Task(topology, microbatches, (costs.forward, costs.input_grad, costs.weight_grad), tuple(hop), tuple(held),
                 tuple(kept), tuple(cap), objective)


# ---------------------------------------------------------------- dealing

class _Deal:
    """One order for one stage per worker, made in time: at each free moment I, else F, else W, else wait.

    Worker r takes F while fewer than ``warmup[r]`` micro-batches are between its F and I, and fills a wait
    with W when the wait is at least ``patience[r]`` of it.
    """

    def __init__(self, task: _Task, warmup: Sequence[int], patience: Sequence[float]) -> None:
        p, m, never = task.num_workers, task.microbatches, float("inf")
        self.task, self.warmup = task, warmup
        self.waits_for_w = [share * seconds for share, seconds in zip(patience, task.seconds[2])]
        self.arrived = [[[0.0 if r == 0 else never] * m for r in range(p)], [[never] * m for _ in range(p)]]
        self.done = [[0] * p for _ in range(3)]
        self.kept, self.first, self.free = [0.0] * p, [0.0] * p, [0.0] * p
        self.room = [task.cap[r] * (1 + _SLACK) - task.held[r] for r in range(p)]
        self.lanes: list[list[int]] = [[] for _ in range(p)]
        self.heap = [(0.0, r) for r in range(p)]

    def play(self) -> float | None:
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


def _dealt(task: _Task, warmup: Sequence[int], patience: Sequence[float]) -> list[list[int]]:
    deal = _Deal(task, warmup, patience)
    deal.play()
    return deal.lanes


def _warmups(task: _Task) -> Iterable[list[int]]:
    """Forwards before the first gradient, by when it arrives; times a few factors; and the ladders of 1F1B and ZB-H2."""
    p = task.num_workers
    forward, inputs, _ = task.seconds
    for patience in (1.0, 0.9, 0.8, 0.6):
        yield _until_gradient(task, patience)
    trips = [sum(forward[r:]) + sum(inputs[r + 1:]) + 2 * sum(task.hop[r + 1:]) for r in range(p)]
    for factor in (1.0, 0.8, 0.9, 1.1, 0.7, 1.2, 1.4, 9.0):
        yield [max(1, min(task.fits(r), round(factor * trip / (forward[r] or 1.0)))) for r, trip in enumerate(trips)]
    for depth in (1, 2):
        yield [min(task.fits(r), depth * (p - 1 - r) + 1) for r in range(p)]


def _until_gradient(task: _Task, patience: float) -> list[int]:
    """Forwards that each worker has time for until its first gradient comes, one more where the rest is over ``patience``
    of a forward; such a one makes the gradient late for all workers before."""
    forward, inputs, _ = task.seconds
    chosen, trip, late = [], 0.0, 0.0
    for r in reversed(range(task.num_workers)):
        trip += forward[r]
        wait, seconds = trip + late, forward[r] or 1.0
        count = max(1, min(task.fits(r), math.ceil(wait / seconds - patience - _SLACK)))
        late += max(0.0, count * forward[r] - wait)
        trip += inputs[r] + 2 * task.hop[r]
        chosen.append(count)
    return chosen[::-1]


_PATIENCES = (0.3, 1.0, 1e-4, 0.6, 0.9, 1.5, 3.0)


class _Dealer:
    """Remembers what settings lead to; ``budget`` deals at most."""

    def __init__(self, task: _Task, budget: int) -> None:
        self.task, self.left = task, budget
        self.known: dict[tuple[tuple[int, ...], tuple[float, ...]], float] = {}

    def price(self, warmup: Sequence[int], patience: Sequence[float]) -> float:
        key = tuple(warmup), tuple(patience)
        if key not in self.known:
            if self.left <= 0:
                return float("inf")
            self.left -= 1
            price = _Deal(self.task, *key).play()
            self.known[key] = float("inf") if price is None else price
        return self.known[key]

    def reached(self, bound: float) -> bool:
        """Whether some setting's makespan is as short as any can be."""
        return self.task.objective == "makespan" and min(self.known.values()) <= bound * (1 + _SLACK)

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


class _Stream:
    """One order for several stages per worker, made in time: at each free moment I, else F, else W, else wait.

    A micro-batch enters when its activations of all stages have room everywhere, and when fewer than ``flying`` are
    between their first F and last I: so all that have entered can end, whatever the memory.
    """

    def __init__(self, task: _Task, flying: int, patience: float) -> None:
        self.task, self.flying, self.patience = task, flying, patience
        self.mine = [task.topology.stages_of(r) for r in range(task.num_workers)]
        self.here: list[list[list[int]]] = [[[] for _ in range(task.num_stages)] for _ in range(3)]
        self.entered = self.left = 0
        whole = [sum(task.held[s] for s in mine) for mine in self.mine]
        self.whole, self.room = whole, [cap * (1 + _SLACK) for cap in task.cap]
        self.free = [0.0] * task.num_workers
        self.lanes: list[list[int]] = [[] for _ in range(task.num_workers)]
        self.events: list[tuple[float, int, int]] = [(0.0, r, -1) for r in range(task.num_workers)]

    def play(self) -> float:
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


# ---------------------------------------------------------------- swapping

class _Swaps:
    """Tabu search over the lanes of one task: swap two neighbours of the critical path, by estimated length."""

    def __init__(self, task: _Task) -> None:
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
        """The best order seen within ``rounds`` swaps, or the first that reaches ``bound``."""
        lanes, best, chosen = [list(lane) for lane in lanes], float("inf"), lanes
        draw, tabu = random.Random(0), {}
        for turn in range(rounds):
            end, order = self.heads(lanes)
            length = max(end[lane[-1]] for lane in lanes)
            if length < best - 1e-12:
                best, chosen = length, [list(lane) for lane in lanes]
            if best <= bound * (1 + _SLACK):
                break
            moves = self._moves(lanes, end, *self.tails(lanes, order), length)
            allowed = [(price * (1 + 1e-6 * draw.random()), r, j) for price, r, j in moves
                       if price < best * (1 - _SLACK) or tabu.get((lanes[r][j + 1], lanes[r][j]), -1) < turn]
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
        moves, near, seconds, change = [], length * (1 - _SLACK), self.seconds, self.change
        for r, lane in enumerate(lanes):
            kept, cap = 0.0, self.task.cap[r] * (1 + _SLACK)
            for j in range(len(lane) - 1):
                x, y = lane[j], lane[j + 1]
                before, kept = kept, kept + change[x]
                if (end[x] + tail[x] - seconds[x] < near or end[y] + tail[y] - seconds[y] < near
                        or end[y] - seconds[y] > end[x] + length * _SLACK or self.on[y] == x or self.own[y] == x
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


# ---------------------------------------------------------------- the bound

def lower_bound(topology: Topology, num_microbatches: int, costs: Costs, max_peak: float | Sequence[float] | None = None,
                ) -> float:
    """Seconds that no order on this topology can beat (makespan, activations under ``max_peak``).

    Each action gets a time before which it cannot start and a time that must follow its end, from the actions before
    and after it on its way, from memory, and from its worker's own work. Then each worker alone, allowed to interrupt its
    actions, needs so long (Jackson's preemptive schedule; Carlier, European Journal of Operational Research 1982).
    """
    task = _task(topology, num_microbatches, costs, max_peak, "makespan")
    heads, tails = _earliest(task), _following(task)
    jobs: list[list[tuple[float, float, float]]] = [[] for _ in range(topology.num_workers)]
    for head, tail, seconds in zip(heads, tails, task.seconds):
        for stage, worker in enumerate(topology.worker_of):
            jobs[worker] += [(a, seconds[stage], b) for a, b in zip(head[stage], tail[stage])]
    return max(_alone(work) for work in jobs)


def _earliest(task: _Task) -> list[list[list[float]]]:
    """Per F, I, W, stage and k: when the k-th of them on that stage can start at the earliest."""
    m, stages, (f, i, w) = task.microbatches, task.num_stages, task.seconds
    heads = [[[0.0] * m for _ in range(stages)] for _ in range(3)]
    forward, inputs, weights = heads
    first = [sum(f[:s]) + sum(task.hop[:s + 1]) for s in range(stages)]
    for k in range(m):
        for s in range(stages):
            forward[s][k] = max(first[s] + k * f[s], _room(task, s, k, first[s] + k * f[s], inputs[s]),
                                forward[s - 1][k] + f[s - 1] + task.hop[s] if s else 0.0,
                                forward[s][k - 1] + f[s] if k else 0.0)
        for s in reversed(range(stages)):
            forced = _forced(task, s, k + 1, k)
            inputs[s][k] = max(first[s] + (k + 1) * f[s] + k * i[s] + forced * w[s], forward[s][k] + f[s],
                               inputs[s + 1][k] + i[s + 1] + task.hop[s + 1] if s + 1 < stages else 0.0,
                               inputs[s][k - 1] + i[s] if k else 0.0)
            weights[s][k] = inputs[s][k] + i[s]
    return heads


def _forced(task: _Task, s: int, forwards: int, inputs: int) -> int:
    """How many W must be done before so many F of stage ``s`` have started with so many I done, for want of memory."""
    worker = task.topology.worker_of[s]
    if len(task.topology.stages_of(worker)) > 1:
        return 0
    over = forwards * task.held[s] - inputs * (task.held[s] - task.kept[s]) - task.cap[worker] * (1 + _SLACK)
    if over <= 0:
        return 0
    return math.ceil(over / task.kept[s] - _SLACK) if task.kept[s] else forwards + 1


def _room(task: _Task, s: int, k: int, busy: float, inputs: Sequence[float]) -> float:
    """When there can be room for F number ``k`` of stage ``s``: the best mixture of I and W done before it.

    ``busy`` is when the forwards alone would be through; ``inputs`` holds the earliest starts of I so far.
    """
    if not _forced(task, s, k + 1, 0):
        return 0.0
    _, i, w = (row[s] for row in task.seconds)
    best = float("inf")
    for done in range(1, k + 1):
        # What comes later ends later; after many tries this is bound enough.
        if inputs[done - 1] + i >= best or done > 200:
            return min(best, inputs[done - 1] + i)
        forced = _forced(task, s, k + 1, done)
        if forced <= done:
            best = min(best, max(inputs[done - 1] + i, busy + done * i + forced * w,
                                 inputs[forced - 1] + i + w if forced else 0.0))
    return best


def _following(task: _Task) -> list[list[list[float]]]:
    """Per F, I, W, stage and k: the least time from the end of the k-th of them on that stage to the last end of all."""
    m, stages, (f, i, w) = task.microbatches, task.num_stages, task.seconds
    tails = [[[0.0] * m for _ in range(stages)] for _ in range(3)]
    forward, inputs, _ = tails
    for k in reversed(range(m)):
        for s in range(stages):
            inputs[s][k] = max((m - k) * w[s] + (m - 1 - k) * i[s],
                               inputs[s - 1][k] + i[s - 1] + task.hop[s] if s else 0.0,
                               inputs[s][k + 1] + i[s] if k + 1 < m else 0.0)
        for s in reversed(range(stages)):
            forward[s][k] = max((m - 1 - k) * f[s] + (m - k) * (i[s] + w[s]), inputs[s][k] + i[s],
                                forward[s + 1][k] + f[s + 1] + task.hop[s + 1] if s + 1 < stages else 0.0,
                                forward[s][k + 1] + f[s] if k + 1 < m else 0.0)
    return tails


def _alone(jobs: Sequence[tuple[float, float, float]]) -> float:
    """The least end of jobs (head, seconds, tail) on one worker that may interrupt: the longest tail goes first."""
    waiting = sorted(jobs, reverse=True)
    ready: list[tuple[float, float]] = []
    now, longest = 0.0, 0.0
    while waiting or ready:
        if not ready:
            now = max(now, waiting[-1][0])
        while waiting and waiting[-1][0] <= now:
            _, seconds, tail = waiting.pop()
            heapq.heappush(ready, (-tail, seconds))
        tail, seconds = heapq.heappop(ready)
        spent = min(seconds, waiting[-1][0] - now) if waiting else seconds
        now += spent
        if spent < seconds:
            heapq.heappush(ready, (tail, seconds - spent))
        else:
            longest = max(longest, now - tail)
    return longest


# ---------------------------------------------------------------- all together

def auto(num_workers: int, num_microbatches: int, stages_per_worker: int = 1, costs: Costs | None = None,
         max_peak: float | Sequence[float] | None = None, objective: str = "makespan") -> Schedule:
    """The best order found for ``costs``, with at most ``max_peak`` activations kept per worker (1F1B's unless given).

    Never worse than the best built-in schedule that fits the memory and runs these stages. ``max_peak`` is in the unit
    of ``costs.activation``, without that in micro-batches of a whole worker.
    """
    topology = Topology.looped(num_workers, stages_per_worker)
    costs = costs or Costs.uniform(topology)
    rivals = list(_built_in(num_workers, num_microbatches, stages_per_worker))
    best: tuple[float, Schedule] | None = None
    task = _task(topology, num_microbatches, costs, max_peak, objective)

    def offer(schedule: Schedule) -> float:
        nonlocal best
        if (peak_activations(schedule, costs) <= np.array(task.cap) * (1 + _SLACK)).all():
            price = getattr(simulate(schedule, replace(costs, exchange=None, optimizer=None)), objective)
            if best is None or price < best[0] * (1 - _SLACK):
                best = price, schedule
            return price
        return float("inf")

    prices = {number: offer(rival) for number, rival in enumerate(rivals)}
    fits = sorted((price, number) for number, price in prices.items() if price < float("inf"))
    starts = [_split(rivals[number]) for _, number in fits[:1 if stages_per_worker == 1 else 5]]
    for schedule in _searched(task, costs, starts):
        offer(schedule)
        offer(_fused(schedule, costs))
    if best is None:
        raise ScheduleError(f"no order of {num_microbatches} micro-batches found under {max(task.cap):,.6g} of "
                            f"activations; 1F1B needs {num_workers} micro-batches' worth, try max_peak={num_workers}")
    found = replace(best[1], name="auto")
    check(found, max_peak=np.array(task.cap), costs=costs)
    return found


def _built_in(num_workers: int, num_microbatches: int, stages_per_worker: int) -> Iterable[Schedule]:
    # Rounds are as many micro-batches as workers where these divide: less memory, also when the last round is short.
    for name, count in product(SCHEDULES, sorted({num_microbatches, -(-num_microbatches // num_workers) * num_workers})):
        if name == "auto":
            continue
        try:
            schedule = build(name, num_workers=num_workers, num_microbatches=count,
                             stages_per_worker=stages_per_worker if stages_per_worker > 1 else None)
        except ScheduleError:
            continue
        if schedule.topology.num_stages == num_workers * stages_per_worker and schedule.topology.num_routes == 1:
            yield replace(schedule.keep(num_microbatches), pairs=())


def _searched(task: _Task, costs: Costs, starts: Sequence[Schedule]) -> Iterable[Schedule]:
    """Orders from dealing and swapping, each start's best."""
    linear = task.num_stages == task.num_workers
    bound = lower_bound(task.topology, task.microbatches, costs, task.cap) if task.objective == "makespan" else 0.0
    lanes: list[tuple[Topology, list[list[int]]]] = []
    if linear:
        dealer = _Dealer(task, budget=max(40, 330_000 // task.size))
        for patience in _PATIENCES:
            for warmup in _warmups(task):
                dealer.price(warmup, [patience] * task.num_workers)
            if dealer.reached(bound):
                break
        for key in dealer.best(3):
            lanes.append((task.topology, _dealt(task, *(key if dealer.reached(bound) else dealer.refine(key)))))
    else:
        streams = [_Stream(task, flying, patience) for flying in (task.num_workers, task.microbatches)
                   for patience in (1e-4, 0.3, 1.0)]
        lanes.append((task.topology, min(streams, key=_Stream.play).lanes))
    lanes += [(start.topology, _numbers(task, start)) for start in starts]
    rounds = min(220, 160_000 // task.size) * (1 if linear else 2) if task.objective == "makespan" else 0
    for topology, order in lanes:
        here = replace(task, topology=topology)
        length, order = _Swaps(here).improve(order, rounds, bound) if rounds else (float("inf"), order)
        yield _schedule(here, order)
        if length <= bound * (1 + _SLACK):
            return


def _split(schedule: Schedule) -> Schedule:
    """``schedule`` with every B as I and W."""
    lanes = []
    for op, stage, microbatch in schedule.lanes:
        twice = np.where(op == B, 2, 1)
        op = np.repeat(op, twice)
        whole = np.flatnonzero(op == B)
        op[whole[::2]], op[whole[1::2]] = I, W
        lanes.append(Lane(op, np.repeat(stage, twice), np.repeat(microbatch, twice)))
    return replace(schedule, lanes=tuple(lanes), pairs=())


def _fused(schedule: Schedule, costs: Costs) -> Schedule:
    """``schedule`` with B for each I that its own W follows, where B takes no longer and nobody waits for the I."""
    lanes = []
    for op, stage, microbatch in schedule.lanes:
        gain = (np.array(costs.backward) <= np.add(costs.input_grad, costs.weight_grad) * (1 + _SLACK))[stage[:-1]]
        joined = ((op[:-1] == I) & (op[1:] == W) & (stage[:-1] == stage[1:]) & (microbatch[:-1] == microbatch[1:])
                  & (stage[:-1] == 0) & gain)
        keep = np.append(True, ~joined)
        op = op.copy()
        op[:-1][joined] = B
        lanes.append(Lane(op[keep], stage[keep], microbatch[keep]))
    return replace(schedule, lanes=tuple(lanes))


def _numbers(task: _Task, schedule: Schedule) -> list[list[int]]:
    code = np.array([0, -1, 1, 2])
    return [((code[op] * task.num_stages + stage) * task.microbatches + microbatch).tolist()
            for op, stage, microbatch in schedule.lanes]


def _schedule(task: _Task, lanes: Sequence[Sequence[int]]) -> Schedule:
    letters = np.array([F, I, W])
    columns = []
    for lane in lanes:
        rest, microbatch = np.divmod(np.array(lane, np.int64), task.microbatches)
        op, stage = np.divmod(rest, task.num_stages)
        columns.append(Lane.of(letters[op], stage, microbatch))
    return Schedule("auto", task.topology, task.microbatches, tuple(columns))


__all__ = ["OBJECTIVES", "auto", "lower_bound"]
