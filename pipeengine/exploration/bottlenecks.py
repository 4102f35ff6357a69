"""The longest paths of an order where one worker after the other is slower than the rest.

An order alone says which they are, before anything is cut: they are found once for all points that share it.
"""
from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from pipeengine.exploration.chain import Chain
from pipeengine.exploration.judge import schedule_of
from pipeengine.exploration.paths import Walk, any_order, walked
from pipeengine.exploration.relaxation import balance
from pipeengine.exploration.space import Point
from pipeengine.schedules import B, Schedule
from pipeengine.simulation import solve, waits

_SLOWER, _BIT_SLOWER, _AT_ONCE = 1.15, 1.03, 6
_MOST_ACTIONS = 5_000_000       # of all plays together; where that is not enough, some workers are never slow
PER_ACTION = 0.25       # of a play whose times repeat, about in microseconds
Shares = tuple[float, float]
Key = tuple[str, int, int, int, Shares]


def key_of(point: Point, chain: Chain) -> Key:
    """The arguments of ``bottlenecks`` for a point: its order, and what parts of the work are forward and weight
    gradients, to the per cent."""
    forward, backward = (float(each.sum()) for each in (chain.plain.forward, chain.plain.backward))
    weight, whole = float(chain.plain.weight_grad.sum()) or backward / 2, max(forward + backward, 1e-30)
    shares = round(forward / whole, 2), round(min(weight, backward) / whole, 2)
    return point.schedule, point.workers, point.num_microbatches, point.stages_per_worker, shares


@lru_cache(maxsize=512)
def bottlenecks(name: str, num_workers: int, num_microbatches: int, stages_per_worker: int,
                shares: Shares) -> tuple[Walk, ...]:
    """Longest paths of the order of that name, each once, for stages that are equal but for one slow worker's."""
    schedule = schedule_of(name, num_workers, num_microbatches, stages_per_worker)
    stages = schedule.topology.num_stages
    return tuple(slowed(schedule, np.tile(_work(shares) / stages, (stages, 1)), _slow_workers(schedule)))


@lru_cache(maxsize=512)
def hard_weights(name: str, num_workers: int, num_microbatches: int, stages_per_worker: int, shares: Shares,
                 with_bottlenecks: bool) -> np.ndarray:
    """Weights, of sum 1, of the paths of any order, then of ``bottlenecks``, at which a stage is dear wherever it is:
    to be refused by them, a cut has to be dear too."""
    schedule = schedule_of(name, num_workers, num_microbatches, stages_per_worker)
    nothing = np.zeros(max(num_workers, schedule.topology.num_stages))
    paths = any_order(schedule.topology, num_microbatches, nothing, nothing, nothing,
                      bool((schedule.columns.op == B).any()))
    walks = bottlenecks(name, num_workers, num_microbatches, stages_per_worker, shares) if with_bottlenecks else ()
    counts = [path.counts[:, :3] for path in paths] + [walk.counts for walk in walks]
    return balance(np.stack(counts) @ _work(shares))[0]


def _work(shares: Shares) -> np.ndarray:
    forward, weight = shares
    return np.array((forward, 1.0 - forward - weight, weight))


def work_of(name: str, num_workers: int, num_microbatches: int, stages_per_worker: int, shares: Shares) -> int:
    """What finding ``bottlenecks`` takes, about in microseconds."""
    schedule = schedule_of(name, num_workers, num_microbatches, stages_per_worker)
    return round(PER_ACTION * schedule.num_actions * (1 + len(_slow_workers(schedule))))


def slowed(schedule: Schedule, seconds: np.ndarray, workers: tuple[int, ...], times: float = _SLOWER) -> Iterator[Walk]:
    """The longest path where stages take ``seconds`` of F, I and W, (stages, 3); then with each of ``workers`` so many
    times slower. Each path once; messages take no time."""
    columns, found = waits(schedule, schedule.topology.chain()), set()
    op, stage, _ = schedule.columns
    for worker in (None, *workers):
        held = seconds.copy()
        if worker is not None:
            held[list(schedule.topology.stages_of(worker))] *= times
        durations = np.stack((held[:, 0], held[:, 1] + held[:, 2], held[:, 1], held[:, 2]))
        start, end = solve(schedule.starts, durations[op, stage], columns)
        walk = walked(schedule, start, end, columns, int(end[schedule.starts[1:] - 1].argmax()))
        if walk.counts.tobytes() not in found:
            found.add(walk.counts.tobytes())
            yield walk


def of_mixed(schedule: Schedule, held: np.ndarray, number: int) -> Iterator[Walk]:
    """The longest paths where the stages hold what cuts hold on the average: what (stages, 7) prices have missed.

    A few workers in turn are taken as a bit slower, others in every round: there are as many paths as workers.
    """
    workers = schedule.topology.num_workers
    apart = max(1, workers // _AT_ONCE)
    slow = dict.fromkeys((number * _AT_ONCE + turn * apart + number) % workers for turn in range(_AT_ONCE))
    return slowed(schedule, held[:, :3], tuple(slow), _BIT_SLOWER)


def _slow_workers(schedule: Schedule) -> tuple[int, ...]:
    workers = schedule.topology.num_workers
    many = min(workers, _MOST_ACTIONS // max(schedule.num_actions, 1))
    return tuple(dict.fromkeys(np.linspace(0, workers - 1, many).round().astype(int).tolist()))
