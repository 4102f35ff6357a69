"""Timelines as pictures."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

import numpy as np

from partitioners.units import format_share
from pipeengine.errors import ScheduleError
from pipeengine.simulation import OPS, Timeline

# In grey print these are four steps from dark to light: F, B, I, W. No lighter shade of one is like another.
COLOURS = {"F": "#224a86", "B": "#b3402e", "I": "#dca51c", "W": "#a8d597", "X": "#8767a8", "U": "#767d87"}
MEANING = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient",
           "X": "shared gradients", "U": "update"}
_MANY = 20_000
_APART = 5.0        # times as long: the shorter one would be a stroke
_HOVER = 3_000
DARK_INK = ' data-ink="#222"'       # says how to write on a block, where not in white


class Panel(NamedTuple):
    """One timeline of a picture. ``lane`` says what a lane is: idle time is told of workers only."""
    title: str
    timeline: Timeline
    lane: str = "worker"


@dataclass(frozen=True)
class _Frame:
    """Where a panel's time and workers lie, in points of the drawing."""
    left: float
    top: float
    width: float
    lane: float
    begin: float
    seconds: float

    def x(self, time: np.ndarray | float) -> np.ndarray | float:
        return self.left + (time - self.begin) / self.seconds * self.width


def timeline_svg(panels: Sequence[Panel | tuple[str, Timeline]], *, width: float = 960, unit: str = "s",
                 standalone: bool = True, hover: bool = True) -> str:
    """Timelines under each other on one scale, such as predicted over measured; a legend above, an axis below. Where
    one is more than five times as long as another, each has a scale of its own, and the legend says so.

    ``unit`` names the unit on the axis. Not ``standalone``: without the XML name space, for use inside HTML. With
    ``hover`` each action tells its times under the pointer, unless there are many; without it files are half as large.
    """
    panels = [panel for panel in (Panel(*given) for given in panels) if len(panel.timeline.end)]
    if not panels:
        raise ScheduleError("no timeline with any action; 0 panels to draw, give at least 1")
    lengths = [panel.timeline.makespan or 1.0 for panel in panels]
    scales = [max(lengths)] * len(panels) if max(lengths) <= _APART * min(lengths) else lengths
    workers = max(panel.timeline.num_workers for panel in panels)
    lane = 26.0 if workers <= 8 else 18.0 if workers <= 24 else 10.0
    left, right = 74.0, 62.0
    legend, top = _legend(panels, left, width, one_scale=len(set(scales)) == 1)
    parts = []
    for panel, seconds in zip(panels, scales):
        timeline = panel.timeline
        frame = _Frame(left, top + 20, width - left - right, lane, float(timeline.start.min()), seconds)
        parts.append(_panel(panel, frame, width, unit, hover))
        top = frame.top + timeline.num_workers * lane + 44
    head = f'viewBox="0 0 {width:g} {top - 4:g}" width="{width:g}" height="{top - 4:g}" class="timeline"'
    space = ' xmlns="http://www.w3.org/2000/svg"' if standalone else ""
    back = f'<rect width="{width:g}" height="{top - 4:g}" fill="#fff"/>' if standalone else ""
    return (f'<svg{space} {head} font-family="Helvetica, Arial, sans-serif" font-size="11" fill="#222">'
            f"{back}{legend}{''.join(parts)}</svg>")


def _legend(panels: Sequence[Panel], left: float, width: float, one_scale: bool) -> tuple[str, float]:
    """What colours, shades and idle shares mean, in lines; and where the panels begin."""
    letters = {OPS[op] for panel in panels for op in np.unique(panel.timeline.op[panel.timeline.computes])}
    items = [(COLOURS[letter], f"{letter} {MEANING[letter]}") for letter in MEANING if letter in letters]
    if any(shades(panel.timeline).any() for panel in panels):
        items.append(("", "lighter: later stages of a worker"))
    if any(panel.lane == "worker" for panel in panels):
        items.append(("", "idle: share of the time up to the red line"))
    if not one_scale:
        items.append(("", "each on a scale of its own"))
    parts, x, y = [], left, 22.0
    for colour, text in items:
        room = (17 if colour else 0) + 5.4 * len(text)
        if x + room > width - 4:
            x, y = left, y + 18
        if colour:
            parts.append(f'<rect x="{x:g}" y="{y - 10:g}" width="12" height="12" rx="2" fill="{colour}"/>')
        parts.append(
            f'<text x="{x + (17 if colour else 0):g}" y="{y:g}" fill="{"#222" if colour else "#666"}">{text}</text>'
        )
        x += room + 20
    return "".join(parts), y + 16


