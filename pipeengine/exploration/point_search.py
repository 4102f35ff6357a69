"""One point: its best cuts, and a bound on the step time that none of its cuts can beat."""
from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np

from partitioners import Plan
from partitioners.units import format_share
from pipeengine.errors import ScheduleError
from pipeengine.exploration.bottlenecks import hard_weights, key_of, of_mixed
from pipeengine.exploration.chain import Chain
from pipeengine.exploration.fitting import alike, recompute_more, shared_memory
from pipeengine.exploration.judge import Scene, peak_bytes, play, schedule_of
from pipeengine.exploration.neighbours import Neighbours
from pipeengine.exploration.paths import Path, longest
from pipeengine.exploration.pricing import WORK, Pricing
from pipeengine.exploration.rates import Rates, add_bottlenecks, has_order, relax
from pipeengine.exploration.refusing import Reason, crowded, lacking
from pipeengine.exploration.relaxation import Relaxation
from pipeengine.exploration.space import Point
from pipeengine.exploration.ways import Cut
from pipeengine.exploration.windows import Windows
from pipeengine.schedules import Schedule
from pipeengine.simulation import edges_of

FEW_CUTS = 600          # ways to cut that are simply all priced
CLOSE = 2e-3            # a bound this near is near enough
_SHARES = (0.96, 0.88, 0.75)   # of the memory, to find a cut that fits
_BISECTIONS = 14
_LIMIT_SHARES = (0.1, 0.5)
_HALVINGS = 6           # of the way from a bound to the best cut
_PLAYS, _PER_MOVE = 6, 5
DUALS = 12              # cuts that are priced before paths are looked for
_NEAR, _LITTLE = 1.01, 3e-4     # above the bound, where limits are weighed; what of it more is not worth a round
PER_PLAY = 4            # of each action, where stages are uneven, about in microseconds


class Look(IntEnum):
    """How closely to look at a point: a bound of its work and memory alone; one of its order too; its most even cut;
    cuts and paths priced against each other, or that for longer."""

    BOUND = 0
    ORDER = 1
    CUT = 2
    SEARCH = 3
    NARROW = 4


_ROUNDS = {Look.SEARCH: 4, Look.NARROW: 16}
FEW_ROUNDS = 5          # of pricing before anything is cut


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
    why: Reason = Reason()


