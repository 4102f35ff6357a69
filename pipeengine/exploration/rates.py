"""What paths cost beside the stages they go through, and all rows that are known of a point before it is cut."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeengine.exploration.bottlenecks import Key, bottlenecks, key_of, work_of
from pipeengine.exploration.chain import Chain
from pipeengine.exploration.judge import Scene
from pipeengine.exploration.paths import Path, Walk, any_order
from pipeengine.exploration.relaxation import Relaxation
from pipeengine.schedules import B, Schedule


class Rates(NamedTuple):
    """Least seconds of a message over each boundary, wherever the cut is; and per worker, what follows its last action:
    seconds per byte of its parameters, and seconds anyway."""

    hops: np.ndarray
    ends: np.ndarray
    pause: np.ndarray

    @classmethod
    def of(cls, scene: Scene, chain: Chain, worker_of: tuple[int, ...]) -> Rates:
        """Those of a point."""
        least = float(chain.crossing_bytes[1:-1].min(initial=np.inf)) if len(chain) > 1 else 0.0
        between, workers = scene.links[0], range(scene.point.workers)
        hops = np.array([between[a][b].seconds(least) if a != b else 0.0 for a, b in zip(worker_of, worker_of[1:])])
        pause = np.array([scene.step_end_seconds(worker, 0.0) for worker in workers])
        return cls(hops, np.array([scene.step_end_seconds(worker, 1.0) for worker in workers]) - pause, pause)

    def path(self, walk: Walk) -> Path:
        """The bound that a longest path is."""
        return walk.path(self.hops, self.ends, self.pause)


def relax(scene: Scene, chain: Chain, schedule: Schedule, rates: Rates, cutoff: float, share: float = 1.0,
          parts: Sequence[float] | None = None) -> Relaxation:
    """All ways to cut for a point within ``share`` of the memory, with the paths of any order on its topology.

    With ``parts``, each stage has so much of its worker's memory alone.
    """
    memory = scene.hardware.memory
    relaxed = Relaxation.of(chain, schedule, None if memory is None else share * memory, scene.state_factor,
                            scene.point.recompute, parts)
    whole = bool((schedule.columns.op == B).any())
    paths = any_order(schedule.topology, schedule.num_microbatches, *rates, whole)
    for path in paths if chain.returns else paths[::2]:        # those out again rest on gradients
        relaxed.add(path, cutoff)
    return relaxed


def add_bottlenecks(relaxed: Relaxation, scene: Scene, chain: Chain, rates: Rates,
                    cutoff: float) -> tuple[tuple[Key, int], ...]:
    """Price the paths that the order of the point has where one worker is slow, too. What was played to find them, once
    for all points, and the work."""
    if not has_order(scene, chain):
        return ()
    key = key_of(scene.point, chain)
    for walk in bottlenecks(*key):
        relaxed.add(rates.path(walk), cutoff)
    return ((key, work_of(*key)),)


def has_order(scene: Scene, chain: Chain) -> bool:
    """Whether the order of the point bounds anything: one worker has none, and without gradients half of it is not
    there."""
    return chain.returns and scene.point.workers > 1
