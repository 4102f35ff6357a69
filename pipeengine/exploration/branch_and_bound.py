"""Points in order of their simplest bounds, until no other can be faster. The work is counted, never timed."""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from pipeengine.exploration.chain import Chain
from pipeengine.exploration.hardware import Hardware
from pipeengine.exploration.judge import Scene
from pipeengine.exploration.point_search import CLOSE, Candidate, Look, PointSearch, Verdict
from pipeengine.exploration.refusing import Reason
from pipeengine.exploration.space import Point, Space, Training

_PREFERENCE = {None: 0, "none": 0, "stages": 1, "blocks": 2, "optimizer": 1, "replicas": 1, "parameters": -1}
_PHASES = (("tried", Look.CUT, 0.1), ("bounded", Look.BOUND, 0.4), ("cut", Look.CUT, 0.6))
"""What is done with every point that may still be the best, up to so much of the effort: a few that fit if anything
does come first, so that there is a best early. Those that promise most are cut, as many as there is effort for."""
_CLOSER = (("ordered", Look.ORDER), ("searched", Look.SEARCH), ("narrowed", Look.NARROW))
"""Then always the point with the lowest bound is looked at, closer each time."""
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
    run = _Run(hardware, training, chain_for, effort, time_limit, progress,
               {point: Verdict(point, bounds[point]) for point in points}, len(queue))
    for what, look, share in _PHASES:
        for point in queue if what != "tried" else filter(_is_plain, queue):
            if not run.is_out(point, 1e-12) and not run.examine(point, what, look, share):
                break
        queue.sort(key=lambda point: (_estimate(point, run.done[point].bound), _order(point)))
    levels = dict.fromkeys(queue, 0)
    while True:
        left = [point for point in queue if levels[point] < len(_CLOSER) and not run.is_out(point, CLOSE)]
        if not left:
            break
        point = min(left, key=lambda point: (run.done[point].bound, _order(point)))
        if not run.examine(point, *_CLOSER[levels[point]], 1.0):
            break
        levels[point] += 1
    verdicts, best = [_inherited(run.done, point) for point in queue], run.best
    lowest = min((verdict.bound for verdict in verdicts), default=math.inf)
    lower_bound = min(lowest, best.seconds) if best else lowest
    return Outcome(tuple(sorted(verdicts, key=_rank)), best, lower_bound, run.spent, run.stopped)


@dataclass
class _Run:
    """A search under way: what is known of every point, and the work so far."""

    hardware: Hardware
    training: Training
    chain_for: Callable[[int, str], Chain]
    effort: int
    time_limit: float | None
    progress: Callable[[str], None] | None
    done: dict[Point, Verdict]
    many: int
    best: Candidate | None = None
    spent: int = 0
    stopped: str = ""
    looks: int = 0
    orders: set[tuple] = field(default_factory=set)
    started: float = field(default_factory=time.monotonic)

    @property
    def known(self) -> float:
        """Seconds of the best so far."""
        return self.best.seconds if self.best else math.inf

    def is_out(self, point: Point, close: float) -> bool:
        """Whether no cut of the point can be faster than the best by more than ``close``, a share."""
        return self.done[point].bound >= self.known * (1 - close)

    def examine(self, point: Point, what: str, look: Look, share: float) -> bool:
        """Look at a point, unless ``share`` of the effort, or the time, is used up: False then."""
        late = self.time_limit is not None and time.monotonic() - self.started > self.time_limit
        if late or self.spent > share * self.effort:
            self.stopped = f"the time limit of {self.time_limit:g} s" if late else f"an effort of {self.effort:,}"
            return False
        search = PointSearch(Scene(point, self.hardware, self.training), self.chain_for(point.rows, point.recompute),
                             self.known)
        self.done[point] = _merged(self.done[point], search.run(look))
        self.spent += search.effort + sum(work for key, work in search.orders if key not in self.orders)
        self.orders.update(key for key, _ in search.orders)
        mine, self.looks = self.done[point].best, self.looks + 1
        if mine is not None and mine.seconds < self.known * (1 - 1e-12):
            self.best = mine
        if self.progress:
            best = self.best
            self.progress(f"{self.looks:,} looks at {self.many:,} configurations, this one {what}; "
                          + (f"best {best.seconds:.4g} s: {best.point}" if best else "none fits so far"))
        return True


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
