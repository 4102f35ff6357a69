"""From a schedule to a program: the messages between workers, placed.

``lower`` puts every send and receive along one total order of events in time, so that order is safe on one
in-order channel and fast on many. ``check`` trusts nobody, not even ``lower``.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from pipeengine.errors import ScheduleError
from pipeengine.program.message_queue import Queue, one_at_a_time
from pipeengine.program.program import Program, ProgramLane
from pipeengine.schedules import Edge, Schedule, Topology
from pipeengine.simulation import RA, RG, SA, SG, Costs, Timeline, simulate


class _Messages(NamedTuple):
    """The messages of one edge and direction, one entry per micro-batch: made and used by which actions, and after
    which other one (-1: none); seconds when each can go, and of its event."""
    grad: bool
    edge: Edge
    sender: int
    receiver: int
    microbatch: np.ndarray
    made: np.ndarray
    used: np.ndarray
    after: np.ndarray
    ready: np.ndarray
    time: np.ndarray
QUEUED, QUEUED_IF_BUSY = 4096, 65_536
"""Up to so many messages their order is found by playing one shared channel through; the second where one is busy for a
fifth of the time or more."""


def lower(schedule: Schedule, edges: Sequence[Edge] | None = None, costs: Costs | None = None, *,
          window: int | None = None) -> Program:
    """``schedule`` with a send and a receive for every edge and micro-batch that crosses workers.

    Each message is one event in time, and all workers have their messages in the order of these events: the first that
    is not through can always go, so no way of sharing channels can deadlock. The time is when the message goes if each
    worker carries one at a time; beyond ``QUEUED`` messages, or where they take no time, its producer's end. A receive
    stands one computation ahead of its event, so that it is posted while that computation runs. With ``window``, a
    message waits until the ``window``-th earlier one of its edge begins to be consumed: fewer buffers at the receiver
    where a schedule runs far ahead (GPipe), more at the sender. Blocks are dissolved: a worker runs one action at a
    time and sends each result when it is there.
    """
    edges = tuple(schedule.topology.chain() if edges is None else edges)
    topology, costs = schedule.topology, _never_free(costs or Costs.uniform(schedule.topology))
    schedule = replace(schedule, pairs=()) if schedule.pairs else schedule
    begin, events = _events(schedule, _crossing(topology, edges), costs, simulate(schedule, costs, edges), window)
    mine: list[list[_Messages]] = [[] for _ in range(topology.num_workers)]
    for messages in events:
        mine[messages.sender].append(messages)
        mine[messages.receiver].append(messages)
    lanes, planned = zip(*(_place(schedule, worker, mine[worker], begin) for worker in range(topology.num_workers)))
    return Program(schedule.name, topology, schedule.num_microbatches, edges, lanes, planned)


def _crossing(topology: Topology, edges: Sequence[Edge]) -> list[Edge]:
    """The edges between workers, in order of stages."""
    for edge in edges:
        if not 0 <= edge.source < edge.target < topology.num_stages:
            raise ScheduleError(f"edge from stage {edge.source} to {edge.target} of {topology.num_stages}; "
                                "edges lead from a stage to a later one")
    return sorted((edge for edge in edges if topology.worker_of[edge.source] != topology.worker_of[edge.target]),
                  key=lambda edge: (edge.source, edge.target))


def _never_free(costs: Costs) -> Costs:
    """``costs`` without ends of steps, and with no time at zero: two events in a row must not fall together."""
    least = 1e-3 * max(costs.forward + costs.backward + (1e-9,))
    times = {name: tuple(max(x, least) for x in getattr(costs, name))
             for name in ("forward", "input_grad", "weight_grad", "backward")}
    return Costs(**times, hop=costs.hop, bandwidth=costs.bandwidth, edge_bytes=costs.edge_bytes)


def _events(schedule: Schedule, edges: Sequence[Edge], costs: Costs, timeline: Timeline,
            window: int | None) -> tuple[np.ndarray, list[_Messages]]:
    """When each action begins; and all messages with their times, in the order that decides between equal times."""
    parts = list(_unqueued(schedule, edges, timeline, window))
    latencies = [costs.latency(part.edge) for part in parts]
    if not _collide(parts, latencies, timeline):
        return timeline.start, parts
    duration = timeline.end - timeline.start
    columns = [np.concatenate(column) for column in zip(*((part.made, part.used, part.after) for part in parts))]
    size = [len(part.made) for part in parts]
    # No message is for nothing, else two of one worker could have the same time.
    latency = np.repeat(np.maximum(latencies, 1e-6 * duration.min()), size)
    sender, receiver = (np.repeat([getattr(part, end) for part in parts], size) for end in ("sender", "receiver"))
    times = one_at_a_time(schedule.starts, duration, Queue(sender, receiver, *columns[:2], latency,
                                                           timeline.start[columns[1]], columns[2]))
    cuts = np.cumsum(size)[:-1]
    return times.begin, [part._replace(ready=ready, time=sent) for part, ready, sent in
                         zip(parts, np.split(times.ready, cuts), np.split(times.sent, cuts))]


def _collide(parts: Sequence[_Messages], latencies: Sequence[float], timeline: Timeline) -> bool:
    """Whether messages are long enough to be in each other's way, and few enough to find out how."""
    count, busy = sum(len(part.made) for part in parts), np.zeros(timeline.num_workers)
    for part, latency in zip(parts, latencies):
        busy[[part.sender, part.receiver]] += latency * len(part.made)
    return bool(busy.any()) and count <= (QUEUED if busy.max() < 0.2 * timeline.makespan else QUEUED_IF_BUSY)


