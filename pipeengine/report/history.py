"""What a run's folder tells of its steps: curves, starts and options."""
from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pipeengine.tracking import read_metrics, series

_POINTS = 400
OWN = "pipeline/"
Points = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class History:
    """A run over its steps.

    ``curves`` are (step, value) by name, thinned to 400 points of mean values; the pipeline's own names begin with
    "pipeline/". ``last_step`` and ``last_time`` (seconds since 1970) are None before the first step; ``starts`` have
    "time", "step", "hosts", "python" and "versions"; ``total`` is the number of steps that the run is to have.
    """
    last_step: int | None = None
    last_time: float | None = None
    total: int | None = None
    starts: tuple[Mapping, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)
    curves: Mapping[str, Points] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: str | Path) -> History:
        """The history in a run's folder, empty where there is none; what is damaged is left out."""
        folder = Path(folder)
        records, run = read_metrics(folder / "metrics.jsonl"), _read(folder / "run.json")
        names = dict.fromkeys(name for record in records for name in record if name not in ("step", "time"))
        last = max(records, key=lambda record: record["step"], default=None)
        curves = {name: thinned(points) for name in names if (points := series(records, name))}
        total = run.get("total")
        return cls(None if last is None else int(last["step"]), None if last is None else float(last.get("time", 0.0)),
                   total if isinstance(total, int) else None,
                   tuple(start for start in run.get("starts", ()) if isinstance(start, dict)),
                   _read(folder / "options.json"), curves)

    @classmethod
    def from_dict(cls, data: Mapping) -> History:
        """What ``to_dict`` made."""
        curves = {name: tuple((int(step), float(value)) for step, value in points)
                  for name, points in data.get("curves", {}).items()}
        return cls(**{**data, "starts": tuple(data.get("starts", ())), "curves": curves})

    def to_dict(self) -> dict[str, object]:
        """JSON types only."""
        return asdict(self)

    def __repr__(self) -> str:
        return f"<History of {len(self.curves)} curves to step {self.last_step} of {self.total}>"

    def last(self, name: str) -> float | None:
        """The last value of a curve."""
        points = self.curves.get(name)
        return points[-1][1] if points else None

    def group(self, prefix: str) -> dict[str, Points]:
        """Curves whose names begin so, by the rest of the name, in the order of numbers in it."""
        chosen = {name.removeprefix(prefix): points for name, points in self.curves.items() if name.startswith(prefix)}
        return dict(sorted(chosen.items(), key=lambda item: (len(item[0]), item[0])))


def thinned(points: Iterable[tuple[int, float]], most: int = _POINTS) -> Points:
    """At most ``most`` points: means of neighbours, each at the last of their steps."""
    points = tuple(points)
    size = -(-len(points) // most)
    if size <= 1:
        return points
    parts = [points[first:first + size] for first in range(0, len(points), size)]
    return tuple((part[-1][0], sum(value for _, value in part) / len(part)) for part in parts)


def _read(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
