"""What more or less hardware would do: the fewest devices, and what memory, links and rows are worth."""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from pipeengine.exploration.branch_and_bound import Outcome
from pipeengine.exploration.chain import Chain
from pipeengine.exploration.hardware import Hardware
from pipeengine.exploration.judge import Scene, play, schedule_of
from pipeengine.exploration.point_search import Look, PointSearch
from pipeengine.exploration.space import Point, Space, Training, divisors

_MORE_MEMORY, _PROMISING = 1.25, 4
_MOST_DEVICES = 4096


@dataclass(frozen=True)
class Fewest:
    """The fewest devices on which the model was found to train at all.

    ``proved``: one less was refused, in every configuration of the space; ``why`` is the reason that came nearest.
    """

    num_devices: int
    point: Point
    proved: bool
    why: str


@dataclass(frozen=True)
class Margin:
    """What a change is worth: ``gain`` is how much more rows per second, as a share, with what is changed."""

    change: str
    gain: float


def fewest_devices(space: Space, hardware: Hardware, training: Training,
                   chain_for: Callable[[int, str], Chain]) -> Fewest | None:
    """From what weights, gradients and optimizer need at the least, upwards, until a configuration fits. None without a
    memory limit, or if none does on as many devices as there are."""
    if hardware.memory is None:
        return None
    rows = min(space.rows or divisors(training.global_rows))
    chain = chain_for(rows, space.recompute[-1])
    least = max(1, math.ceil(float(chain.own_parameters[-1]) / hardware.memory))
    refused, proved = "no fewer than the weights need", True
    for count in range(least, min(hardware.num_devices, _MOST_DEVICES) + 1):
        fits, proved_here, why = _trains(replace(space, rows=(rows,)), replace(hardware, num_devices=count), training,
                                         chain_for)
        if fits is not None:
            return Fewest(count, fits, proved, refused)
        refused, proved = why, proved_here
    return None


def _trains(space: Space, hardware: Hardware, training: Training,
            chain_for: Callable[[int, str], Chain]) -> tuple[Point | None, bool, str]:
    """A point that fits; else whether it is proved that none does, and the reason that came nearest."""
    proved, reasons = True, []
    for point in sorted(space.points(hardware.num_devices, space.rows[0] * math.lcm(*divisors(hardware.num_devices))),
                        key=lambda point: (-point.workers, point.stages_per_worker)):
        point = replace(point, num_microbatches=max(2 * point.workers, 4))
        verdict = PointSearch(Scene(point, hardware, training), chain_for(point.rows, point.recompute), math.inf).run(
            Look.CUT)
        if verdict.best is not None:
            return point, True, ""
        proved &= verdict.bound == math.inf
        reasons.append(verdict.why)
    return None, proved, str(min(filter(None, reasons), key=lambda reason: reason.share, default="no cut fits"))


def margins(outcome: Outcome, hardware: Hardware, training: Training,
            chain_for: Callable[[int, str], Chain]) -> tuple[Margin, ...]:
    """Memory: the points that were found fastest searched again with a quarter more. Links twice as fast, and twice the
    rows in as many more micro-batches: the best point played through again."""
    best = outcome.best
    if best is None:
        return ()
    found = []
    if hardware.memory is not None:
        more, fastest = hardware.scaled(memory=_MORE_MEMORY), best.seconds
        for verdict in outcome.verdicts[:_PROMISING]:
            search = PointSearch(Scene(verdict.point, more, training),
                                 chain_for(verdict.point.rows, verdict.point.recompute), fastest)
            again = search.run(Look.CUT).best
            fastest = min(fastest, again.seconds if again else math.inf)
        found.append(Margin("25 % more memory", best.seconds / fastest - 1))
    point = best.point
    schedule = schedule_of(point.schedule, point.workers, point.num_microbatches, point.stages_per_worker)
    wide = play(Scene(point, hardware.scaled(bandwidth=2.0), training), best.plan, schedule)[0]
    found.append(Margin("links twice as fast", best.seconds / wide - 1))
    doubled = replace(point, num_microbatches=2 * point.num_microbatches)
    longer = schedule_of(point.schedule, point.workers, doubled.num_microbatches, point.stages_per_worker)
    seconds = play(Scene(doubled, hardware, training), best.plan, longer)[0]
    found.append(Margin("twice the rows per step", 2 * best.seconds / seconds - 1))
    return tuple(found)
