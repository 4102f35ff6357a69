"""What a finished run tells: per stage where time and memory went, predicted against measured.

A ``RunReport`` is plain data in a JSON file, so that it can be printed and drawn without torch.
"""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from partitioners.notebook import html_of
from pipeengine.errors import InputError, ScheduleError
from pipeengine.report.history import History
from pipeengine.simulation import Timeline


@dataclass(frozen=True)
class StageRow:
    """One stage of a run, per step. What is unknown is None and left out of the table.

    ``activation_bytes`` are kept for one micro-batch from its F to its B or I, ``kept_bytes`` from its I to its W, by
    the plan. ``measured_bytes`` are what its actions were seen to add at the most, on top of weights and of what the
    optimizer keeps as the plan counts them.
    """
    stage: int
    worker: int
    modules: str = ""
    parameters: int | None = None
    predicted_seconds: float | None = None
    measured_seconds: float | None = None
    predicted_bytes: float | None = None
    measured_bytes: float | None = None
    sent_bytes: float | None = None
    sent_messages: int | None = None
    activation_bytes: float | None = None
    kept_bytes: float | None = None


@dataclass(frozen=True, eq=False)
class RunReport:
    """A run: its stages, the timeline that was predicted for a step and the one that was measured.

    Seconds of ``StageRow`` are those of a step; where a row has none, they are summed from the timelines. ``in_turns``:
    all stages ran in one process, one after the other, while workers and the predicted timeline are those of separate
    workers. ``history`` is of all steps, where the run keeps one; ``step`` is the number,
    from 0, of the one that was measured.
    """
    name: str
    schedule: str
    num_microbatches: int
    rows: tuple[StageRow, ...]
    predicted: Timeline | None = None
    measured: Timeline | None = None
    loss: float | None = None
    notes: tuple[str, ...] = ()
    in_turns: bool = False
    history: History | None = None
    step: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self._completed(row) for row in self.rows))

    def _completed(self, row: StageRow) -> StageRow:
        values = asdict(row)
        for name in ("predicted", "measured"):
            timeline = getattr(self, name)
            if values[f"{name}_seconds"] is None and timeline is not None:
                mine = timeline.computes & (timeline.stage == row.stage)
                values[f"{name}_seconds"] = float((timeline.end - timeline.start)[mine].sum())
        return StageRow(**values)

    def __repr__(self) -> str:
        return f"<RunReport of {self.name}: {len(self.rows)} stages, {self.num_microbatches} micro-batches>"

    def _repr_html_(self) -> str | None:
        return html_of(self)

    def to_json(self) -> str:
        """The report as JSON text."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain |= {"kind": "pipeengine run", "rows": [asdict(row) for row in self.rows], "notes": list(self.notes)}
        plain |= {name: plain[name] and plain[name].to_dict() for name in ("predicted", "measured")}
        plain["history"] = None if self.history is None else self.history.to_dict()
        return json.dumps(plain)

    @classmethod
    def from_json(cls, text: str) -> RunReport:
        """The report that ``to_json`` wrote. Raises ``InputError`` for any other text."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"this is no run report: not JSON at line {error.lineno}, column {error.colno}; "
                             "give a file that save() wrote") from error
        if not isinstance(data, Mapping) or data.pop("kind", None) != "pipeengine run":
            raise InputError("this is no run report: no \"kind\": \"pipeengine run\"; give a file that save() wrote")
        try:
            data["rows"] = tuple(StageRow(**row) for row in data["rows"])
            data["notes"] = tuple(data.get("notes", ()))
            for name in ("predicted", "measured"):
                data[name] = data.get(name) and Timeline.from_dict(data[name])
            data["history"] = data.get("history") and History.from_dict(data["history"])
            return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data})
        except (ScheduleError, KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            raise InputError(f"this run report is damaged: {type(error).__name__}: {error}; "
                             "give a file that save() wrote") from error

    def save(self, path: str | Path) -> None:
        """Write the JSON to ``path``; folders are made."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> RunReport:
        """What ``save`` wrote. Raises ``InputError`` that names the file where it is none or damaged."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (InputError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: {error}; run again, or give another file") from error
