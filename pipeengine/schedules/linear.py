"""Schedules with one stage per worker. p workers, m micro-batches, r the worker, k the micro-batch.

Each is a table of sort keys: a worker runs its actions in order of key.
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pipeengine.errors import ScheduleError
from pipeengine.schedules.schedule import B, F, I, Schedule, Topology, W, from_keys


def at_least(name: str, least: int, num_workers: int, num_microbatches: int) -> None:
    """Refuse fewer than ``least`` micro-batches, by name and number."""
    if num_microbatches < least:
        raise ScheduleError(f"{name} on {num_workers} workers is made for {least} micro-batches or more, not "
                            f"{num_microbatches}; the nearest that works is {least}")


def _linear(name: str, num_workers: int, num_microbatches: int,
            keys: Callable[[int, np.ndarray], dict[int, np.ndarray]]) -> Schedule:
    k = np.arange(num_microbatches)
    lanes = ([(op, np.full_like(k, r), k, key) for op, key in keys(r, k).items()] for r in range(num_workers))
    return from_keys(name, Topology.linear(num_workers), num_microbatches, lanes)


def gpipe(num_workers: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards, in the same order (Huang et al., GPipe, NeurIPS 2019)::

        0  F0 F1 F2 .  .  .  .  .  .  B0--- B1--- B2---
        1  .  F0 F1 F2 .  .  .  B0--- B1--- B2--- .  .
        2  .  .  F0 F1 F2 B0--- B1--- B2--- .  .  .  .
    """
    return _linear("gpipe", num_workers, num_microbatches,
                   lambda r, k: {F: k, B: num_microbatches + k})


def one_f_one_b(num_workers: int, num_microbatches: int) -> Schedule:
    """Warm up, then one forward and one backward in turn (Fan et al., DAPPLE, PPoPP 2021; PipeDream-Flush)::

        0  F0 F1 F2 .  .  .  .  B0--- F3 B1--- .  B2--- .  B3---
        1  .  F0 F1 .  .  B0--- F2 B1--- F3 B2--- .  B3--- .  .
        2  .  .  F0 B0--- F1 B1--- F2 B2--- F3 B3--- .  .  .  .
    """
    def keys(r: int, k: np.ndarray) -> dict[int, np.ndarray]:
        warmup = min(num_microbatches, num_workers - 1 - r)
        return {F: 2 * (k - warmup), B: 2 * k + 1}
    return _linear("1f1b", num_workers, num_microbatches, keys)


def zb_h1(num_workers: int, num_microbatches: int) -> Schedule:
    """1F1B with weight gradients moved into the bubble, at 1F1B's memory (Qi et al., Zero Bubble, ICLR 2024)::

        0  F0 F1 F2 .  .  I0 W0 F3 I1 W1 I2 W2 I3 W3
        1  .  F0 F1 .  I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
        2  .  .  F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3
    """
    return _zero_bubble("zb-h1", num_workers, num_microbatches, 1)


def zb_h2(num_workers: int, num_microbatches: int) -> Schedule:
    """As ZB-H1, with twice the warm-up and twice the memory: no bubble inside a worker's span (Qi et al.)::

        0  F0 F1 F2 F3 F4 I0 W0 I1 W1 I2 W2 I3 W3 I4 W4 .  .
        1  .  F0 F1 F2 I0 F3 I1 F4 I2 W0 I3 W1 I4 W2 W3 W4 .
        2  .  .  F0 I0 F1 I1 F2 I2 F3 I3 F4 I4 W0 W1 W2 W3 W4
    """
    return _zero_bubble("zb-h2", num_workers, num_microbatches, 2)


def _zero_bubble(name: str, num_workers: int, num_microbatches: int, depth: int) -> Schedule:
    at_least(name, depth * (num_workers - 1) + 1, num_workers, num_microbatches)

    def keys(r: int, k: np.ndarray) -> dict[int, np.ndarray]:
        return {F: 3 * (k - depth * (num_workers - 1 - r)), I: 3 * k + 1, W: 3 * (k + depth * r) + 2}
    return _linear(name, num_workers, num_microbatches, keys)


def forward_schedule(num_workers: int, num_microbatches: int, topology: Topology | None = None) -> Schedule:
    """Forward only, for evaluation: each micro-batch as early as it can run, stages of a worker in turn."""
    topology = topology or Topology.linear(num_workers)
    stages = [np.array(topology.stages_of(worker)) for worker in range(topology.num_workers)]
    visits = topology.visits(num_microbatches)
    lanes = []
    for own in stages:
        place, k = np.nonzero(visits[own])
        stage = own[place]
        # Micro-batch k reaches stage s at slot s + k: this order never waits for a later one.
        lanes.append([(F, stage, k, (stage + k) * topology.num_stages + stage)])
    return from_keys("forward", topology, num_microbatches, lanes)
