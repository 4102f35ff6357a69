"""One point: its best cuts, and a bound on the step time that none of its cuts can beat."""
from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from partitioners import Plan
from partitioners.units import format_share
from pipeengine.errors import ScheduleError
from pipeengine.exploration.chain import Chain
from pipeengine.exploration.judge import Scene, peak_bytes, play, schedule_of
from pipeengine.exploration.paths import Path, any_order, critical
from pipeengine.exploration.refusing import crowded, lacking
from pipeengine.exploration.relaxation import Cut, Relaxation, balance
from pipeengine.exploration.space import Point
from pipeengine.schedules import B, Schedule
from pipeengine.simulation import edges_of, microbatches_in_flight

FEW_CUTS = 600          # ways to cut that are simply all priced
ROUNDS, FEW_ROUNDS = 12, 5      # of pricing paths and cuts against each other
CLOSE = 2e-3            # a bound this near is near enough
_SHARES = (0.96, 0.88, 0.75)   # of the memory, to find a cut that fits
_BISECTIONS = 14
_LIMIT_SHARES = (0.1, 0.5)
_HALVINGS = 6           # of the way from a bound to the best cut
_LOOK = 0.02            # how far above the most even cut cuts are looked at


@dataclass(frozen=True)
class Candidate:
    """A configuration that fits, played through: seconds of a step, bytes at each worker's fullest, share of the
    workers' time that is idle."""

    point: Point
    cut: Cut
    seconds: float
    peak_bytes: tuple[float, ...]
    bubble: float
    plan: Plan


@dataclass(frozen=True)
class Verdict:
    """What is known of a point: no cut of it is faster than ``bound`` seconds (inf: none runs at all, proved).

    ``best`` is the fastest that was found; ``why`` says what keeps it from being faster, or from running.
    """

    point: Point
    bound: float
    best: Candidate | None = None
    why: str = ""