def _panel(panel: Panel, frame: _Frame, width: float, unit: str, hover: bool) -> str:
    timeline, idles = panel.timeline, panel.lane == "worker"
    lines = [f'<text x="{frame.left:g}" y="{frame.top - 6:g}" font-weight="bold">{escape(panel.title)}</text>']
    if idles:
        lines.append(f'<text x="{width - 4:g}" y="{frame.top - 6:g}" text-anchor="end" fill="#666">idle</text>')
    every = 1 if frame.lane >= 12 else 4
    for worker, idle in enumerate(timeline.idle_share):
        y = frame.top + worker * frame.lane
        lines.append(f'<rect x="{frame.left:g}" y="{y + 1:g}" width="{frame.width:g}" height="{frame.lane - 2:g}" '
                     'fill="#f3f4f6"/>')
        if worker % every == 0:
            middle = y + frame.lane / 2 + 4
            lines.append(f'<text x="{frame.left - 8:g}" y="{middle:g}" text-anchor="end">{panel.lane} {worker}</text>')
            if idles:
                lines.append(
                    f'<text x="{width - 4:g}" y="{middle:g}" text-anchor="end" fill="#666">{format_share(idle)}</text>'
                )
    return "".join(lines) + _blocks(timeline, frame, hover) + _axis(panel, frame, unit)


def _axis(panel: Panel, frame: _Frame, unit: str) -> str:
    timeline, bottom = panel.timeline, frame.top + panel.timeline.num_workers * frame.lane
    step = _nice(frame.seconds / 10)
    digits = max(0, -int(np.floor(np.log10(step) + 1e-9)))
    parts = ['<g class="ticks">']
    for tick in np.arange(0, frame.seconds * (1 + 1e-9), step):
        x = frame.left + tick / frame.seconds * frame.width
        parts.append(f'<path d="M{x:.2f} {bottom:g}v4" stroke="#999"/>'
                     f'<text x="{x:.2f}" y="{bottom + 15:g}" text-anchor="middle" fill="#555">{tick:.{digits}f}</text>')
    parts.append("</g>")
    end = frame.left + timeline.makespan / frame.seconds * frame.width
    parts.append(f'<path d="M{frame.left:g} {bottom:g}h{frame.width:g}" stroke="#999"/>'
                 f'<path class="end" d="M{end:.2f} {frame.top - 3:g}V{bottom:g}" stroke="#c0392b" '
                 'stroke-dasharray="3 2"/>'
                 + _length(panel.title, f"{timeline.makespan:.4g} {unit}".rstrip(), end, frame) +
                 f'<text x="{frame.left + frame.width + 8:g}" y="{bottom + 15:g}" fill="#555">{escape(unit)}</text>')
    return "".join(parts)


def _length(title: str, text: str, end: float, frame: _Frame) -> str:
    """How long it takes: left of its line where the title leaves room, else right of both."""
    taken = frame.left + 6.6 * len(title) + 10
    fits = end - 4 - 6.2 * len(text) >= taken
    x, anchor = (end - 4, "end") if fits else (max(end + 4, taken), "start")
    return f'<text x="{x:.2f}" y="{frame.top - 6:g}" text-anchor="{anchor}" fill="#c0392b">{escape(text)}</text>'


