"""When messages go if every worker carries one at a time, the more urgent first.

A list schedule in time (Graham, 1969), with computations in their given order and messages free to overtake each other;
but a message lets a much more urgent one pass that will be there before it would be through.
"""
from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np


class Queue(NamedTuple):
    """Messages as columns: who sends and receives, which actions make and use each, and how long it takes.

    The smaller ``urgency`` goes first. A message with ``after`` waits until that action has begun (-1: none).
    """
    sender: np.ndarray
    receiver: np.ndarray
    made: np.ndarray
    used: np.ndarray
    latency: np.ndarray
    urgency: np.ndarray
    after: np.ndarray


class Times(NamedTuple):
    """Seconds: when each action begins, when each message could go, and when it goes."""
    begin: np.ndarray
    ready: np.ndarray
    sent: np.ndarray


def one_at_a_time(starts: np.ndarray, duration: np.ndarray, queue: Queue) -> Times:
    """Times of actions (lanes one after another, lane l from ``starts[l]``) and of the messages between them.

    ``duration`` is in seconds, one per action. Channels of both ends are taken for all of a message's latency. Events
    within a billionth of the shortest action count as one. About five microseconds per action and message.
    """
    return _EventSimulation(starts, duration, queue).run()


class _EventSimulation:
    """Actions and messages in time: whatever ends frees what waits for it."""

    def __init__(self, starts: np.ndarray, duration: np.ndarray, queue: Queue) -> None:
        size, lanes = len(duration), len(starts) - 1
        self.size, self.duration = size, duration.tolist()
        self.lane_of = np.repeat(np.arange(lanes), np.diff(starts)).tolist()
        self.position, self.stop = starts[:-1].tolist(), starts[1:].tolist()
        self.ends = list(zip(queue.sender.tolist(), queue.receiver.tolist()))
        self.used, self.latency = queue.used.tolist(), queue.latency.tolist()
        self.urgency = queue.urgency.tolist()
        self.grain = 1e-9 * float(duration.min(initial=1.0))
        self.missing = np.bincount(queue.used, minlength=size).tolist()
        self.bars = (1 + (queue.after >= 0)).tolist()
        self.frees = _listed(queue.made, size)
        self.opens = _listed(queue.after, size)
        self.begin, self.ready, self.sent = [0.0] * size, [0.0] * len(self.ends), [0.0] * len(self.ends)
        self.computing, self.carrying = [False] * lanes, [False] * lanes
        self.pending: list[set[int]] = [set() for _ in range(lanes)]
        self.coming: list[dict[int, float]] = [{} for _ in range(lanes)]
        self.events: list[tuple[float, int]] = []

    def run(self) -> Times:
        touched = set(range(len(self.position)))
        now = 0.0
        while True:
            for lane in touched:
                self._compute(lane, now)
            self._carry(touched, now)
            if not self.events:
                break
            now, touched = self.events[0][0], set()
            limit = now + self.grain
            while self.events and self.events[0][0] <= limit:
                now, number = heapq.heappop(self.events)
                touched.update(self._ended(number, now))
        return Times(np.array(self.begin), np.array(self.ready), np.array(self.sent))

    def _ended(self, number: int, now: float) -> tuple[int, ...]:
        """An action (or a message, counted from ``size`` on) has ended; the lanes that this concerns."""
        if number < self.size:
            lane = self.lane_of[number]
            self.computing[lane] = False
            for message in self.frees[number]:
                for end in self.ends[message]:
                    del self.coming[end][message]
            self._unbar(self.frees[number], now)
            # What let these messages pass may go now where they are still held back by what they come after.
            return (lane, *(end for message in self.frees[number] for end in self.ends[message]))
        number -= self.size
        sender, receiver = self.ends[number]
        self.carrying[sender] = self.carrying[receiver] = False
        self.missing[self.used[number]] -= 1
        return sender, receiver

    def _unbar(self, messages: list[int], now: float) -> list[int]:
        lanes = []
        for number in messages:
            self.bars[number] -= 1
            if not self.bars[number]:
                self.ready[number] = now
                for lane in self.ends[number]:
                    self.pending[lane].add(number)
                    lanes.append(lane)
        return lanes

    def _compute(self, lane: int, now: float) -> None:
        """Begin the next action of ``lane`` if it can."""
        number = self.position[lane]
        if self.computing[lane] or number >= self.stop[lane] or self.missing[number]:
            return
        self.computing[lane] = True
        self.begin[number] = now
        self.position[lane] = number + 1
        heapq.heappush(self.events, (now + self.duration[number], number))
        for message in self.frees[number]:
            for end in self.ends[message]:
                self.coming[end][message] = now + self.duration[number]
        self._unbar(self.opens[number], now)

    def _carry(self, touched: set[int], now: float) -> None:
        """Begin all messages that can go, among those of ``touched`` lanes, the most urgent first."""
        candidates = set().union(*(self.pending[lane] for lane in touched if not self.carrying[lane]))
        for number in sorted(candidates, key=lambda number: (self.urgency[number], number)):
            sender, receiver = self.ends[number]
            if not (self.carrying[sender] or self.carrying[receiver] or self._lets_pass(number, now)):
                self.carrying[sender] = self.carrying[receiver] = True
                self.pending[sender].discard(number)
                self.pending[receiver].discard(number)
                self.sent[number] = now
                heapq.heappush(self.events, (now + self.latency[number], self.size + number))

    def _lets_pass(self, number: int, now: float) -> bool:
        """Whether a message that is about to be made would rather have one of the channels that this one would take."""
        latency = self.latency[number]
        soon, urgent = now + latency - self.grain, self.urgency[number] - latency
        return any(time < soon and self.urgency[other] < urgent
                   for lane in self.ends[number] for other, time in self.coming[lane].items())


def _listed(owner: np.ndarray, size: int) -> list[list[int]]:
    """The numbers of the messages that belong to each action."""
    lists: list[list[int]] = [[] for _ in range(size)]
    for number, action in enumerate(owner.tolist()):
        if action >= 0:
            lists[action].append(number)
    return lists
