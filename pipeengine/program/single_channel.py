"""A program in time when all messages of a worker share one in-order channel, as on one communicator of NCCL."""
from __future__ import annotations

import numpy as np

from pipeengine.program.checking import match_messages, one_each
from pipeengine.program.program import Program
from pipeengine.simulation import SA, Costs, Timeline, Wait, solve


def simulate_channel(program: Program, costs: Costs) -> Timeline:
    """The timeline of ``program``, its messages included as entries of the sender, when none may overtake another.

    A message starts when both workers have come to its line and their earlier messages are through; computation
    goes on meanwhile, and waits only for what it needs.
    """
    send, receive, consumer = match_messages(program)
    op, stage, microbatch, peer = program.columns
    lane = np.repeat(np.arange(len(program.lanes)), np.diff(program.starts))
    compute = np.flatnonzero(op < SA)
    send_order = np.argsort(send, kind="stable")
    send, receive, consumer = send[send_order], receive[send_order], consumer[send_order]
    # Nodes: computations in their lanes, then messages, each worker's sends being a lane of their own.
    node = np.full(program.num_actions, -1, np.int64)
    node[compute] = np.arange(len(compute))
    node[send] = node[receive] = len(compute) + np.arange(len(send))
    starts = np.concatenate([np.searchsorted(compute, program.starts[:-1]),
                             len(compute) + np.searchsorted(send, program.starts)])
    is_message = op >= SA
    waits = [_waits(len(compute) + len(send), node[send], np.where(at >= 0, node[at], -1))
             for lines in (send, receive)
             for at in (_latest(program, lane, ~is_message, lines), _latest(program, lane, is_message, lines))]
    for waiter, on in one_each(consumer, send):
        waits.append(_waits(len(compute) + len(send), node[waiter], node[on]))
    latency = {(edge.source, edge.target): costs.latency(edge) for edge in program.edges}
    pairs = zip(np.minimum(stage[send], peer[send]).tolist(), np.maximum(stage[send], peer[send]).tolist())
    duration = np.concatenate([costs.duration(op[compute], stage[compute]), [latency[pair] for pair in pairs]])
    begin, end = solve(starts, duration, tuple(waits))
    lines = np.concatenate([compute, send])
    order = np.argsort(lane[lines], kind="stable")
    lines, begin, end = lines[order], begin[order], end[order]
    return Timeline(program.name, program.topology.num_workers, program.num_microbatches, lane[lines].astype(np.int32),
                    op[lines], stage[lines], microbatch[lines], begin, end)


def _waits(size: int, waiter: np.ndarray, on: np.ndarray) -> Wait:
    column = np.full(size, -1, np.int64)
    column[waiter] = on
    return Wait(column, np.zeros(size))


def _latest(program: Program, lane: np.ndarray, which: np.ndarray, lines: np.ndarray) -> np.ndarray:
    """The nearest line of ``which`` before each of ``lines`` in its lane, -1 for none."""
    latest = np.maximum.accumulate(np.where(which, np.arange(len(which)), -1))
    before = np.where(lines > 0, latest[lines - 1], -1)
    return np.where(before >= program.starts[lane[lines]], before, -1)