class PointSearch:
    """Cuts and paths of one point, priced against each other until they meet or the point is out.

    A path of a simulated step bounds every cut; the cut that is cheapest for a mixture of paths shows the next path.
    (Kelley's cutting planes, Journal of SIAM 1960, with a dynamic programme as the oracle.)
    """

    def __init__(self, scene: Scene, chain: Chain, cutoff: float) -> None:
        self.scene, self.chain, self.cutoff, self.point = scene, chain, cutoff, scene.point
        self.best: Candidate | None = None
        self.peaks: tuple[float, ...]
        self.bound, self.overflow = 0.0, (math.inf, Reason())
        self.orders: tuple[tuple[tuple, int], ...] = ()     # whose bottlenecks were used, and the work to find them
        self.effort, self.peaks = 4 * self._table, ()

    def run(self, look: Look = Look.SEARCH) -> Verdict:
        """Everything that such a look says of the point."""
        point = self.point
        try:
            schedule = schedule_of(point.schedule, point.workers, point.num_microbatches, point.stages_per_worker)
        except ScheduleError as error:
            return Verdict(point, math.inf, None, Reason(str(error)))
        if schedule.topology.num_stages != point.num_stages or schedule.topology.num_routes > 1:
            return Verdict(point, math.inf, None,
                           Reason(f"{point.schedule} has {schedule.topology.num_stages} stages"))
        missing = lacking(self.scene, self.chain)
        if missing:
            return Verdict(point, math.inf, None, missing)
        self.rates = Rates.of(self.scene, self.chain, schedule.topology.worker_of)
        relaxed = self._relax(schedule)
        missing, tables = crowded(relaxed)
        self.effort += tables * self._table
        if missing:
            return Verdict(point, math.inf, None, missing)
        ways = math.comb(len(self.chain) - 1, point.num_stages - 1) * relaxed.ways.choices()
        if look == Look.BOUND:
            self._first_bound(relaxed, played=False)
        elif ways <= FEW_CUTS:
            self._all_cuts(schedule, relaxed)
        else:
            self._converge(schedule, relaxed, look)
        return Verdict(point, self.bound, self.best, Reason() if self.best else self.overflow[1])

    def _relax(self, schedule: Schedule, share: float = 1.0, parts: Sequence[float] | None = None) -> Relaxation:
        return relax(self.scene, self.chain, schedule, self.rates, self.cutoff, share, parts)

    def _all_cuts(self, schedule: Schedule, relaxed: Relaxation) -> None:
        """Every cut, those with the shortest longest path first, until no other can be faster."""
        cuts = [(float(relaxed.lengths(relaxed.ways.held(cut)).max()), cut)
                for cut in _all_of(relaxed, len(self.chain))]
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

    def _converge(self, schedule: Schedule, relaxed: Relaxation, look: Look) -> None:
        """From the most even cut on, paths and cuts in turn. Where even that does not fit, with room to spare."""
        pricing = self._first_bound(relaxed)
        if not self._priced(pricing, FEW_ROUNDS, self.cutoff) or look == Look.ORDER:
            return
        cut = relaxed.most_even()
        self.effort += _BISECTIONS * self._table // 3
        if cut is None:
            self.bound = self.cutoff
            return
        paths = [self._judge(schedule, cut)[1]]
        if self.best is None:
            self._make_fit(schedule, relaxed, cut, _SHARES if look > Look.CUT else _SHARES[:1])
        paths += self._improve(schedule, relaxed, _PLAYS if look > Look.CUT else 1)
        if look == Look.CUT:
            return
        known = min(self.cutoff, self.best.seconds if self.best else math.inf)
        relaxed.narrow(known)
        for path in paths:
            pricing.add(path, known)
        pricing.rescale(known if math.isfinite(known) else relaxed.scale)
        if not self._close(schedule, pricing, _ROUNDS[look], known):
            return
        self._sharpen(relaxed, pricing.weights, known)
        self._recompute_more(schedule, pricing.cuts[-1])
        self._improve(schedule, relaxed, _PLAYS)

    def _close(self, schedule: Schedule, pricing: Pricing, rounds: int, known: float) -> bool:
        """Prices of the paths so far, and the paths that those miss, in turns. Whether the point may still be faster
        than ``known``."""
        for number in range(rounds):
            before = self.bound
            if self.bound > 0:
                pricing.rescale(_NEAR * self.bound)
            if not self._priced(pricing, DUALS, known):
                return False
            if number > 2 and self.bound < before * (1 + _LITTLE):
                break
            for walk in of_mixed(schedule, pricing.mixed(), number) if self.chain.returns else ():
                pricing.add(self.rates.path(walk), known)
                self.effort += PER_PLAY * schedule.num_actions
        return True

    def _first_bound(self, relaxed: Relaxation, played: bool = True) -> Pricing:
        """A bound from the work of all workers alone, where memory limits it; if ``played``, from their order too."""
        work = self.chain.sums(self.chain.plain.forward + self.chain.plain.backward)[-1]
        relaxed.scale = min(self.cutoff, 1.2 * self.point.num_microbatches * float(work) / self.point.workers)
        paths, limits = [_ways_in(relaxed)], len(relaxed.limits)
        if has_order(self.scene, self.chain):
            if played:
                self.orders = add_bottlenecks(relaxed, self.scene, self.chain, self.rates, self.cutoff)
            paths.append(hard_weights(*key_of(self.point, self.chain), with_bottlenecks=played))
        pricing, tries = Pricing(relaxed), []
        for weights in (np.append(each, np.zeros(len(relaxed.paths) - len(each))) for each in paths):
            tries.append((weights, np.zeros(limits)))
            if limits and len(relaxed.ways.sums) > 1:
                tries.append((weights, relaxed.memory_prices(weights)))
        tries += [(weights, np.full(limits, share / limits)) for share in (_LIMIT_SHARES if limits else ())]
        for each in tries:
            cut = pricing.tried(np.concatenate(each))
            self.effort += self._table
            self.bound = max(self.bound, min(pricing.bound, self.cutoff))
            if cut is None:
                break
        return pricing

    def _priced(self, pricing: Pricing, rounds: int, known: float) -> bool:
        """Whether the point may still be faster than ``known`` after so many rounds that play nothing through."""
        for _ in range(rounds):
            if self.bound >= known * (1 - CLOSE):
                return False
            cut = pricing.step()
            self.effort += self._table + WORK
            self.bound = max(self.bound, min(pricing.bound, known))
            if cut is None:
                self.bound = known
                return False
        return self.bound < known * (1 - CLOSE)

    @property
    def _table(self) -> int:
        """Work of one dynamic programme, about in microseconds."""
        places = len(self.chain)
        return self.point.num_stages * (30 + places ** 2 // 40 if self.point.recompute == "blocks" else
                                        150 + places // 4)

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

    def _make_fit(self, schedule: Schedule, relaxed: Relaxation, cut: Cut, shares: Sequence[float]) -> None:
        """First more that recomputes; then cuts as if a stage had its share of the memory, or there were less."""
        self._recompute_more(schedule, cut)
        memory = self.scene.hardware.memory
        if memory is None:
            return
        if self.point.stages_per_worker > 1 and self.point.recompute == "stages":
            self._recompute_alike(schedule, shares)
        if self.point.stages_per_worker > 1 and self.point.recompute != "none":
            self._share_memory(schedule, relaxed, cut, memory)
        for share in shares:
            if self.best is not None:
                return
            even = self._relax(schedule, share).most_even()
            if even is None:
                return
            self._judge(schedule, even)
            self._recompute_more(schedule, even)

    def _share_memory(self, schedule: Schedule, relaxed: Relaxation, cut: Cut, memory: float) -> None:
        """The evenest cuts where each stage has a part of its worker's memory, as the cut before would use it."""
        for share in (1.0, *_SHARES[:1]):
            parts = shared_memory(schedule, relaxed, cut, memory, self.scene.state_factor)
            even = self._relax(schedule, share, parts).most_even()
            if even is None:
                return
            self._judge(schedule, even)
            self._recompute_more(schedule, even)
            cut = even

    def _recompute_alike(self, schedule: Schedule, shares: Sequence[float]) -> None:
        """Evenest cuts where every worker recomputes as many of its stages, those first that hold most."""
        for many in range(1, self.point.stages_per_worker + 1):
            for share in (1.0, *shares):
                relaxed = self._relax(schedule, share)
                assert isinstance(relaxed.ways, Windows), "whole stages"
                even = replace(relaxed, ways=relaxed.ways.forced(alike(schedule, many))).most_even()
                if even is None:
                    break
                self._judge(schedule, even)
                if self.best is not None and self.best.cut == even:
                    return

    def _improve(self, schedule: Schedule, relaxed: Relaxation, plays: int) -> list[Path]:
        """From the best cut to better ones on the paths so far, each played through. The longest paths."""
        if self.best is None:
            return []
        paths = [self._path]
        for _ in range(plays):
            best = self.best
            known = replace(relaxed, paths=[*relaxed.paths, *paths])
            near = Neighbours(known, schedule, self.scene.hardware.memory, self.scene.state_factor)
            near.measure(best.cut, best.peak_bytes)
            cut = near.descend(best.cut)
            self.effort += _PER_MOVE * near.moved * self.point.num_stages
            if cut == best.cut:
                break
            paths.append(self._judge(schedule, cut)[1])
            self._recompute_more(schedule, cut)
        return paths

    def _recompute_more(self, schedule: Schedule, cut: Cut) -> None:
        """Where the cut does not fit: judge the one that recomputes enough."""
        if self.best is not None and self.best.cut == cut:
            return
        fitting, counted = recompute_more(self.scene, self.chain, schedule, cut)
        self.effort += counted * schedule.num_actions
        if fitting is not None and fitting != cut:
            self._judge(schedule, fitting)

    def _judge(self, schedule: Schedule, cut: Cut) -> tuple[float, Path]:
        """Play a cut through; it is the best if it fits and is faster. Its seconds, and its longest path."""
        grain = self.point.recompute
        plan = self.chain.price(*cut, grain)
        seconds, timeline, costs = play(self.scene, plan, schedule)
        self.effort += PER_PLAY * schedule.num_actions + 100 * self.point.num_stages
        path = self.rates.path(longest(schedule, costs, timeline, edges_of(plan)))
        if self.best is None or seconds < self.best.seconds * (1 - 1e-12):
            peaks, memory = peak_bytes(self.scene, plan, schedule), self.scene.hardware.memory
            over, self.peaks = max(peaks) - (memory or math.inf), peaks
            if over <= 0:
                bubble = 1 - float(timeline.busy.mean()) / seconds if seconds else 0.0
                self.best = Candidate(self.point, cut, seconds, peaks, bubble, plan)
                self._path = path
            elif over < self.overflow[0]:
                worker = int(np.argmax(peaks))
                share = max(peaks) / (memory or math.inf)
                self.overflow = over, Reason(f"worker {worker} needs {format_share(share, 0)} of the memory", share)
        return seconds, path


def _all_of(relaxed: Relaxation, last: int) -> Iterator[Cut]:
    """Every cut that is left, with its ways to recompute."""
    for inner in itertools.combinations(range(1, last), relaxed.num_stages - 1):
        places = (0, *inner, last)
        for until in itertools.product(*(tuple(relaxed.ways.untils(stage, a, b))
                                         for stage, (a, b) in enumerate(zip(places, places[1:])))):
            yield places, until


def _ways_in(relaxed: Relaxation) -> np.ndarray:
    """Equal weights, of sum 1, for the paths that hold all the work of one worker."""
    weights = np.zeros(len(relaxed.paths))
    holds = np.array([path.counts[:, 3].any() and path.counts[:, 2].max() == path.counts[:, 0].max()
                      for path in relaxed.paths])
    weights[holds if holds.any() else slice(None)] = 1.0
    return weights / weights.sum()
