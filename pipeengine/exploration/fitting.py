"""From a cut that needs more memory than there is to one that fits: more recomputes, or memory is shared out first."""
from __future__ import annotations

import math

import numpy as np

from pipeengine.exploration.chain import Chain
from pipeengine.exploration.judge import Scene, peak_bytes
from pipeengine.exploration.paths import fullest_moments
from pipeengine.exploration.relaxation import Relaxation
from pipeengine.exploration.ways import Cut
from pipeengine.schedules import Schedule
from pipeengine.simulation import microbatches_in_flight


def recompute_more(scene: Scene, chain: Chain, schedule: Schedule, cut: Cut) -> tuple[Cut | None, int]:
    """The same places where more recomputes: in every worker that is too full the stage that keeps most, whole or so
    many of its blocks as make up for what is missing, until all fit. Also how often memory was counted.

    None where even that is too much.
    """
    grain, room = scene.point.recompute, scene.hardware.memory or math.inf
    places, until = cut[0], list(cut[1])
    kept = chain.sums(chain.plain.activation_bytes)
    freed = chain.sums(chain.plain.activation_bytes - chain.again.activation_bytes) if grain == "blocks" else kept
    held = microbatches_in_flight(schedule)
    counted = 0
    while True:
        peaks = peak_bytes(scene, chain.price(places, tuple(until), grain), schedule)
        counted += 1
        full = [worker for worker, peak in enumerate(peaks) if peak > room]
        if not full or grain == "none":
            return None if full else (places, tuple(until)), counted
        for worker in full:
            gains = {stage: held[stage] * float(freed[places[stage + 1]] - freed[until[stage]])
                     for stage in schedule.topology.stages_of(worker) if until[stage] < places[stage + 1]}
            stage = max(gains, key=lambda stage: gains[stage], default=-1)
            if stage < 0 or gains[stage] <= 0:
                return None, counted
            end = places[stage + 1]
            if grain == "blocks":
                enough = freed[until[stage]] + (peaks[worker] - room) / held[stage]
                end = min(max(int(np.searchsorted(freed, enough)), until[stage] + 1), end)
            until[stage] = end


def shared_memory(schedule: Schedule, relaxed: Relaxation, cut: Cut, memory: float, kept_factor: float) -> list[float]:
    """The share of its worker's memory that each stage may have: its parameters, and of what is left as much as it
    would hold of activations if nothing recomputed."""
    held = relaxed.ways.held((cut[0], cut[0][:-1]))
    fixed, most = np.zeros(len(held)), np.zeros(len(held))
    for worker in range(schedule.topology.num_workers):
        own = list(schedule.topology.stages_of(worker))
        moments = [moment.counts[own] * held[own] for number, moment in fullest_moments(schedule, kept_factor)
                   if number == worker]
        fullest = max(moments, key=lambda each: float(each.sum()))
        fixed[own], most[own] = fullest[:, 3] / memory, fullest[:, 4:].sum(axis=1)
        most[own] *= max(0.0, 1.0 - fixed[own].sum()) / max(float(most[own].sum()), 1e-30)
    return (fixed + most).tolist()


def alike(schedule: Schedule, many: int) -> list[bool]:
    """Which stages recompute where every worker recomputes ``many`` of its own, those that hold most micro-batches."""
    held, flags = microbatches_in_flight(schedule), [False] * schedule.topology.num_stages
    for worker in range(schedule.topology.num_workers):
        for stage in sorted(schedule.topology.stages_of(worker), key=lambda stage: -held[stage])[:many]:
            flags[stage] = True
    return flags
