"""Points in order of their simplest bounds, until no other can be faster. The work is counted, never timed."""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from pipeengine.exploration.chain import Chain
from pipeengine.exploration.hardware import Hardware
from pipeengine.exploration.judge import Scene
from pipeengine.exploration.point_search import CLOSE, ROUNDS, Candidate, PointSearch, Verdict
from pipeengine.exploration.refusing import Reason
from pipeengine.exploration.space import Point, Space, Training

_PREFERENCE = {None: 0, "none": 0, "stages": 1, "blocks": 2, "optimizer": 1, "replicas": 1, "parameters": -1}
_PHASES = (("tried", 0, 0.1), ("bounded", None, 0.5), ("looked at", 0, 0.75), ("searched", ROUNDS, 1.0),
           ("narrowed", 4 * ROUNDS, 1.0))
"""What is done with every point that may still be the best: rounds of pricing, up to so much of the effort. A few that
fit if anything does come first, so that there is a best early."""
EFFORT = 60_000_000     # of tables filled and actions played through; about microseconds of one quiet core
_BUBBLES = {"gpipe": 1.0, "1f1b": 1.0, "zb-h1": 0.5, "zb-h2": 0.4, "interleaved-1f1b": 1.0, "bfs": 1.0,
            "interleaved-zb": 0.6, "zb-v": 0.3, "v-half": 0.6, "v-min": 0.8, "dualpipe-v": 0.5, "auto": 0.4}
"""About how much of 1F1B's bubble (of a stage instead of a worker, with several) is left: for the order of the search
only."""


@dataclass(frozen=True)
class Outcome:
    """Everything that is known after a search: a verdict per point, the fastest first.

    ``lower_bound``: seconds that no point of the space beats; inf where none can run. ``stopped``: why some points were
    not looked at, "" where all were.
    """

    verdicts: tuple[Verdict, ...]
    best: Candidate | None
    lower_bound: float
    effort: int
    stopped: str


def search_space(space: Space, hardware: Hardware, training: Training, chain_for: Callable[[int, str], Chain], *,
                 effort: int = EFFORT, time_limit: float | None = None,
                 progress: Callable[[str], None] | None = None) -> Outcome:
    """The fastest point of ``space`` and a bound on all of it. ``chain_for(rows, recompute)`` are the model's costs.

    ``effort`` counts the work, so that the answer is the same on every machine. ``time_limit`` in seconds is a cap
    only: reached, the answer stands with the bounds that there are by then.
    """
    points = list(space.points(hardware.num_devices, training.global_rows))
    every, bounds = set(points), {}
    for point in points:
        bounds[point] = simple_bound(point, hardware, chain_for(point.rows, point.recompute))
    queue = sorted((point for point in points if _at_least_as_good(point) not in every),
                   key=lambda point: (not _is_plain(point), _estimate(point, bounds[point]), _order(point)))
    done = {point: Verdict(point, bounds[point]) for point in points}
    best, started, stopped, spent = None, time.monotonic(), "", 0
    for what, rounds, share in _PHASES:
        for number, point in enumerate(queue):
            known = best.seconds if best else math.inf
            if done[point].bound >= known * (1 - (CLOSE if rounds else 1e-12)):
                continue
            if what == "tried" and not _is_plain(point):
                break
            late = time_limit is not None and time.monotonic() - started > time_limit
            if late or spent > share * effort:
                stopped = f"the time limit of {time_limit:g} s" if late else f"an effort of {effort:,}"
                break
            search = PointSearch(Scene(point, hardware, training), chain_for(point.rows, point.recompute), known)
            done[point] = _merged(done[point], search.run(rounds=rounds))
            spent += search.effort
            mine = done[point].best
            if mine is not None and (best is None or mine.seconds < best.seconds * (1 - 1e-12)):
                best = mine
            if progress:
                progress(f"{number + 1:,} of {len(queue):,} configurations {what}, "
                         + (f"best {best.seconds:.4g} s: {best.point}" if best else "none fits so far"))
        queue.sort(key=lambda point: ((rounds or 0) < ROUNDS and _estimate(point, done[point].bound),
                                      done[point].bound, _order(point)))
    verdicts = [_inherited(done, point) for point in queue]
    lowest = min((verdict.bound for verdict in verdicts), default=math.inf)
    lower_bound = min(lowest, best.seconds) if best else lowest
    return Outcome(tuple(sorted(verdicts, key=_rank)), best, lower_bound, spent, stopped)


def _merged(before: Verdict, now: Verdict) -> Verdict:
    """Both are true: the higher bound, the faster candidate, the latest reason."""
    best = min(filter(None, (before.best, now.best)), key=lambda each: each.seconds, default=None)
    return Verdict(now.point, max(before.bound, now.bound), best, Reason() if best else now.why or before.why)


def _at_least_as_good(point: Point) -> Point | None:
    """A point that is never slower and never needs more memory: its optimizer is sharded, or more may recompute."""
    if point.shard != "optimizer" and point.replicas > 1:
        return replace(point, shard="optimizer")
    return replace(point, recompute="stages") if point.recompute == "none" else None


def _inherited(done: Mapping[Point, Verdict], point: Point) -> Verdict:
    """A point's verdict, with what is known of one that is at least as good."""
    verdict, better = done[point], _at_least_as_good(point)
    if better is None or better not in done or verdict.best is not None or verdict.why:
        return verdict
    above = _inherited(done, better)
    return replace(verdict, bound=max(verdict.bound, above.bound), why=above.why)


def _is_plain(point: Point) -> bool:
    """Whether a point is one of the few that fit if anything does."""
    return point.rows == 1 and point.recompute == "blocks" and point.schedule == "1f1b"


def _estimate(point: Point, bound: float) -> float:
    """Seconds that a point may take: where to look first."""
    waves = (point.workers - 1) / point.stages_per_worker / point.num_microbatches
    return bound * (1 + waves * _BUBBLES[point.schedule])


def simple_bound(point: Point, hardware: Hardware, chain: Chain) -> float:
    """Seconds below which no order of any cut can be: all work shared out, the largest part that is never cut, or the
    way of one micro-batch."""
    work = chain.sums(chain.plain.forward + chain.plain.backward)
    heaviest = float(np.diff(work).max()) if point.workers > 1 else 0.0
    # A micro-batch goes forward and back through all stages; its weight gradients may be computed beside that.
    through = float(work[-1] - chain.plain.weight_grad.sum()) if chain.returns else 0.0
    return max(point.num_microbatches * max(float(work[-1]) / point.workers, heaviest), through)


def _order(point: Point) -> tuple:
    """Which of equal points comes first: few replicas last, the simpler way of each choice first."""
    return (point.workers, point.stages_per_worker, _PREFERENCE.get(point.near, 0), -_PREFERENCE.get(point.shard, 0),
            _PREFERENCE[point.recompute], point.rows, point.schedule)


def _rank(verdict: Verdict) -> tuple:
    return (verdict.best.seconds if verdict.best else math.inf, verdict.bound, _order(verdict.point))
