"""Schedules with several stages per worker, round and round: stage c * p + r is chunk c of worker r."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pipeengine.errors import ScheduleError
from pipeengine.schedules.schedule import B, F, I, Schedule, Topology, W, from_keys

_Keys = Callable[[int, np.ndarray, int], dict[int, np.ndarray]]


def _looped(name: str, num_workers: int, num_microbatches: int, stages_per_worker: int, rounds: int,
            keys: _Keys) -> Schedule:
    """A lane from keys over j, the place in the order round, chunk, micro-batch (chunks from the last in backward)."""
    if stages_per_worker < 1:
        raise ScheduleError(f"{name} with {stages_per_worker} stages per worker; the nearest that works is 1")
    first = -(-num_microbatches // rounds)
    chunk, k = _places(np.array_split(np.arange(num_microbatches), rounds), stages_per_worker)
    j, lanes = np.arange(len(k)), []
    for r in range(num_workers):
        chunks = {True: chunk, False: stages_per_worker - 1 - chunk}
        lanes.append([(op, chunks[op == F] * num_workers + r, k, key) for op, key in keys(r, j, first).items()])
    return from_keys(name, Topology.looped(num_workers, stages_per_worker), num_microbatches, lanes)


def _places(rounds: list[np.ndarray], num_chunks: int) -> tuple[np.ndarray, np.ndarray]:
    chunk = np.concatenate([np.repeat(np.arange(num_chunks), len(members)) for members in rounds])
    return chunk, np.concatenate([np.tile(members, num_chunks) for members in rounds])


def _rounds(num_workers: int, num_microbatches: int) -> int:
    """Rounds of near-equal size, none smaller than the workers: any number of micro-batches completes.

    (A short last round would deadlock.)
    """
    return max(num_microbatches // num_workers, 1)


def interleaved_one_f_one_b(num_workers: int, num_microbatches: int, stages_per_worker: int = 2) -> Schedule:
    """1F1B over loops: a bubble of one v-th, for v times the messages (Narayanan et al., SC 2021).

    Any number of micro-batches, not only multiples of the workers::

        0  F0 F1 F2 f0 f1 f2 .  b0--- .  b1--- .  b2--- B0--- B1--- B2---
        1  .  F0 F1 F2 f0 b0--- f1 b1--- f2 b2--- B0--- B1--- B2--- .  .
    """
    p, v, m = num_workers, stages_per_worker, num_microbatches

    def keys(r: int, j: np.ndarray, first: int) -> dict[int, np.ndarray]:
        warmup = min(m * v, (v - 1) * first + 2 * (p - 1 - r))
        return {F: 2 * (j - warmup), B: 2 * j + 1}
    return _looped("interleaved-1f1b", p, m, v, _rounds(p, m), keys)


def published_interleaved_seconds(num_workers: int, num_microbatches: int, stages_per_worker: int, work: float,
                                  hop: float) -> float:
    """Seconds of a step by the closed form behind the 1F1B-I column of Qi et al., Zero Bubble, ICLR 2024, table 5.

    ``work`` is F + I + W of one micro-batch on one worker, ``hop`` the time of one message, both in seconds. For
    multiples of the workers. An event simulation of the same order takes ``num_workers * hop`` longer: on its way
    through all stages a micro-batch crosses 2 (p v - 1) boundaries, and the published figures count p fewer.
    """
    p, m, v = num_workers, num_microbatches, stages_per_worker
    return m * work + (p - 1) * work / v + (2 * (p * v - 1) - p) * hop


def breadth_first(num_workers: int, num_microbatches: int, stages_per_worker: int = 2) -> Schedule:
    """GPipe over loops: each stage runs all its micro-batches at once (Lamy-Poirier, Breadth-First, MLSys 2023)::

        0  F0 F1 F2 f0 f1 f2 .  .  .  b0--- b1--- b2--- B0--- B1--- B2---
        1  .  F0 F1 F2 f0 f1 f2 b0--- b1--- b2--- B0--- B1--- B2--- .  .
    """
    def keys(r: int, j: np.ndarray, first: int) -> dict[int, np.ndarray]:
        return {F: j, B: len(j) + j}
    return _looped("bfs", num_workers, num_microbatches, stages_per_worker, 1, keys)


def interleaved_zero_bubble(num_workers: int, num_microbatches: int, stages_per_worker: int = 2) -> Schedule:
    """Interleaved 1F1B with weight gradients moved into the bubble, half its warm-up (as in torch; Qi et al.)::

        0  F0 F1 f0 f1 .  i0 w0 F2 i1 w1 F3 I0 W0 f2 I1 W1 f3 i2 w2 i3 w3 I2 W2 I3 W3
        1  .  F0 F1 f0 i0 f1 i1 w0 F2 I0 w1 F3 I1 W0 f2 i2 W1 f3 i3 w2 I2 w3 I3 W2 W3
    """
    p, v, m = num_workers, stages_per_worker, num_microbatches

    def keys(r: int, j: np.ndarray, first: int) -> dict[int, np.ndarray]:
        return {F: 3 * (j - (v - 1) * first - (p - 1 - r)), I: 3 * j + 1, W: 3 * (j + r) + 2}
    return _looped("interleaved-zb", p, m, v, _rounds(p, m), keys)
