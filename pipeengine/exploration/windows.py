"""Ways to cut into stages that recompute whole or not at all: windows of places where each may start."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeengine.exploration.ways import SLACK, Cut, range_minima


@dataclass
class Windows:
    """Stages that recompute whole or not at all. ``starts[o][s][b]``: the first place where stage s may start that ends
    at b, plain (o = 0) or recomputing (o = 1); ``last_start[b]`` is the last."""

    sums: Sequence[np.ndarray]
    last_start: np.ndarray
    starts: list[np.ndarray]

    @classmethod
    def of(cls, sums: Sequence[np.ndarray], num_stages: int, last_start: np.ndarray) -> Windows:
        """Every place of every stage."""
        return cls(sums, last_start, [np.zeros((num_stages, len(last_start)), np.int64) for _ in sums])

    @property
    def num_stages(self) -> int:
        """Stages of a cut."""
        return len(self.starts[0])

    def copy(self) -> Windows:
        """The same, to narrow without changing this one."""
        return replace(self, starts=[each.copy() for each in self.starts])

    def narrow(self, stage: int, counts: np.ndarray, room: float) -> None:
        """Put out the ways of ``stage`` that hold more than ``room``, as ``counts`` weigh it."""
        for sums, starts in zip(self.sums, self.starts):
            need = counts @ sums
            np.maximum(starts[stage], np.searchsorted(need, need - room), out=starts[stage])

    def forced(self, flags: Sequence[bool]) -> Windows:
        """The same where it is settled which stages recompute."""
        made, never = self.copy(), len(self.last_start)
        for stage, flag in enumerate(flags):
            made.starts[not flag][stage] = never
        return made

    def evenness(self, seconds: np.ndarray) -> Callable[[float], bool]:
        """Whether some cut has no stage above so many seconds, as ``seconds`` weigh what a stage holds."""
        loads, after = [seconds @ sums for sums in self.sums], self.last_start + 1

        def within(most: float) -> bool:
            reached = np.zeros(len(self.last_start), bool)
            reached[0] = True
            for stage in range(self.num_stages):
                counts, now = np.concatenate(([0], np.cumsum(reached))), np.zeros(len(reached), bool)
                for load, starts in zip(loads, self.starts):
                    first = np.maximum(starts[stage], np.searchsorted(load, load - most * (1 + SLACK)))
                    now |= counts[np.maximum(after, first)] > counts[first]
                reached = now
            return bool(reached[-1])
        return within

    def cheapest(self, counts: np.ndarray) -> tuple[float, Cut | None]:
        """The cut that holds least, as ``counts`` of each stage weigh it; (inf, None) if none is left."""
        prices = [counts @ sums for sums in self.sums]
        value = np.full(len(self.last_start), np.inf)
        value[0] = 0.0
        values = [value]
        for stage in range(self.num_stages):
            best = np.full(len(value), np.inf)
            for price, starts in zip(prices, self.starts):
                least = range_minima(values[-1] - price[stage], starts[stage], self.last_start)
                np.minimum(best, least + price[stage], out=best)
            values.append(best)
        return float(values[-1][-1]), self._walk_back(values, prices) if np.isfinite(values[-1][-1]) else None

    def _walk_back(self, values: list[np.ndarray], prices: list[np.ndarray]) -> Cut:
        place, cuts, until = len(self.last_start) - 1, [len(self.last_start) - 1], []
        for stage in reversed(range(self.num_stages)):
            choices = []
            for option, (price, starts) in enumerate(zip(prices, self.starts)):
                low, high = int(starts[stage][place]), int(self.last_start[place]) + 1
                if low < high:
                    sums = values[stage][low:high] - price[stage][low:high]
                    choices.append((float(sums.min() + price[stage][place]), option, low + int(sums.argmin())))
            _, option, start = min(choices)
            until.append(place if option else start)
            cuts.append(start)
            place = start
        return tuple(reversed(cuts)), tuple(reversed(until))

    def held(self, cut: Cut) -> np.ndarray:
        """What each stage of a cut holds: (stages, 7)."""
        places, until = np.array(cut[0]), np.array(cut[1])
        starts, ends, plain, last = places[:-1], places[1:], self.sums[0], self.sums[-1]
        held = np.where(until > starts, last[:, ends] - last[:, starts], plain[:, ends] - plain[:, starts])
        return np.ascontiguousarray(held.T)

    def choices(self) -> float:
        """Ways to recompute, at most, for any places of the cuts."""
        return float(len(self.sums) ** self.num_stages)

    def untils(self, stage: int, start: int, end: int) -> Iterator[int]:
        """Places up to which a stage between two places may recompute."""
        if start <= self.last_start[end]:
            for option, starts in enumerate(self.starts):
                if starts[stage][end] <= start:
                    yield end if option else start
