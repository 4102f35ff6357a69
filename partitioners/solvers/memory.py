"""When memory is what matters: whether anything fits, and what would."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from partitioners.graph import Link, Node
from partitioners.solvers.problem import Problem
from partitioners.solvers.segments import segment_memory
from partitioners.units import format_bytes


def memory_problem(problem: Problem) -> Problem:
    """A problem whose loads are fractions of each device's memory; its optimum is above 1 only if nothing fits.

    Shared parameters and workspace are left out, so the optimum is a lower bound where there are any.
    """
    levels, times = [], {}
    for number, kind in enumerate(problem.levels):
        device = replace(kind.device, name=f"{kind.device.name} {number}", memory=None)
        levels.append(replace(kind, device=device, link_in=Link(), link_out=Link()))
        cap = kind.device.memory
        need = problem.fixed_bytes + kind.in_flight * problem.activation_bytes
        share = np.zeros(len(problem)) if cap is None else need / cap if cap > 0 else np.where(need > 0, np.inf, 0.0)
        times[device] = np.where(np.isfinite(problem.times[kind.device]), share, np.inf)
    return replace(problem, levels=tuple(levels), times=times, nets=(), shared=(), objective="sum",
                   workspace_bytes=np.zeros(len(problem)))


def with_memory(problem: Problem, size: float | None) -> Problem:
    """The problem on devices of ``size`` bytes, where they have a limit at all."""
    levels = tuple(kind if kind.device.memory is None else replace(kind, device=replace(kind.device, memory=size))
                   for kind in problem.levels)
    old = [kind.device for kind in problem.levels]
    return replace(
        problem,
        levels=levels,
        times={kind.device: problem.times[device] for kind, device in zip(levels, old)},
        again={kind.device: problem.again[device] for kind, device in zip(levels, old)},
    )


def stage_bytes(problem: Problem, stage: Iterable[Node], in_flight: int) -> float:
    """Bytes that a stage of these nodes needs, before any recomputation."""
    nodes = set(stage)
    return item_bytes(problem, [item for item, group in enumerate(problem.items) if group[0] in nodes], in_flight)


def item_bytes(problem: Problem, items: list[int], in_flight: int) -> float:
    """Bytes that a stage of these items needs, before any recomputation."""
    return held_bytes(problem, items, in_flight) + float(problem.workspace_bytes[items].max(initial=0.0))


def held_bytes(problem: Problem, items: list[int], in_flight: int) -> float:
    """The same without scratch."""
    held = sum(size for pins, size in problem.shared if not set(pins).isdisjoint(items))
    return float(problem.fixed_bytes[items].sum() + in_flight * problem.activation_bytes[items].sum() + held)


def hopeless(problem: Problem) -> str | None:
    """Why no number of stages fits, if one item alone is too large for every device that may run it."""
    for item in range(len(problem)):
        rooms = []
        for kind in problem.levels:
            if not np.isfinite(problem.times[kind.device][item]):
                continue
            need = (problem.fixed_bytes[item] + problem.activation_bytes[item] * kind.in_flight
                    + problem.workspace_bytes[item] + sum(size for pins, size in problem.shared if item in pins))
            rooms.append((np.inf if kind.device.memory is None else kind.device.memory, need))
        if rooms and all(need > room * (1 + 1e-12) for room, need in rooms):
            names = ", ".join(map(str, problem.items[item][:3]))
            more = f" and {len(problem.items[item]) - 3} more" if len(problem.items[item]) > 3 else ""
            return (f"{names}{more} must share a stage and need {format_bytes(rooms[0][1])} "
                    f"({rooms[0][1]:,.0f} bytes) but a device has {rooms[0][0]:,.0f} bytes")
    return None


def fewest_stages(problem: Problem) -> int | None:
    """How many stages of the first class this order needs for every one to fit; None if none do."""
    kind = problem.levels[0]
    if kind.device.memory is None:
        return None
    fits = segment_memory(problem, kind) <= kind.device.memory * (1 + 1e-12)
    size = len(problem)
    fewest = np.full(size + 1, np.inf)
    fewest[0] = 0
    for end in range(1, size + 1):
        fewest[end] = fewest[:end][fits[:end, end]].min(initial=np.inf) + 1
    return int(fewest[size]) if np.isfinite(fewest[size]) else None
