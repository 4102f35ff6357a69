"""The one solver behind check, lowering and simulation: longest paths through lanes that wait for each other.

An action starts when the one before it in its lane has ended and when each action it waits for, plus that
wait's latency, has. Everything is an array over all actions, lanes one after another.
"""
from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Wait(NamedTuple):
    """One column of waits: action i starts ``latency[i]`` seconds or more after the end of ``on[i]`` (-1: none)."""
    on: np.ndarray
    latency: np.ndarray


@dataclass
class Stuck(Exception):
    """No action can run: lane l waits at ``position[l]`` (an index over all actions; its lane's end when done)."""
    position: np.ndarray
FEW = 10_000
"""Up to so many actions a plain walk is fastest."""


def solve(starts: np.ndarray, duration: np.ndarray, waits: tuple[Wait, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Start and end of every action, as early as possible. Raises ``Stuck`` when the order cannot complete.

    ``starts[l]`` is where lane l begins (their length last); ``duration`` and all ``latency`` are in seconds. Linear in
    the number of actions. Stretches that wait for nothing unknown are summed up at once; where times repeat, as they do
    in every regular schedule, stretches are copied from their predecessors and then verified. Both cost a few array
    operations per action, whatever the number of lanes.
    """
    end = _ends(starts, duration, waits)
    return _begin(starts, end, waits), end


def completes(starts: np.ndarray, waits: tuple[Wait, ...]) -> None:
    """Raise ``Stuck`` when the order cannot complete, whatever the times."""
    size = int(starts[-1])
    still = np.zeros(size)
    _ends(starts, np.ones(size), tuple(Wait(on, still) for on, _ in waits))


def _ends(starts: np.ndarray, duration: np.ndarray, waits: tuple[Wait, ...]) -> np.ndarray:
    if len(duration) <= FEW or duration.min() <= 0:
        return _worklist(starts, duration, waits)
    return _Leaps(starts, duration, waits).solve()


def _begin(starts: np.ndarray, end: np.ndarray, waits: tuple[Wait, ...]) -> np.ndarray:
    """The starts that belong to ``end``: exactly the largest end (plus latency) that each action waits for."""
    begin = np.empty_like(end)
    begin[1:] = end[:-1]
    begin[starts[:-1][starts[:-1] < len(end)]] = 0.0
    # Position -1 stands for "waits for nobody".
    ends = np.append(end, -np.inf)
    for on, latency in waits:
        there = ends[on]
        there += latency
        np.maximum(begin, there, out=begin)
    return begin


def _worklist(starts: np.ndarray, duration: np.ndarray, waits: tuple[Wait, ...]) -> np.ndarray:
    columns = [(on.tolist(), latency.tolist()) for on, latency in waits]
    duration_of = duration.tolist()
    position, last = starts[:-1].tolist(), starts[1:].tolist()
    end: list[float | None] = [None] * len(duration_of)
    waiting: dict[int, list[int]] = {}
    free = [0.0] * len(position)
    ready = list(range(len(position)))[::-1]
    while ready:
        lane = ready.pop()
        i, now, stop = position[lane], free[lane], last[lane]
        while i < stop:
            for on, latency in columns:
                other = on[i]
                if other >= 0:
                    ended = end[other]
                    if ended is None:
                        waiting.setdefault(other, []).append(lane)
                        break
                    if ended + latency[i] > now:
                        now = ended + latency[i]
            else:
                now += duration_of[i]
                end[i] = now
                if i in waiting:
                    ready.extend(waiting.pop(i))
                i += 1
                continue
            break
        position[lane], free[lane] = i, now
    if position != last:
        raise Stuck(np.array(position))
    return np.array(end, dtype=np.float64)


class _Leaps:
    """All lanes step together (one array operation per step); where the last steps repeat, leap; long stretches run.

    A run takes one lane as far as all that it waits for is known, as all forwards of GPipe are. A leap guesses that
    each lane goes on as before, ``lag`` seconds later per period, and checks each guess against its definition,
    ``end = max(end before, ends waited for + latency) + duration``. Times are positive, so guesses that end before the
    first wrong one rest on right ones only: these are kept, and stepping goes on from there.
    """

    def __init__(self, starts: np.ndarray, duration: np.ndarray, waits: tuple[Wait, ...]) -> None:
        self.starts, self.stops, self.duration, self.waits = starts[:-1], starts[1:], duration, waits
        # The last entry stands for "waits for nobody".
        self.end = np.full(len(duration) + 1, np.inf)
        self.end[-1] = -np.inf
        self.position = self.starts.copy()
        self.free = np.zeros(len(self.starts))
        self.live = np.flatnonzero(self.position < self.stops)

    def solve(self) -> np.ndarray:
        steps, failures = 256, 0
        self._run()
        while len(self.live):
            before = int(self.position.sum())
            self._step(steps)
            stepped = int(self.position.sum()) - before
            if len(self.live):
                leapt = self._leap() or self._run()
                failures = 0 if leapt > stepped else failures + 1
                steps = 256 if leapt > stepped else min(2 * steps, 1 << 16)
            if failures > 6 and len(self.starts) < 24:
                return _worklist(np.append(self.starts, self.stops[-1]), self.duration, self.waits)
        return self.end[:-1]

    def _run(self) -> int:
        """Lane by lane, each as far as it goes, while that is far; the number of actions gained."""
        ready, waiting = deque(self.live.tolist()), {}
        gained, visits, recent = 0, 0, 0
        while ready:
            lane, visits = ready.popleft(), visits + 1
            before = int(self.position[lane])
            blocker = self._run_lane(lane)
            ran = int(self.position[lane]) - before
            gained, recent = gained + ran, recent + ran
            if blocker is not None:
                waiting.setdefault(blocker, []).append(lane)
            if ran:
                ready.extend(waiting.pop(lane, ()))
            if visits % 32 == 0:
                if recent < 32 * 128:
                    break
                recent = 0
        self.live = self.live[self.position[self.live] < self.stops[self.live]]
        return gained

    def _run_lane(self, lane: int) -> int | None:
        """Run ``lane`` until an action waits for an unknown end; the lane of that end, None when all is done."""
        at, stop, width = int(self.position[lane]), int(self.stops[lane]), 64
        while at < stop:
            span = slice(at, min(at + width, stop))
            arrival = np.full(span.stop - at, self.free[lane])
            for on, latency in self.waits:
                np.maximum(arrival, self.end[on[span]] + latency[span], out=arrival)
            unknown = np.flatnonzero(arrival == np.inf)
            blockers = [on[at + unknown[0]] for on, _ in self.waits if len(unknown)]
            blockers = [on for on in blockers if self.end[on] == np.inf]
            arrival = arrival[:unknown[0]] if len(unknown) else arrival
            if len(arrival):
                duration = self.duration[at:at + len(arrival)]
                work = np.cumsum(duration)
                ends = work + np.maximum.accumulate(arrival - work + duration)
                at += len(ends)
                self.end[at - len(ends):at] = ends
                self.position[lane], self.free[lane] = at, ends[-1]
            if blockers:
                return int(np.searchsorted(self.starts, blockers[0], side="right")) - 1
            width = min(4 * width, 1 << 16)
        return None

    def _step(self, steps: int) -> None:
        end, free, position, duration, stops, waits = (self.end, self.free, self.position, self.duration, self.stops,
                                                       self.waits)
        live, far = self.live, float("inf")
        for _ in range(steps):
            at = position[live]
            start = free[live]
            for on, latency in waits:
                start = np.maximum(start, end[on[at]] + latency[at])
            ready = start < far
            now, lanes = at[ready], live[ready]
            if not len(now):
                raise Stuck(position)
            time = start[ready] + duration[now]
            end[now] = free[lanes] = time
            now += 1
            position[lanes] = now
            if (now == stops[lanes]).any():
                live = live[position[live] < stops[live]]
                if not len(live):
                    break
        self.live = live

    def _leap(self) -> int:
        """Guess, verify, keep what is right; the number of actions gained."""
        lag = self._lag()
        if lag is None:
            return 0
        guessed = [lane for lane in self.live.tolist() if self._guess(lane, lag)]
        limit = min((self._first_wrong(lane) for lane in guessed), default=np.inf)
        gained = 0
        for lane in guessed:
            at, stop = int(self.position[lane]), int(self.stops[lane])
            ends = self.end[at:stop]
            keep = len(ends) if limit == np.inf else int(np.searchsorted(ends, limit, side="left"))
            ends[keep:] = np.inf
            gained += keep
            if keep:
                self.position[lane], self.free[lane] = at + keep, ends[keep - 1]
        self.live = self.live[self.position[self.live] < self.stops[self.live]]
        return gained

    def _lag(self) -> float | None:
        """Seconds of the shortest period of the live lane that has come furthest, if its last ends repeat."""
        lane = int(self.live[np.argmax((self.position - self.starts)[self.live])])
        at = int(self.position[lane])
        ends = self.end[max(int(self.starts[lane]), at - 6000):at]
        for period in range(1, len(ends) // 4):
            width = max(2 * period, 16)
            gap = ends[-1] - ends[-1 - period]
            # Two probes reject most periods before the whole stretch is looked at.
            if abs(ends[-1 - period // 2 - 1] - ends[-2 - period - period // 2] - gap) > 1e-9 * gap:
                continue
            gaps = ends[-width:] - ends[-width - period:-period]
            if np.ptp(gaps) <= 1e-9 * gap:
                return float(gaps.mean())
        return None

    def _guess(self, lane: int, lag: float) -> bool:
        """Fill in the rest of ``lane`` as repetitions of its last ``lag`` seconds, if it has repeated so far."""
        first, at, stop = int(self.starts[lane]), int(self.position[lane]), int(self.stops[lane])
        done = self.end[first:at]
        if not len(done) or done[-1] < lag:
            return False
        period = len(done) - 1 - int(np.searchsorted(done, done[-1] - lag * (1 + 1e-9)))
        if period < 1:
            return False
        turns = -(-(stop - at) // period)
        guess = done[-period:] + lag * np.arange(1, turns + 1)[:, None]
        self.end[at:stop] = guess.ravel()[:stop - at]
        return True

    def _first_wrong(self, lane: int) -> float:
        """The guessed end of the first guess of ``lane`` that does not hold, inf when all do."""
        at, stop = int(self.position[lane]), int(self.stops[lane])
        for low in range(at, stop, 1 << 18):
            span = slice(low, min(low + (1 << 18), stop))
            right = self.end[low - 1:span.stop - 1].copy()
            for on, latency in self.waits:
                np.maximum(right, self.end[on[span]] + latency[span], out=right)
            right += self.duration[span]
            wrong = np.abs(right - self.end[span]) > 1e-9 * self.end[span]
            if wrong.any():
                return float(self.end[low + int(wrong.argmax())])
        return float("inf")
