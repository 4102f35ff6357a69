"""What is to be ordered, as numbers."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeengine.errors import ScheduleError
from pipeengine.schedules import Topology
from pipeengine.simulation import Costs

SLACK = 1e-9
OBJECTIVES = ("makespan", "span")


@dataclass(frozen=True)
class Problem:
    """What to order. Actions are numbers: ``(op * num_stages + stage) * microbatches + k``, op 0, 1, 2 for F, I, W."""
    topology: Topology
    microbatches: int
    seconds: tuple[tuple[float, ...], ...]
    hop: tuple[float, ...]
    held: tuple[float, ...]
    kept: tuple[float, ...]
    cap: tuple[float, ...]
    objective: str

    @cached_property
    def num_stages(self) -> int:
        """Stages of the topology."""
        return self.topology.num_stages

    @cached_property
    def num_workers(self) -> int:
        """Workers of the topology."""
        return self.topology.num_workers

    def action(self, op: int, stage: int, k: int) -> int:
        """The number of an action; ``op`` is 0, 1, 2 for F, I, W."""
        return (op * self.num_stages + stage) * self.microbatches + k

    @cached_property
    def size(self) -> int:
        """How many actions there are."""
        return 3 * self.num_stages * self.microbatches

    def fits(self, worker: int) -> int:
        """Micro-batches that ``worker`` can hold at once."""
        held = min(self.held[stage] for stage in self.topology.stages_of(worker))
        whole = self.cap[worker] / held + SLACK if held else self.microbatches
        return max(1, min(self.microbatches, int(whole)))


def pose_problem(topology: Topology, microbatches: int, costs: Costs, max_peak: float | Sequence[float] | None,
          objective: str) -> Problem:
    """The problem in numbers.

    Raises ``ScheduleError`` for an unknown objective, or memory for less than one micro-batch.
    """
    if objective not in OBJECTIVES:
        raise ScheduleError(
            f"objective {objective!r} is none of {len(OBJECTIVES)} known; try {' or '.join(OBJECTIVES)}"
        )
    if len(costs.forward) != topology.num_stages:
        raise ScheduleError(f"costs are for {len(costs.forward)} stages, {topology.num_workers} workers hold "
                            f"{topology.num_stages}; give one entry per stage")
    held = np.array(costs.activation) if costs.activation is not None else topology.shares()
    kept = held if costs.weight_activation is None else np.array(costs.weight_activation)
    whole = np.bincount(topology.worker_of, held, topology.num_workers)
    cap = (
        topology.num_workers * whole if max_peak is None else np.broadcast_to(np.asarray(max_peak, float), whole.shape)
    )
    if (cap < whole * (1 - SLACK)).any():
        worker = int((whole - cap).argmax())
        raise ScheduleError(f"worker {worker} may keep {cap[worker]:,.6g} of activations, one micro-batch needs "
                            f"{whole[worker]:,.6g}; try micro-batches of fewer rows, or recomputation")
    owner = topology.worker_of
    hop = [0.0] + [
        costs.latency(edge) if owner[edge.source] != owner[edge.target] else 0.0 for edge in topology.chain()
    ]
    return Problem(
        topology,
        microbatches,
        (costs.forward, costs.input_grad, costs.weight_grad),
        tuple(hop),
        tuple(held),
        tuple(kept),
        tuple(cap),
        objective,
    )
