"""What a configuration with its cuts takes: its order played through, with the memory of that order. Seconds, bytes."""
from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from partitioners import Link, Plan
from pipeengine.exploration.hardware import Hardware, reduce_seconds
from pipeengine.exploration.space import Point, Training
from pipeengine.exploration.training_state import state_factor, update_bytes
from pipeengine.report import step_bytes
from pipeengine.schedules import Schedule
from pipeengine.simulation import Costs, LinkTimes, Timeline, costs_of, edges_of, simulate
from pipeengine.synthesis import build


@lru_cache(maxsize=256)
def schedule_of(name: str, num_workers: int, num_microbatches: int, stages_per_worker: int) -> Schedule:
    """The schedule of that name. Raises ``ScheduleError`` where it is not made for these numbers."""
    return build(name, num_workers=num_workers, num_microbatches=num_microbatches, stages_per_worker=stages_per_worker)


@dataclass(frozen=True)
class Scene:
    """A point's surroundings: the links between its workers, and what each byte of parameters costs at a step's end."""

    point: Point
    hardware: Hardware
    training: Training

    @cached_property
    def links(self) -> tuple[list[list[Link]], list[Link]]:
        """From each worker to each other, and among each worker's replicas."""
        return self.hardware.links(self.point.replicas, self.point.workers, self.point.near)

    @property
    def state_factor(self) -> float:
        """Bytes kept all the time per byte of parameters, gradients apart."""
        return state_factor(self.training.optimizer, self.point.replicas, self.point.shard,
                            bytes_per_weight=self.training.bytes_per_weight)

    def step_end_seconds(self, worker: int, param_bytes: float) -> float:
        """Seconds after a worker's last action: gradients summed over replicas, and the optimizer's step."""
        rate = self.hardware.memory_rate
        moved = param_bytes * update_bytes(self.training.optimizer, self.point.replicas, self.point.shard,
                                           bytes_per_weight=self.training.bytes_per_weight)
        summed = reduce_seconds(param_bytes, self.point.replicas, self.links[1][worker])
        return summed + (moved / rate if rate else 0.0)


def costs_on(scene: Scene, plan: Plan, worker_of: tuple[int, ...]) -> Costs:
    """The plan's costs, each boundary with the seconds of its own link, and what follows the last action.

    A message's seconds stand as bytes over a bandwidth of one byte per second.
    """
    between, _ = scene.links
    bare = costs_of(plan, LinkTimes.free())
    edges = {(b.source, b.target): _seconds(between, worker_of, b.source, b.target, max(b.bytes, b.gradient_bytes))
             for b in plan.boundaries}
    # A worker's stages share one reduction, and so its latency.
    end = tuple(scene.step_end_seconds(worker, cost.param_bytes - cost.frozen_bytes)
                - (scene.step_end_seconds(worker, 0.0) if worker in worker_of[:stage] else 0.0)
                for stage, (worker, cost) in enumerate(zip(worker_of, plan.stages)))
    exchange = [0.0] * plan.num_stages
    for tie in (tie for tie in plan.ties if tie.trained):
        first = tie.stages[0]
        for stage in tie.stages:
            other = tie.stages[1] if stage == first else first
            exchange[stage] += 2 * _seconds(between, worker_of, stage, other, tie.bytes)
    return replace(bare, edge_bytes=edges, bandwidth=1.0, optimizer=end,
                   exchange=tuple(exchange) if plan.ties else None)


def _seconds(between: list[list[Link]], worker_of: tuple[int, ...], source: int, target: int, size: float) -> float:
    here, there = worker_of[source], worker_of[target]
    return 0.0 if here == there else between[here][there].seconds(size)


def play(scene: Scene, plan: Plan, schedule: Schedule) -> tuple[float, Timeline, Costs]:
    """Seconds of a step, its timeline, and the costs behind it.

    No link may be busier than a step is long: where all values of a worker, one way, take longer, that is the step.
    """
    costs = costs_on(scene, plan, schedule.topology.worker_of)
    timeline = simulate(schedule, costs, edges_of(plan))
    return max(timeline.makespan, traffic_seconds(scene, plan, schedule)), timeline, costs


def traffic_seconds(scene: Scene, plan: Plan, schedule: Schedule) -> float:
    """Seconds that the busiest worker's link is busy in a step, values into it and out of it counted apart."""
    worker_of, between = schedule.topology.worker_of, scene.links[0]
    into, out = np.zeros(scene.point.workers), np.zeros(scene.point.workers)
    for b in plan.boundaries:
        here, there = worker_of[b.source], worker_of[b.target]
        if here != there:
            link = between[here][there]
            forward = link.seconds(b.bytes) if b.values else 0.0
            back = link.seconds(b.gradient_bytes) if b.gradients else 0.0
            out[here], into[there] = out[here] + forward, into[there] + forward
            out[there], into[here] = out[there] + back, into[here] + back
    return schedule.num_microbatches * float(max(into.max(), out.max()))


def peak_bytes(scene: Scene, plan: Plan, schedule: Schedule) -> tuple[float, ...]:
    """Bytes of each worker at its fullest: what it keeps all the time, and what a step adds in this order."""
    kept = [0.0] * scene.point.workers
    for stage, cost in enumerate(plan.stages):
        trained = cost.param_bytes - cost.frozen_bytes
        kept[schedule.topology.worker_of[stage]] += scene.state_factor * trained + cost.frozen_bytes
    return tuple(a + b for a, b in zip(kept, step_bytes(plan, schedule)))