class PointSearch:
    """Cuts and paths of one point, priced against each other until they meet or the point is out.

    A path of a simulated step bounds every cut; the cut that is cheapest for a mixture of paths shows the next path.
    (Kelley's cutting planes, Journal of SIAM 1960, with a dynamic programme as the oracle.)
    """

    def __init__(self, scene: Scene, chain: Chain, cutoff: float) -> None:
        self.scene, self.chain, self.cutoff, self.point = scene, chain, cutoff, scene.point
        self.best: Candidate | None = None
        self.peaks: tuple[float, ...]
        self.bound, self.overflow = 0.0, (math.inf, "")
        self.effort, self.peaks = 4 * self._table, ()
        self.weights = np.zeros(0)

    def run(self, *, rounds: int | None = ROUNDS) -> Verdict:
        """Everything that ``rounds`` of pricing can say of the point; with 0, its most even cut and a bound; with None
        a bound alone."""
        point = self.point
        try:
            schedule = schedule_of(point.schedule, point.workers, point.num_microbatches, point.stages_per_worker)
        except ScheduleError as error:
            return Verdict(point, math.inf, None, str(error))
        if schedule.topology.num_stages != point.num_stages or schedule.topology.num_routes > 1:
            return Verdict(point, math.inf, None, f"{point.schedule} has {schedule.topology.num_stages} stages")
        missing = lacking(self.scene, self.chain)
        if missing:
            return Verdict(point, math.inf, None, missing)
        relaxed = self._relax(schedule)
        missing, tables = crowded(relaxed)
        self.effort += tables * self._table
        if missing:
            return Verdict(point, math.inf, None, missing)
        ways = math.comb(len(self.chain) - 1, point.num_stages - 1) * len(relaxed.sums) ** point.num_stages
        if rounds is None:
            self._first_bound(relaxed)
        elif ways <= FEW_CUTS:
            self._all_cuts(schedule, relaxed)
        else:
            self._converge(schedule, relaxed, rounds)
        return Verdict(point, self.bound, self.best, "" if self.best else self.overflow[1])

    def _hops(self, worker_of: tuple[int, ...]) -> np.ndarray:
        """Least seconds of a message over each boundary, wherever the cut is."""
        least = float(self.chain.crossing_bytes[1:-1].min(initial=np.inf)) if len(self.chain) > 1 else 0.0
        between = self.scene.links[0]
        return np.array([between[a][b].seconds(least) if a != b else 0.0 for a, b in zip(worker_of, worker_of[1:])])

    def _relax(self, schedule: Schedule, share: float = 1.0) -> Relaxation:
        scene, worker_of = self.scene, schedule.topology.worker_of
        memory = scene.hardware.memory
        relaxed = Relaxation.of(self.chain, schedule, None if memory is None else share * memory, scene.state_factor,
                                self.point.recompute)
        self.hops = self._hops(worker_of)
        self.pause = np.array([scene.step_end_seconds(worker, 0.0) for worker in range(self.point.workers)])
        self.ends = np.array([scene.step_end_seconds(worker, 1.0) for worker in range(self.point.workers)]) - self.pause
        whole = bool((schedule.columns.op == B).any())
        paths = any_order(schedule.topology, schedule.num_microbatches, self.hops, self.ends, self.pause, whole)
        for path in paths if self.chain.returns else paths[::2]:        # those out again rest on gradients
            relaxed.add(path, self.cutoff)
        return relaxed

    def _all_cuts(self, schedule: Schedule, relaxed: Relaxation) -> None:
        """Every cut, those with the shortest longest path first, until no other can be faster."""
        cuts = [(float(relaxed.lengths(cut).max()), cut) for cut in self._cuts(relaxed)]
        self.bound = math.inf
        for least, cut in sorted(cuts):
            known = min(self.cutoff, self.best.seconds if self.best else math.inf)
            if least >= known * (1 - 1e-12):
                self.bound = min(self.bound, least)
                break
            seconds = self._judge(schedule, cut)[0]
            fits = self.best is not None and self.best.cut == cut
            self.bound = min(self.bound, seconds if fits else math.inf)
        if self.best is not None:
            self.bound = min(self.bound, self.best.seconds)

    def _cuts(self, relaxed: Relaxation) -> Iterator[Cut]:
        stages, last = self.point.num_stages, len(self.chain)
        for inner in itertools.combinations(range(1, last), stages - 1):
            places = (0, *inner, last)
            if all(a <= relaxed.last_start[b] for a, b in zip(places, places[1:])):
                for flags in itertools.product(*([False, True][:len(relaxed.sums)] for _ in range(stages))):
                    if all(relaxed.starts[int(flag)][stage][b] <= a
                           for stage, (a, b, flag) in enumerate(zip(places, places[1:], flags))):
                        yield places, flags

    def _converge(self, schedule: Schedule, relaxed: Relaxation, rounds: int) -> None:
        """From the most even cut on, paths and cuts in turn. Where even that does not fit, with room to spare."""
        if not self._by_paths_alone(relaxed):
            return
        cut = relaxed.most_even()
        self.effort += _BISECTIONS * self._table // 3
        if cut is None:
            self.bound = self.cutoff
            return
        seconds, path = self._judge(schedule, cut)
        if self.best is None:
            self._make_fit(schedule, cut, _SHARES if rounds else _SHARES[:1])
        ceiling = min(self.cutoff, (1 + _LOOK) * min(seconds, self.best.seconds if self.best else math.inf))
        if not rounds:
            return
        weights = self._price(schedule, relaxed, cut, path, ceiling, rounds)
        self._sharpen(relaxed, weights, min(ceiling, self.best.seconds if self.best else math.inf))

    def _first_bound(self, relaxed: Relaxation) -> Cut | None:
        """A bound from the work of all workers alone, where memory limits it; a cut that has it."""
        relaxed.scale = self.cutoff if math.isfinite(self.cutoff) else self.point.num_microbatches * float(
            self.chain.sums(self.chain.plain.forward)[-1])
        paths, limits, cut = len(relaxed.paths), len(relaxed.limits), None
        ways_in = _ways_in(relaxed)
        spare = [np.full(limits, share / max(limits, 1)) for share in (0.0, *(_LIMIT_SHARES if limits else ()))]
        if limits and len(relaxed.sums) > 1:
            spare += [relaxed.memory_prices(ways_in)]
        for prices in spare:
            weights = np.concatenate((ways_in, prices))
            value, cheapest = relaxed.cheapest(weights)
            self.effort += self._table
            if cheapest is None:
                self.bound = self.cutoff
                return None
            if value > self.bound or cut is None:
                self.weights, cut = weights / weights.sum(), cheapest
            self.bound = max(self.bound, min(value, self.cutoff))
        assert len(weights) == paths + limits, "one weight per row"
        return cut

    def _by_paths_alone(self, relaxed: Relaxation) -> bool:
        """Whether the point may still be the best after a few rounds of pricing that play nothing through."""
        cut = self._first_bound(relaxed)
        cuts, best = [] if cut is None else [cut], self.bound
        for _ in range(FEW_ROUNDS):
            if cut is None or self.bound >= self.cutoff * (1 - CLOSE):
                return False
            kept = self.weights
            weights = 0.5 * kept + 0.5 * balance(np.stack([relaxed.lengths(cut) for cut in cuts], axis=1))
            value, cut = relaxed.cheapest(weights)
            self.effort += self._table
            self.bound = max(self.bound, min(value, self.cutoff))
            best, self.weights = (value, weights) if value >= best else (best, kept)
            cuts += [] if cut is None else [cut]
        return cut is not None and self.bound < self.cutoff * (1 - CLOSE)

    @property
    def _table(self) -> int:
        """Work of one dynamic programme, about in microseconds."""
        return self.point.num_stages * (150 + len(self.chain) // 4)

    def _sharpen(self, relaxed: Relaxation, weights: np.ndarray, ceiling: float) -> None:
        """Cuts below some seconds have no stage that alone takes longer: the fewer are left, the dearer the
        cheapest."""
        low, high = self.bound, ceiling
        for _ in range(_HALVINGS if len(weights) else 0):
            middle = 0.5 * (low + high)
            narrowed = relaxed.copy()
            narrowed.narrow(middle)
            value, _ = narrowed.cheapest(weights)
            self.effort += self._table
            self.bound = max(self.bound, min(value, middle))
            low, high = (middle, high) if value >= middle else (low, middle)

    def _price(self, schedule: Schedule, relaxed: Relaxation, cut: Cut, path: Path,
               ceiling: float, rounds: int) -> np.ndarray:
        """Prices half-way between the best so far and those that suit the cuts so far: pure ones would swing. The best.
        """
        relaxed.narrow(ceiling)
        relaxed.scale = ceiling
        relaxed.add(path, ceiling)
        cuts, weights, best = [cut], self.weights, 0.0
        for number in range(rounds):
            rows = len(relaxed.paths)
            before = np.insert(weights, rows - 1, 0.0)
            pure = balance(np.stack([relaxed.lengths(cut) for cut in cuts], axis=1)) if number else before
            mixed = 0.5 * pure + 0.5 * before
            value, cheapest = relaxed.cheapest(mixed)
            self.effort += self._table
            best, weights = (value, mixed) if value > best else (best, before)
            self.bound = max(self.bound, min(value, ceiling))
            known = min(self.cutoff, self.best.seconds if self.best else math.inf)
            if cheapest is None or self.bound >= known * (1 - CLOSE):
                break
            relaxed.add(self._judge(schedule, cheapest)[1], ceiling)
            cuts.append(cheapest)
        missing = len(relaxed.paths) + len(relaxed.limits) - len(weights)
        return np.insert(weights, [len(relaxed.paths) - 1] * missing, 0.0)

    def _make_fit(self, schedule: Schedule, cut: Cut, shares: Sequence[float]) -> None:
        """First more stages that recompute, those first that free most; then cuts as if there were less memory."""
        self._recompute_more(schedule, cut)
        if self.point.stages_per_worker > 1 and self.point.recompute != "none":
            self._recompute_alike(schedule, shares)
        for share in shares:
            if self.best is not None:
                return
            even = self._relax(schedule, share).most_even()
            if even is None:
                return
            self._judge(schedule, even)
            self._recompute_more(schedule, even)

    def _recompute_alike(self, schedule: Schedule, shares: Sequence[float]) -> None:
        """Evenest cuts where every worker recomputes as many of its stages, those first that hold most."""
        for many in range(1, self.point.stages_per_worker + 1):
            for share in (1.0, *shares):
                even = self._relax(schedule, share).forced(_alike(schedule, many)).most_even()
                if even is None:
                    break
                self._judge(schedule, even)
                if self.best is not None and self.best.cut == even:
                    return

    def _recompute_more(self, schedule: Schedule, cut: Cut) -> None:
        """One stage more of every worker that is too full, the one that keeps most, until they fit or all recompute."""
        places, flags = cut
        kept = np.diff(self.chain.sums(self.chain.plain.activation_bytes)[list(places)])
        kept = kept * microbatches_in_flight(schedule)
        room, peaks = self.scene.hardware.memory or math.inf, self.peaks
        while max(peaks) > room and self.point.recompute != "none":
            more = set()
            for worker in [worker for worker, peak in enumerate(peaks) if peak > room]:
                stages = [stage for stage in schedule.topology.stages_of(worker) if not flags[stage]]
                if not stages:
                    return
                more.add(max(stages, key=lambda stage: kept[stage]))
            flags = tuple(flag or stage in more for stage, flag in enumerate(flags))
            peaks = peak_bytes(self.scene, self.chain.price(places, flags, self.point.recompute), schedule)
            self.effort += schedule.num_actions
        if max(peaks) <= room:
            self._judge(schedule, (places, flags))

    def _judge(self, schedule: Schedule, cut: Cut) -> tuple[float, Path]:
        """Play a cut through; it is the best if it fits and is faster. Its seconds, and its longest path."""
        grain = self.point.recompute
        plan = self.chain.price(*cut, grain)
        seconds, timeline, costs = play(self.scene, plan, schedule)
        self.effort += 12 * schedule.num_actions + 100 * self.point.num_stages
        path = critical(schedule, costs, timeline, edges_of(plan), self.hops, self.ends, self.pause)
        if self.best is None or seconds < self.best.seconds * (1 - 1e-12):
            peaks, memory = peak_bytes(self.scene, plan, schedule), self.scene.hardware.memory
            over, self.peaks = max(peaks) - (memory or math.inf), peaks
            if over <= 0:
                bubble = 1 - float(timeline.busy.mean()) / seconds if seconds else 0.0
                self.best = Candidate(self.point, cut, seconds, peaks, bubble, plan)
            elif over < self.overflow[0]:
                worker = int(np.argmax(peaks))
                share = max(peaks) / (memory or math.inf)
                self.overflow = over, f"worker {worker} needs {format_share(share, 0)} of the memory"
        return seconds, path


def _alike(schedule: Schedule, many: int) -> list[bool]:
    """Which stages recompute where every worker recomputes ``many`` of its own, those that hold most micro-batches."""
    held, flags = microbatches_in_flight(schedule), [False] * schedule.topology.num_stages
    for worker in range(schedule.topology.num_workers):
        for stage in sorted(schedule.topology.stages_of(worker), key=lambda stage: -held[stage])[:many]:
            flags[stage] = True
    return flags


def _ways_in(relaxed: Relaxation) -> np.ndarray:
    """Equal weights, of sum 1, for the paths that hold all the work of one worker."""
    weights = np.zeros(len(relaxed.paths))
    holds = np.array([path.counts[:, 3].any() and path.counts[:, 2].max() == path.counts[:, 0].max()
                      for path in relaxed.paths])
    weights[holds if holds.any() else slice(None)] = 1.0
    return weights / weights.sum()
