"""Bounds and solutions by sweeps of small integer programmes, where ideals are too many to count.

For a target load T, sweep over the stages. From below (dual): x_0 = 0 and x_{j+1} is the most work that an ideal can
hold whose last stage starts at *some* ideal of work x_j or less and has load T or less; if x_k stays below all work, no
k stages have loads of T or less (by induction on the work of the j-th ideal). From above (primal): the same from the
very ideal found before; reaching all items is a solution. The works of the best chain known guide the dual sweep: it
need not know how far below them x_j is, and so most items are settled before the solver (HiGHS, through scipy) starts.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from partitioners.solvers.chain_search import backwards
from partitioners.solvers.problem import Problem

STEP_GAP = 5e-4         # relative gap at which the solver may stop a dual step
PRIMAL_STEP = 12.0      # seconds for one primal step
THRIFTS = (1.2, 0.6)    # multiples of an ideal's cut that primal sweeps take off its work
LEAST_THRIFT = 0.1
FIRST_STEP, STEP = 0.06, 0.015  # steps of the target of primal sweeps, as fractions of the best load known
MANY, LIKELY = 8, 0.085  # number of stages beyond which targets less than that share below are not tried first
EPSILON = 1e-9
ALL = 1 - 1e-6          # of all work


class NoSolver(Exception):
    """scipy with HiGHS is not installed."""


@dataclass(frozen=True)
class Window:
    """Work that an ideal may hold, as fractions of all work."""
    low: float
    high: float


class _Rows:
    """Rows of a sparse matrix, with their limits."""

    def __init__(self) -> None:
        self.entries: tuple[list, list, list] = ([], [], [])
        self.low: list[float] = []
        self.high: list[float] = []

    def add(self, terms, low: float, high: float) -> None:
        rows, columns, values = self.entries
        for column, value in terms:
            rows.append(len(self.low))
            columns.append(column)
            values.append(value)
        self.low.append(low)
        self.high.append(high)


class Sweeper:
    """Integer programmes over the ideals of one problem with equal devices, sums and equal links.

    Variables: y (the ideal that ends the stage), z (the one that starts it), and for every net the largest and smallest
    of y - z over its items, whose difference says whether the stage pays for it.
    """

    def __init__(self, problem: Problem) -> None:
        try:
            import scipy.optimize
            import scipy.sparse
        except ImportError as error:
            raise NoSolver(str(error)) from error
        self.optimize, self.sparse = scipy.optimize, scipy.sparse
        self.problem, self.size = problem, len(problem)
        kind = problem.levels[0]
        times = problem.times[kind.device]
        self.scale = float(times.sum())
        self.work = times / self.scale
        self.price = np.array([net.seconds(kind.link_in) * (2 if net.source < 0 else 1)
                               for net in problem.nets]) / self.scale
        self.memory = None
        if problem.memory_may_bind():
            self.memory = (problem.fixed_bytes + kind.in_flight * problem.activation_bytes) / kind.device.memory
        self.before, self.after = self._closures()

    def _closures(self) -> tuple[np.ndarray, np.ndarray]:
        """Work that each item brings with it: itself and all before, itself and all after."""
        sums = []
        for order, near in ((range(self.size), self.problem.predecessors),
                            (range(self.size)[::-1], self.problem.successors)):
            reach = np.zeros((self.size, self.size), bool)
            for item in order:
                reach[item, item] = True
                for other in near[item]:
                    reach[item] |= reach[other]
            sums.append(reach @ self.work)
        return sums[0], sums[1]

    def _settle(self, low: np.ndarray, high: np.ndarray, window: Window) -> None:
        """Fix the items that every ideal of such work holds, or none."""
        high[self.before > window.high + EPSILON] = 0.0
        low[self.after > 1.0 - window.low + EPSILON] = 1.0

    def step(self, target: float, start: frozenset[int] | None, starts: Window, ends: Window, gap: float,
             seconds: float, thrift: float = 0.0) -> tuple[float, frozenset[int] | None]:
        """Most work of an ideal one stage of load ``target`` away: a bound, and an ideal if one was found.

        The stage begins at the ideal ``start``, or at any whose work is in ``starts``. ``thrift`` takes that multiple
        of the ideal's own cut off its work, for the stages to come must pay it.
        """
        size, nets = self.size, len(self.price)
        low, high = np.zeros(2 * size + 3 * nets), np.ones(2 * size + 3 * nets)
        self._settle(low[:size], high[:size], ends)
        if start is None:
            self._settle(low[size:2 * size], high[size:2 * size], starts)
        else:
            low[size:2 * size] = high[size:2 * size] = [item in start for item in range(size)]
            low[:size] = np.maximum(low[:size], low[size:2 * size])
        if (low > high).any():
            return ends.low, None
        rows = self._rows(target, low, high)
        work = list(enumerate(self.work))
        rows.add(work, ends.low - EPSILON, np.inf)
        if start is None:
            rows.add([(size + item, weight) for item, weight in work], starts.low - EPSILON, starts.high + EPSILON)
        objective = np.concatenate((-self.work, np.zeros(size + 2 * nets), thrift * self.price))
        if thrift:
            self._add_cut(rows, low, high)
        return self._solve(objective, rows, low, high, gap, seconds, ends)

    def _solve(self, objective: np.ndarray, rows: _Rows, low: np.ndarray, high: np.ndarray, gap: float,
               seconds: float, ends: Window) -> tuple[float, frozenset[int] | None]:
        row, column, value = rows.entries
        matrix = self.sparse.csr_matrix((value, (row, column)), shape=(len(rows.low), len(low)))
        integral = np.arange(len(low)) < 2 * self.size
        answer = self.optimize.milp(
            objective, integrality=integral, bounds=self.optimize.Bounds(low, high),
            constraints=self.optimize.LinearConstraint(matrix, rows.low, rows.high),
            options={"time_limit": max(seconds, 0.1), "mip_rel_gap": gap})
        if answer.status == 2:
            return ends.low, None
        bound = ends.high if answer.mip_dual_bound is None else min(ends.high, -float(answer.mip_dual_bound))
        if answer.x is None:
            return bound, None
        return bound, frozenset(np.flatnonzero(answer.x[:self.size] > 0.5).tolist())

    def _rows(self, target: float, low: np.ndarray, high: np.ndarray) -> _Rows:
        """Order, nesting and load, without rows about settled items."""
        size, rows, free = self.size, _Rows(), high > low
        for u, v in self.problem.edges:
            for offset in (0, size):
                if free[offset + u] or free[offset + v]:
                    rows.add(((offset + u, 1.0), (offset + v, -1.0)), 0.0, np.inf)
        for item in range(size):
            if free[item] or free[size + item]:
                rows.add(((item, 1.0), (size + item, -1.0)), 0.0, np.inf)
        load = self._difference(self.work)
        nets = len(self.price)
        for number, net in enumerate(self.problem.nets):
            pins = list(net.pins)
            if not high[pins].any() or low[[size + pin for pin in pins]].all() or not self.price[number]:
                continue
            largest, smallest = 2 * size + number, 2 * size + nets + number
            for pin in pins:
                rows.add(((largest, 1.0), (pin, -1.0), (size + pin, 1.0)), 0.0, np.inf)
                rows.add(((smallest, -1.0), (pin, 1.0), (size + pin, -1.0)), 0.0, np.inf)
            load += [(largest, self.price[number]), (smallest, -self.price[number])]
        rows.add(load, -np.inf, target)
        if self.memory is not None:
            rows.add(self._difference(self.memory), -np.inf, 1.0 + EPSILON)
        return rows

    def _add_cut(self, rows: _Rows, low: np.ndarray, high: np.ndarray) -> None:
        """The last variable of each net is 1 if the ideal that ends the stage holds only some of it."""
        first = 2 * self.size + 2 * len(self.price)
        for number, net in enumerate(self.problem.nets):
            pins = net.pins
            if low[list(pins)].all() or not high[list(pins)].any():
                continue
            for pin in pins[1:]:
                rows.add(((first + number, 1.0), (pins[0], -1.0), (pin, 1.0)), 0.0, np.inf)
                if pin not in self.problem.successors[pins[0]]:
                    rows.add(((first + number, 1.0), (pins[0], 1.0), (pin, -1.0)), 0.0, np.inf)

    def _difference(self, weights: np.ndarray) -> list[tuple[int, float]]:
        """``weights . (y - z)``."""
        return [entry for item, weight in enumerate(weights) if weight
                for entry in ((item, weight), (self.size + item, -weight))]

    def primal(self, target: float, stages: int, thrift: float, deadline: float) -> list[frozenset[int]]:
        """Ideals reached one after the other, until all items are in, nothing more fits, or too much is left."""
        scaled, chain = target / self.scale, [frozenset()]
        for stage in range(stages):
            weight = self.held(chain[-1:])[0]
            reached = chain[-1]
            if 1.0 - weight <= (stages - stage) * scaled:
                reached = self._advance(scaled, chain[-1], Window(weight, min(1.0, weight + scaled)), thrift, deadline)
            if reached == chain[-1]:
                break
            chain.append(reached)
            if len(reached) == self.size:
                break
        return chain[1:]

    def _advance(
        self, target: float, start: frozenset[int], ends: Window, thrift: float, deadline: float
    ) -> frozenset[int]:
        """The ideal one stage further; with less thrift where so much of it would rather stay."""
        reached = None
        while reached in (None, start) and time.monotonic() < deadline and thrift > LEAST_THRIFT:
            left = max(deadline - time.monotonic(), 0.1)
            _, reached = self.step(target, start, Window(0.0, 1.0), ends, 1e-3, min(left, PRIMAL_STEP), thrift)
            thrift *= 0.6
        return start if reached is None else reached

    def dual(self, target: float, guide: list[float], slack: float, deadline: float,
             step_gap: float = STEP_GAP) -> list[float]:
        """Work that 1, 2, ... stages with loads of ``target`` or less cannot exceed, as far as it is less than all.

        ``guide[j]``: work that ``j + 1`` stages hold at a load a little higher. How much less than that they hold at
        ``target`` does not matter, so each step only looks above it, less ``slack`` of it.
        """
        target, reached = target / self.scale, [0.0]
        for stage, expected in enumerate(guide):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            ends = Window(min(expected * (1 - slack) - 1e-7, reached[-1] + target), min(1.0, reached[-1] + target))
            starts = Window(max(ends.low - target, 0.0), reached[-1])
            bound, _ = self.step(target, None, starts, ends, step_gap, left / (len(guide) - stage) * 1.5)
            if bound >= ALL:
                break
            reached.append(bound)
        return reached[1:]

    def meets(self, target: float, others: list[float], stages: int, deadline: float) -> bool:
        """Whether so many stages may hold all work at ``target``, ``others`` being ``dual`` from the other end."""
        target, reached = target / self.scale, 0.0
        least = [1.0 - work for work in [0.0, *others]][::-1]
        least = [0.0] * (stages + 1 - len(least)) + least
        for stage in range(stages):
            left = deadline - time.monotonic()
            starts, ends = Window(least[stage], reached), Window(least[stage + 1], min(1.0, reached + target))
            if starts.low > starts.high + EPSILON or ends.low > ends.high + EPSILON:
                return False
            if left <= 0 or 2 * stage > stages:
                break
            bound, found = self.step(target, None, starts, ends, STEP_GAP, left / 2)
            if found is None and bound <= ends.low:
                return False
            reached = bound
        return True

    def cut(self, ideal: frozenset[int]) -> float:
        """What the values between ``ideal`` and the rest cost, as a fraction of all work."""
        return float(sum(price for price, net in zip(self.price, self.problem.nets)
                         if 0 < len(ideal.intersection(net.pins)) < len(net.pins)))

    def held(self, chain: list[frozenset[int]]) -> list[float]:
        """Work of each ideal, as fractions of all work."""
        return [float(self.work[sorted(ideal)].sum()) for ideal in chain]

    def best_halves(self, known: float, seconds: float) -> tuple[float, frozenset[int] | None]:
        """Two stages at once: a bound on the larger load, and the ideal between them."""
        size, nets = self.size, len(self.price)
        rows, load = _Rows(), size + nets
        for u, v in self.problem.edges:
            rows.add(((u, 1.0), (v, -1.0)), 0.0, np.inf)
        cut = [(size + number, -price) for number, price in enumerate(self.price)]
        for number, net in enumerate(self.problem.nets):
            pins = net.pins
            for pin in pins:
                if net.source >= 0 and pin != net.source:
                    rows.add(((size + number, 1.0), (net.source, -1.0), (pin, 1.0)), 0.0, np.inf)
                    if not self._ordered(net.source, pin):
                        rows.add(((size + number, 1.0), (net.source, 1.0), (pin, -1.0)), 0.0, np.inf)
                elif net.source < 0 and pin != pins[0]:
                    for sign in (1.0, -1.0):
                        rows.add(((size + number, 1.0), (pins[0], sign), (pin, -sign)), 0.0, np.inf)
        rows.add([*((item, -weight) for item, weight in enumerate(self.work)), *cut, (load, 1.0)], 0.0, np.inf)
        rows.add([*((item, weight) for item, weight in enumerate(self.work)), *cut, (load, 1.0)], 1.0, np.inf)
        if self.memory is not None:
            total = float(self.memory.sum())
            rows.add(list(enumerate(self.memory)), total - 1.0 - EPSILON, 1.0 + EPSILON)
        row, column, value = rows.entries
        matrix = self.sparse.csr_matrix((value, (row, column)), shape=(len(rows.low), load + 1))
        answer = self.optimize.milp(
            np.eye(1, load + 1, load)[0], integrality=np.arange(load + 1) < size,
            bounds=self.optimize.Bounds(np.zeros(load + 1), np.append(np.ones(load), known / self.scale * (1 + 1e-9))),
            constraints=self.optimize.LinearConstraint(matrix, rows.low, rows.high),
            options={"time_limit": max(seconds, 0.1), "mip_rel_gap": 1e-10})
        bound = 0.0 if answer.mip_dual_bound is None else float(answer.mip_dual_bound) * self.scale
        if answer.status == 2 or answer.x is None:
            return bound, None
        return bound, frozenset(np.flatnonzero(answer.x[:size] > 0.5).tolist())

    def _ordered(self, source: int, pin: int) -> bool:
        return source < pin and pin in self.problem.successors[source]


def can_sweep(problem: Problem) -> bool:
    """Sweeps know one class of paying devices, the sum objective and equal links."""
    kind = problem.levels[0]
    return (problem.counts is not None and len(problem.levels) == 1 and kind.device.pays_link
            and problem.objective == "sum" and kind.symmetric and bool(np.isfinite(problem.times[kind.device]).all())
            and float(problem.times[kind.device].sum()) > 0)


@dataclass(frozen=True)
class Bracket:
    """What is known so far: the best chain of ideals and its load, and a proven lower bound."""
    upper: float
    lower: float
    chain: tuple[frozenset[int], ...]


def narrow(problem: Problem, bracket: Bracket, evaluate: Callable[[list[frozenset[int]]], float], *, gap: float,
           deadline: float) -> Iterator[Bracket]:
    """Brackets that shrink until the gap is met or the time is up. ``evaluate`` prices the chain of ideals exactly."""
    sweeper, upper, lower = Sweeper(problem), bracket.upper, bracket.lower
    if problem.num_stages == 2:
        bound, ideal = sweeper.best_halves(upper, deadline - time.monotonic())
        chain = (ideal, frozenset(range(len(problem)))) if ideal else bracket.chain
        load = evaluate(list(chain)) if ideal else np.inf
        yield Bracket(min(load, upper), max(lower, min(bound, load, upper)), chain if load < upper else bracket.chain)
        return
    begin = time.monotonic()
    for closer in _from_above(sweeper, bracket, evaluate, max(gap, 2e-3) / 2, begin + 0.4 * (deadline - begin)):
        yield closer
        bracket = closer
    yield from _from_below(sweeper, bracket, gap, deadline)


def _from_above(sweeper: Sweeper, bracket: Bracket, evaluate: Callable[[list[frozenset[int]]], float], close: float,
                deadline: float) -> Iterator[Bracket]:
    """Bisect on the target with primal sweeps, each with more and with less thrift, until within ``close``."""
    stages, failed, step = sweeper.problem.num_stages, bracket.lower, FIRST_STEP
    while time.monotonic() < deadline and bracket.upper - failed > close * bracket.upper:
        # A sweep that succeeds is quick and one that fails is not, so the steps down are short.
        target, before, step = max(0.5 * (failed + bracket.upper), (1 - step) * bracket.upper), bracket.upper, STEP
        for thrift in THRIFTS:
            chain = sweeper.primal(target, stages, thrift, deadline)
            if not chain or len(chain[-1]) < sweeper.size:
                continue
            load = evaluate(chain)
            if load < bracket.upper:
                bracket = Bracket(load, bracket.lower, tuple(chain))
                yield bracket
                break
        if bracket.upper == before:
            failed = target


def _from_below(sweeper: Sweeper, bracket: Bracket, gap: float, deadline: float) -> Iterator[Bracket]:
    """Dual sweeps, first at the gap wanted or likely, then closer or further away."""
    near, far, guide = _ends(sweeper, bracket.chain)
    above = max(gap, 0.01)
    wanted = above / (1 + above) * 0.98     # targets lie below the best load known by a share of it
    aim, unproved = max(wanted, LIKELY if len(guide) > MANY else 0.0), 0.0
    while time.monotonic() < deadline and bracket.upper - bracket.lower > gap * bracket.lower:
        target = bracket.upper * (1 - aim)
        close = bracket.upper - bracket.lower < 4e-3 * bracket.upper
        if target <= bracket.lower or aim - unproved < 2e-4:
            break
        # On a slow machine, too, there must be time for something easier.
        limit = deadline - (0.35 * (deadline - time.monotonic()) if len(guide) > MANY else 0.0)
        if _refuted(near, far, target, guide, 0.6 * aim, limit, 1e-7 if close else STEP_GAP):
            bracket = Bracket(bracket.upper, target, bracket.chain)
            yield bracket
            aim = 0.5 * (unproved + aim) if unproved or aim <= wanted else max(0.75 * aim, wanted)
        else:
            unproved, proved = aim, 1 - bracket.lower / bracket.upper
            aim = min(1.6 * aim, 0.5 * (aim + proved))
    if not unproved and time.monotonic() < deadline and gap < 2e-4:
        # Nothing failed on the way, so the best load may well be the optimum itself.
        if len(near.dual(bracket.upper * (1 - 2e-10), guide, 1e-9, deadline, 1e-10)) == len(guide):
            yield Bracket(bracket.upper, bracket.upper, bracket.chain)


def _refuted(near: Sweeper, far: Sweeper, target: float, guide: list[float], slack: float, deadline: float,
             step_gap: float) -> bool:
    """Whether no chain has loads of ``target`` or less: seen from one end, or where sweeps from both ends do not
    meet."""
    begin = time.monotonic()
    reached = near.dual(target, guide, slack, begin + 0.8 * (deadline - begin), step_gap)
    return len(reached) == len(guide) or not far.meets(target, reached, len(guide), deadline)


def _ends(sweeper: Sweeper, chain: tuple[frozenset[int], ...]) -> tuple[Sweeper, Sweeper, list[float]]:
    """Sweepers from both ends, that where cuts are cheap first, and the work that ``chain`` holds from there.

    The dear cuts then come last, where little is left to choose.
    """
    held, cuts = [0.0, *sweeper.held(list(chain))], [sweeper.cut(ideal) for ideal in chain]
    half, stages = len(chain) // 2, sweeper.problem.num_stages
    near, far = sweeper, Sweeper(backwards(sweeper.problem))
    if sum(cuts[:half]) > sum(cuts[len(cuts) - half:]):
        near, far, held = far, near, [1.0 - work for work in reversed(held)]
    return near, far, np.interp(np.arange(1, stages + 1) * (len(chain) / stages), np.arange(len(held)), held).tolist()
