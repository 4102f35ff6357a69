"""The most activations that each worker of a schedule keeps at once."""
from __future__ import annotations

import numpy as np

from pipeengine.schedules import Schedule, Topology
from pipeengine.simulation.costs import Costs


def peak_activations(schedule: Schedule, costs: Costs | None = None) -> np.ndarray:
    """The most that each worker keeps at once for backward.

    In ``costs.activation``'s unit; without it in micro-batches of a whole worker: a stage counts its share.
    """
    held, kept, transient = _memory(schedule.topology, costs)
    zero = np.zeros_like(held)
    change = np.array([held, -held, kept - held, -kept])
    during = np.array([held, transient, transient, zero])
    peaks = []
    for op, stage, _ in schedule.lanes:
        before = np.cumsum(change[op, stage]) - change[op, stage]
        peaks.append(float((before + during[op, stage]).max(initial=0.0)))
    # Shares such as 1/3 do not add up exactly.
    return np.round(peaks, 9)


def _memory(topology: Topology, costs: Costs | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    zero = np.zeros(topology.num_stages)
    if costs is None or costs.activation is None:
        share = topology.shares()
        return share, share, zero
    held = np.array(costs.activation)
    kept = held if costs.weight_activation is None else np.array(costs.weight_activation)
    return held, kept, zero if costs.transient is None else np.array(costs.transient)
