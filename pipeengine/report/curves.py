"""Curves over steps, as small pictures for a page and as signs for a terminal."""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from partitioners.units import format_bytes, format_number
from pipeengine.report.history import OWN, History, Points

_COLOURS = ("#3f72b0", "#c25a2b", "#3f8f5f", "#8767a8", "#b08a1e", "#b0416e", "#2f8f9d", "#767d87")
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 420.0, 190.0, 62.0, 12.0, 34.0
_LEVELS = "▁▂▃▄▅▆▇█"
_Text = Callable[[float], str]


def charts(history: History) -> list[tuple[str, str]]:
    """(title, SVG for use inside HTML) of what a run tells, the user's values first."""
    own = {name: points for name, points in history.curves.items() if not name.startswith(OWN)}
    drawn: list[tuple[str, dict[str, Points], _Text]] = [
        (name, {"": own[name]}, _plain) for name in sorted(own, key=lambda name: (name != "loss", name))]
    shares: tuple[tuple[str, str, _Text], ...] = (
        ("idle share, %", "idle_share", lambda share: f"{100 * share:.0f}"),
        ("peak memory", "peak_bytes", format_bytes), ("peak memory of the process", "process_peak_bytes", format_bytes),
        ("busy per step, s", "seconds", format_number), ("sent per step", "sent_bytes", format_bytes))
    times = {label: _settled(history.curves[OWN + name]) for name, label in (
        ("step_seconds", "step"), ("actions_seconds", "its actions"), ("predicted_seconds", "predicted"))
        if OWN + name in history.curves}
    drawn += [("step time, s", times, format_number)]
    for unit in ("tokens", "rows"):
        drawn += [(f"{unit} per second", {"": history.curves.get(f"{OWN}{unit}_per_second", ())}, _plain)]
    for title, name, text in shares:
        lines = {label.replace("_", " "): points for label, points in history.group(f"{OWN}{name}/").items()}
        drawn += [(title, lines, text)]
    return [(title, _chart(lines, text)) for title, lines, text in drawn if any(lines.values())]


def spark(points: Points, width: int = 40) -> str:
    """A curve as ``width`` signs of eight heights."""
    values = [value for _, value in points if math.isfinite(value)]
    if not values:
        return ""
    size = max(1, -(-len(values) // width))
    means = [sum(part) / len(part) for part in (values[i:i + size] for i in range(0, len(values), size))]
    low, high = min(means), max(means)
    return "".join(_LEVELS[min(7, int(8 * (value - low) / (high - low)))] if high > low else _LEVELS[0]
                   for value in means)


def _settled(points: Points) -> Points:
    """Without the first step, which records and compiles, where others follow."""
    return points[1:] if len(points) > 10 else points


def _plain(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _chart(lines: Mapping[str, Points], text: _Text) -> str:
    finite = {label: [(s, v) for s, v in points if math.isfinite(v)] for label, points in lines.items()}
    everything = [point for points in finite.values() for point in points]
    if not everything:
        return "<p class=quiet>no finite value</p>"
    ticks = nice_ticks(min(v for _, v in everything), max(v for _, v in everything))
    low, high = ticks[0], ticks[-1]
    first, last = min(s for s, _ in everything), max(s for s, _ in everything)

    def x(step: float) -> float:
        return _LEFT + (step - first) / max(1, last - first) * (_WIDTH - _LEFT - 12)

    def y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
    parts = [f'<path class=grid d="M{_LEFT:g} {y(tick):.1f}H{_WIDTH - 12:g}"/><text x="{_LEFT - 6:g}" '
             f'y="{y(tick) + 4:.1f}" text-anchor=end>{escape(text(tick))}</text>' for tick in ticks]
    bottom = _HEIGHT - _BOTTOM + 15
    parts += [f'<text x="{x(first):.1f}" y="{bottom:g}">{first:,}</text>' if last > first else "",
              f'<text x="{x(last):.1f}" y="{bottom:g}" text-anchor="{"end" if last > first else "start"}">step {last:,}'
              "</text>"]
    many = len(finite) > len(_COLOURS)
    for number, (label, points) in enumerate(finite.items()):
        colour = _COLOURS[0 if many else number]
        parts.append(_line([(x(s), y(v)) for s, v in points], colour, 0.8 if many else 1.6, label))
    return (f'<svg class=chart viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role=img>{"".join(parts)}</svg>'
            + _legend(list(finite), many))


def _line(points: Sequence[tuple[float, float]], colour: str, width: float, label: str) -> str:
    if not points:
        return ""
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dot = f'<circle cx="{points[-1][0]:.1f}" cy="{points[-1][1]:.1f}" r="{1.5 * width:g}" fill="{colour}"/>'
    return (f'<path d="{path}" fill=none stroke="{colour}" stroke-width="{width:g}" stroke-linejoin=round>'
            f"<title>{escape(label)}</title></path>{dot}")


def _legend(labels: Sequence[str], many: bool) -> str:
    if labels == [""]:
        return ""
    if many:
        return f"<p class=key><i style='background:{_COLOURS[0]}'></i>{len(labels)} lines, one each</p>"
    return "<p class=key>" + "".join(f"<span><i style='background:{colour}'></i>{escape(label)}</span>"
                                     for colour, label in zip(_COLOURS, labels)) + "</p>"


def nice_ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers from at most ``low`` to at least ``high``."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = (low - pad, high + pad) if low else (0.0, pad)
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]
