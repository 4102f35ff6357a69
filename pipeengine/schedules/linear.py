"""Schedules with one stage per worker. p workers, m micro-batches, r the worker, k the micro-batch.

Each is a table of sort keys: a worker runs its actions in order of key.
"""
from __future__ import annotations

from typing import Callable

import numpy as np

from pipeengine.schedules.form import B, F, I, W, Schedule, Topology, from_keys


def _linear(name: str, num_workers: int, num_microbatches: int,
            keys: Callable[[int, np.ndarray], dict[int, np.ndarray]]) -> Schedule:
    k = np.arange(num_microbatches)
    lanes = ([(op, np.full_like(k, r), k, key) for op, key in keys(r, k).items()] for r in range(num_workers))
    return from_keys(name, Topology.linear(num_workers), num_microbatches, lanes)


def gpipe(num_workers: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards, in the same order (Huang et al., GPipe, NeurIPS 2019)::

        0  F0 F1 F2 .  .  B0 .  B1 .  B2
        1  .  F0 F1 F2 B0 .  B1 .  B2
    """
    return _linear("gpipe", num_workers, num_microbatches,
                   lambda r, k: {F: k, B: num_microbatches + k})


def one_f_one_b(num_workers: int, num_microbatches: int) -> Schedule:
    """Warm up, then one forward and one backward in turn (Fan et al., DAPPLE, PPoPP 2021; PipeDream-Flush)::

        0  F0 F1 .  B0 F2 .  B1 .  B2
        1  .  F0 B0 F1 B1 F2 B2
    """
    def keys(r: int, k: np.ndarray) -> dict[int, np.ndarray]:
        warmup = min(num_microbatches, num_workers - 1 - r)
        return {F: 2 * (k - warmup), B: 2 * k + 1}
    return _linear("1f1b", num_workers, num_microbatches, keys)


def forward_schedule(num_workers: int, num_microbatches: int, topology: Topology | None = None) -> Schedule:
    """Forward only, for evaluation: each micro-batch as early as it can run, stages of a worker in turn."""
    topology = topology or Topology.linear(num_workers)
    stages = [np.array(topology.stages_of(worker)) for worker in range(topology.num_workers)]
    visits = topology.visits(num_microbatches)
    lanes = []
    for held in stages:
        stage, k = (np.nonzero(visits[held]))
        # Micro-batch k reaches stage s at slot s + k: this order never waits for a later one.
        lanes.append([(F, held[stage], k, (held[stage] + k) * topology.num_stages + held[stage])])
    return from_keys("forward", topology, num_microbatches, lanes)
