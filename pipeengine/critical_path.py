"""The one solver behind check, lowering and simulation: longest paths through lanes that wait for each other.

An action starts when the one before it in its lane has ended and when each action it waits for, plus that
wait's latency, has. Everything is an array over all actions, lanes one after another.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Wait(NamedTuple):
    """One column of waits: action i starts ``latency[i]`` seconds or more after the end of ``on[i]`` (-1: none)."""
    on: np.ndarray
    latency: np.ndarray


@dataclass
class Stuck(Exception):
    """No action can run: lane l waits at ``position[l]`` (an index over all actions; its lane's end when done)."""
    position: np.ndarray


def solve(starts: np.ndarray, duration: np.ndarray, waits: tuple[Wait, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Start and end of every action, as early as possible. Raises ``Stuck`` when the order cannot complete."""
    end = _worklist(starts, duration, waits)
    return _begin(starts, end, waits), end


def _begin(starts: np.ndarray, end: np.ndarray, waits: tuple[Wait, ...]) -> np.ndarray:
    """The starts that belong to ``end``: exactly the largest end (plus latency) that each action waits for."""
    begin = np.concatenate([[0.0], end[:-1]])
    begin[starts[:-1][starts[:-1] < len(end)]] = 0.0
    for on, latency in waits:
        np.maximum(begin, np.where(on >= 0, end[on] + latency, 0.0), out=begin)
    return begin


def _worklist(starts: np.ndarray, duration: np.ndarray, waits: tuple[Wait, ...]) -> np.ndarray:
    columns = [(on.tolist(), latency.tolist()) for on, latency in waits]
    duration_of = duration.tolist()
    position, last = starts[:-1].tolist(), starts[1:].tolist()
    end: list[float | None] = [None] * len(duration_of)
    waiting: dict[int, list[int]] = {}
    free = [0.0] * len(position)
    ready = list(range(len(position)))[::-1]
    while ready:
        lane = ready.pop()
        i, now, stop = position[lane], free[lane], last[lane]
        while i < stop:
            for on, latency in columns:
                other = on[i]
                if other >= 0:
                    ended = end[other]
                    if ended is None:
                        waiting.setdefault(other, []).append(lane)
                        break
                    if ended + latency[i] > now:
                        now = ended + latency[i]
            else:
                now += duration_of[i]
                end[i] = now
                if i in waiting:
                    ready.extend(waiting.pop(i))
                i += 1
                continue
            break
        position[lane], free[lane] = i, now
    if position != last:
        raise Stuck(np.array(position))
    return np.array(end, dtype=np.float64)