def _unqueued(schedule: Schedule, edges: Sequence[Edge], timeline: Timeline, window: int | None) -> Iterator[_Messages]:
    """All messages, each with the time at which it can go when no other is in its way."""
    forward, backward, _ = schedule.tables
    worker_of = schedule.topology.worker_of
    # Times that differ by rounding alone count as equal, so that the order of these parts decides between them.
    grain = 1e-6 * float((timeline.end - timeline.start).min(initial=1.0))
    for grad, table in ((False, forward), (True, backward)):
        for edge in edges:
            if edge.gradient if grad else edge.activation:
                giver, taker = (edge.target, edge.source) if grad else (edge.source, edge.target)
                microbatch = np.flatnonzero((table[giver] >= 0) & (table[taker] >= 0))
                made, used = table[giver][microbatch], table[taker][microbatch]
                after = _held_back(timeline.start[used], used, window)
                time = np.where(after >= 0, np.maximum(timeline.end[made], timeline.start[after]), timeline.end[made])
                time = (np.floor(time / grain + 0.01) - 0.1) * grain
                yield _Messages(
                    grad, edge, worker_of[giver], worker_of[taker], microbatch, made, used, after, time, time
                )


def _held_back(consumed: np.ndarray, used: np.ndarray, window: int | None) -> np.ndarray:
    """Which consumption each message waits for: that of the ``window``-th earlier one of its edge; -1 for none."""
    after = np.full(len(used), -1, np.int64)
    if window is not None and len(used) > window:
        order = np.argsort(consumed, kind="stable")
        after[order[window:]] = used[order[:-window]]
    return after


def _place(schedule: Schedule, worker: int, messages: Sequence[_Messages],
           start: np.ndarray) -> tuple[ProgramLane, np.ndarray]:
    """One worker's lane: its computations with its messages put between them, and the planned time of each line."""
    begin = start[schedule.starts[worker]:schedule.starts[worker + 1]]
    op, stage, microbatch, peer, ready, time = _lines(messages, worker)
    sends = (op == SA) | (op == SG)
    gap = np.searchsorted(begin, np.where(sends, ready, time), side="left")
    gap = np.where(sends, gap, np.maximum(gap - 1, 0))
    if len(gap):
        np.maximum.accumulate(gap, out=gap)
    place = gap + np.arange(len(gap))
    free = np.ones(len(begin) + len(place), bool)
    free[place] = False
    computes, columns = np.flatnonzero(free), []
    for kind, line, own in zip((np.uint8, *(np.int32,) * 3, np.float64), (op, stage, microbatch, peer, time),
                               (*schedule.lanes[worker], -1, begin)):
        merged = np.empty(len(free), kind)
        merged[place], merged[computes] = line, own
        columns.append(merged)
    return ProgramLane(*columns[:4]), columns[4]


def _lines(messages: Sequence[_Messages], worker: int) -> tuple[np.ndarray, ...]:
    """Columns op, stage, micro-batch, peer, time when ready and time of ``worker``'s messages, in order of time."""
    parts = []
    for part in messages:
        op = (SG if part.grad else SA) if part.sender == worker else (RG if part.grad else RA)
        ends = part.edge.source, part.edge.target
        stage, peer = ends if op in (SA, RG) else ends[::-1]
        size = len(part.time)
        parts.append(
            (np.full(size, op), np.full(size, stage), part.microbatch, np.full(size, peer), part.ready, part.time)
        )
    if not parts:
        return tuple(np.zeros(0, kind) for kind in (int, int, int, int, float, float))
    columns = [np.concatenate(column) for column in zip(*parts)]
    order = np.argsort(columns[-1], kind="stable")
    return tuple(column[order] for column in columns)
