"""Sequences of costs, where nothing but the sums matters."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def split_sequence(costs: Sequence[float], num_parts: int) -> tuple[int, ...]:
    """Cut ``costs`` (not negative) into ``num_parts`` runs whose largest sum is as small as possible.

    Returns ``num_parts + 1`` positions, both ends included; runs may be empty. Exact: a bisection on the largest sum
    whose both ends are always sums of runs (Han, Narahari, Choi 1992). O(num_parts log n) per probe.
    """
    if num_parts < 1:
        raise ValueError(f"num_parts is {num_parts}; it must be at least 1")
    values = np.asarray(costs, float)
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise ValueError("costs must be finite and not negative")
    sums = np.concatenate(([0.0], np.cumsum(values)))
    low = max(float(sums[-1]) / num_parts, float(values.max(initial=0.0)))
    high = low + float(values.max(initial=0.0))
    while True:
        found = _fill(sums, num_parts, low)
        if found is not None:
            return tuple(found)
        low = _smallest_overshoot(sums, num_parts, low)
        middle = 0.5 * (low + high)
        if not low < middle < high:
            continue
        found = _fill(sums, num_parts, middle)
        if found is not None:
            high = _largest(sums, found)
        else:
            low = _smallest_overshoot(sums, num_parts, middle)


def _fill(sums: np.ndarray, num_parts: int, limit: float) -> list[int] | None:
    """Runs as long as ``limit`` allows, or None if items are left over."""
    positions, place, last = [0], 0, len(sums) - 1
    for _ in range(num_parts):
        place = max(place, int(sums.searchsorted(_reach(sums[place], limit), side="right")) - 1)
        positions.append(place)
        if place == last:
            positions += [last] * (num_parts + 1 - len(positions))
            return positions
    return None


def _reach(start: float, limit: float) -> float:
    # A run whose sum rounds to the limit is within it.
    return start + limit + 4e-16 * abs(start + limit)


def _largest(sums: np.ndarray, positions: list[int]) -> float:
    return float(np.diff(sums[positions]).max())


def _smallest_overshoot(sums: np.ndarray, num_parts: int, limit: float) -> float:
    """The least limit above an infeasible one that could change what ``_fill`` does; ``limit`` itself if feasible."""
    place, last, least = 0, len(sums) - 1, np.inf
    for _ in range(num_parts):
        end = max(place, int(sums.searchsorted(_reach(sums[place], limit), side="right")) - 1)
        if end == last:
            return limit
        least = min(least, float(sums[end + 1] - sums[place]))
        place = end
    return least
