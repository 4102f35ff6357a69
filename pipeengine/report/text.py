"""Timelines as letters."""
from __future__ import annotations

import numpy as np

from pipeengine.report.svg import shades
from pipeengine.simulation import OPS, Timeline


def timeline_text(timeline: Timeline, width: int = 120) -> str:
    """The grid of a timeline, one row per worker and at most ``width`` columns.

    Actions carry their micro-batch where a cell per smallest action leaves room (``F0 F1 .  B0---``); else every column
    shows the letter that fills most of it, and the micro-batch where an action is wide enough (``F0F1B0--``). Lower
    case is a later stage of the worker, a dot idle time.
    """
    mask = timeline.computes & (timeline.end > timeline.start)
    if not mask.any():
        return "(nothing ran)"
    label = len(str(timeline.num_workers - 1))
    room = max(width - label - 2, 20)
    begin, span = timeline.start[mask].min(), timeline.makespan
    cell = 1 + len(str(timeline.num_microbatches - 1)) + 1
    slots = span / (timeline.end - timeline.start)[mask].min()
    even = abs(slots - round(slots)) < 1e-6
    if even and slots * cell <= room:
        rows = _cells(timeline, mask, begin, span / round(slots), round(slots), cell)
    else:
        whole = round(slots) * (room // round(slots)) if even else 0         # equal actions get equal widths
        rows = _letters(timeline, mask, begin, span, whole or room)
    return "\n".join(f"{worker:>{label}}  {row.rstrip()}" for worker, row in enumerate(rows))


def _cells(timeline: Timeline, mask: np.ndarray, begin: float, slot: float, slots: int, cell: int) -> list[str]:
    rows, later = [["."] * slots for _ in range(timeline.num_workers)], shades(timeline)
    for i in np.flatnonzero(mask).tolist():
        first = round((timeline.start[i] - begin) / slot)
        last = max(round((timeline.end[i] - begin) / slot), first + 1)
        rows[timeline.worker[i]][first:last] = [_name(timeline, i, later[i])] + ["-" * (cell - 1)] * (last - first - 1)
    return ["".join(text.ljust(cell, "-" if text[0] != "." and nxt[:1] == "-" else " ")
                    for text, nxt in zip(row, row[1:] + [""])) for row in rows]


def _name(timeline: Timeline, i: int, later: int) -> str:
    letter = OPS[timeline.op[i]].lower() if later else OPS[timeline.op[i]]
    return letter + (str(timeline.microbatch[i]) if timeline.microbatch[i] >= 0 else "")


def _letters(timeline: Timeline, mask: np.ndarray, begin: float, span: float, room: int) -> list[str]:
    """One letter per column: the operation that is busy for most of that column, if for half of it; wider actions by
    name."""
    columns, later = _busiest(timeline, mask, begin, span, room), shades(timeline)
    for i in np.flatnonzero(mask).tolist():
        name, wide = _name(timeline, i, later[i]), (timeline.end[i] - timeline.start[i]) / span * room
        if wide > 2 - 1e-6:
            first, last = (round((time[i] - begin) / span * room) for time in (timeline.start, timeline.end))
            name = name if wide > len(name) - 1e-6 else name[0]
            columns[timeline.worker[i]][first:last] = name.ljust(last - first, "-")
    return ["".join(row) for row in columns]


def _busiest(timeline: Timeline, mask: np.ndarray, begin: float, span: float, room: int) -> list[list[str]]:
    filled = np.zeros((timeline.num_workers, room, len(OPS)))
    low, high = ((times[mask] - begin) / span * room for times in (timeline.start, timeline.end))
    first, last = np.floor(low).astype(int), np.minimum(np.ceil(high).astype(int), room)
    for offset in range(int((last - first).max())):
        column = first + offset
        part = np.minimum(high, column + 1) - np.maximum(low, column)
        inside = (column < last) & (part > 0)
        np.add.at(filled, (timeline.worker[mask][inside], column[inside], timeline.op[mask][inside]), part[inside])
    best = filled.argmax(2)
    busy = filled.sum(2) >= 0.5
    return [[OPS[op] if on else "." for op, on in zip(ops, ons)] for ops, ons in zip(best, busy)]
