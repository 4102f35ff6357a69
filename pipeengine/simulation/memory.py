"""What the order of a schedule keeps: activations per worker, micro-batches per stage."""
from __future__ import annotations

import numpy as np

from partitioners import MemoryModel
from pipeengine.schedules import Schedule, Topology
from pipeengine.simulation.costs import Costs


def peak_activations(schedule: Schedule, costs: Costs | None = None) -> np.ndarray:
    """The most that each worker keeps at once for backward: one float64 per worker.

    In ``costs.activation``'s unit (bytes, for the costs of a plan); without it in micro-batches of a whole worker: a
    stage counts its share.
    """
    activation, weight_activation, transient = _sizes(schedule.topology, costs)
    zero = np.zeros_like(activation)
    change = np.array([activation, -activation, weight_activation - activation, -weight_activation])
    during = np.array([activation, transient, transient, zero])
    peaks = []
    for op, stage, _ in schedule.lanes:
        before = np.cumsum(change[op, stage]) - change[op, stage]
        peaks.append(float((before + during[op, stage]).max(initial=0.0)))
    # Shares such as 1/3 do not add up exactly.
    return np.round(peaks, 9)


def microbatches_in_flight(schedule: Schedule) -> tuple[int, ...]:
    """How many micro-batches each stage holds at its peak: those from their F to the end of their B, or of their W."""
    change = np.array([1, -1, 0, -1])
    peaks = [0] * schedule.topology.num_stages
    for op, stage, _ in schedule.lanes:
        for own in np.unique(stage).tolist():
            peaks[own] = int(np.cumsum(change[op[stage == own]]).max(initial=0))
    return tuple(peaks)


def memory_model_of(schedule: Schedule) -> MemoryModel:
    """The planner's model of what this order keeps: ``"1f1b"`` where no worker holds more than 1F1B's fullest, else
    ``"gpipe"``.

    Stages count alike, and a worker by all that its stages hold at once: interleaved orders hold more of an early stage
    than 1F1B does and less of a late one. Orders that put weight gradients off (ZB-H1) fill every worker as 1F1B fills
    its first; to take them for GPipe, which holds all micro-batches, would be further from the truth.
    """
    topology, model = schedule.topology, MemoryModel(schedule="1f1b")
    counts = Costs((0.0,) * topology.num_stages, activation=(1.0,) * topology.num_stages)
    allowed = np.zeros(topology.num_workers)
    for stage, worker in enumerate(topology.worker_of):
        allowed[worker] += model.in_flight(stage, topology.num_stages, schedule.num_microbatches)
    enough = peak_activations(schedule, counts).max() <= allowed.max()
    return model if enough else MemoryModel(schedule="gpipe")


def _sizes(topology: Topology, costs: Costs | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per stage: what a micro-batch keeps from F on, what of it stays from I to W, what backward needs on top."""
    zero = np.zeros(topology.num_stages)
    if costs is None or costs.activation is None:
        share = topology.shares()
        return share, share, zero
    activation = np.array(costs.activation)
    weight_activation = activation if costs.weight_activation is None else np.array(costs.weight_activation)
    return activation, weight_activation, zero if costs.transient is None else np.array(costs.transient)