def _nice(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least ``least``."""
    power = 10.0 ** np.floor(np.log10(least))
    return float(next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9)))


def shades(timeline: Timeline) -> np.ndarray:
    """0, 1, 2 ... for the first, second, third stage of its worker, per entry."""
    rank = np.zeros(len(timeline.stage), int)
    for worker in range(timeline.num_workers):
        mine = (timeline.worker == worker) & timeline.computes & (timeline.stage >= 0)
        rank[mine] = np.searchsorted(np.unique(timeline.stage[mine]), timeline.stage[mine])
    return rank


def _shade(colour: str, rank: int, ranks: int) -> str:
    """``colour``, towards white for later stages of a worker."""
    part = 0.0 if ranks < 2 else 0.45 * rank / (ranks - 1)
    return "#" + "".join(f"{round(value * (1 - part) + 255 * part):02x}" for value in _rgb(colour))


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i:i + 2], 16) for i in (1, 3, 5))


def _ink(fill: str) -> str:
    """The colour of text on ``fill``: white where it is dark."""
    red, green, blue = _rgb(fill)
    return "#222" if 0.3 * red + 0.59 * green + 0.11 * blue > 145 else "#fff"


def _blocks(timeline: Timeline, frame: _Frame, hover: bool) -> str:
    keep = np.flatnonzero(timeline.computes & (timeline.end > timeline.start))
    low, high = frame.x(timeline.start[keep]), frame.x(timeline.end[keep])
    if len(keep) > _MANY:
        low, high = np.floor(low * 2) / 2, np.floor(low * 2) / 2 + np.maximum(np.round((high - low) * 2), 1) / 2
        _, chosen = np.unique(timeline.worker[keep] * 1e9 + low * 20 + timeline.op[keep], return_index=True)
        keep, low, high = keep[chosen], low[chosen], high[chosen]
    rank = shades(timeline)[keep]
    ranks = int(rank.max(initial=0)) + 1
    top = frame.top + timeline.worker[keep] * frame.lane + 2
    draw = _rectangles if hover and len(keep) <= _HOVER else _paths
    fills = [_shade(COLOURS[OPS[op]], int(r), ranks) for op, r in zip(timeline.op[keep], rank)]
    # A window onto the blocks: a page zooms by what part of them it shows.
    box = f"{frame.left:g} {frame.top:g} {frame.width:g} {timeline.num_workers * frame.lane:g}"
    x, y, width, height = box.split()
    return (f'<svg class="blocks" x="{x}" y="{y}" width="{width}" height="{height}" viewBox="{box}" '
            f'preserveAspectRatio="none" data-seconds="{frame.seconds:.9g}">'
            f"{draw(timeline, keep, low, high, top, frame.lane - 4, fills)}</svg>"
            + _numbers(timeline, keep, low, high, top, frame, fills))


def _rectangles(timeline: Timeline, keep: np.ndarray, low: np.ndarray, high: np.ndarray, top: np.ndarray,
                height: float, fills: Sequence[str]) -> str:
    """One rectangle per action, with a hint on hovering."""
    gap = 0.6
    parts = []
    for i, x, end, y, fill in zip(keep.tolist(), low, high, top, fills):
        hint = (f"{OPS[timeline.op[i]]}{timeline.microbatch[i]} of stage {timeline.stage[i]}: "
                f"{timeline.start[i]:.6g} to {timeline.end[i]:.6g}")
        parts.append(f'<rect x="{x:.2f}" y="{y:g}" width="{max(end - x - gap, 0.4):.2f}" height="{height:g}" '
                     f'fill="{fill}"{DARK_INK if _ink(fill) == "#222" else ""}><title>{hint}</title></rect>')
    return "".join(parts)


def _paths(timeline: Timeline, keep: np.ndarray, low: np.ndarray, high: np.ndarray, top: np.ndarray, height: float,
           fills: Sequence[str]) -> str:
    """One path per colour: small files for many actions."""
    paths: dict[str, list[str]] = {}
    for x, end, y, fill in zip(low, high, top, fills):
        wide = end - x
        wide -= 0.6 if wide > 3 else 0.15 * wide
        paths.setdefault(fill, []).append(f"M{x:.2f} {y:g}h{wide:.2f}v{height:g}h-{wide:.2f}z")
    return "".join(f'<path fill="{fill}" d="{"".join(d)}"/>' for fill, d in paths.items())


def _numbers(timeline: Timeline, keep: np.ndarray, low: np.ndarray, high: np.ndarray, top: np.ndarray, frame: _Frame,
             fills: Sequence[str]) -> str:
    """Micro-batch numbers in the blocks that have room for them."""
    if frame.lane < 12:
        return '<g class="numbers"></g>'
    size = min(10.0, frame.lane * 0.5)
    parts = []
    for i, x, end, y, fill in zip(keep.tolist(), low, high, top, fills):
        text = str(timeline.microbatch[i]) if timeline.microbatch[i] >= 0 else OPS[timeline.op[i]]
        if end - x >= size * 0.6 * len(text) + 2:
            parts.append(f'<text x="{(x + end - 0.6) / 2:.2f}" y="{y + frame.lane / 2 + 1.5:.2f}" fill="{_ink(fill)}">'
                         f'{text}</text>')
    return f'<g class="numbers" font-size="{size:g}" text-anchor="middle" pointer-events="none">{"".join(parts)}</g>'
