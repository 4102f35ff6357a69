"""``metrics.jsonl``: one JSON object per line, whole whatever kills the process."""
from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

from pipeengine.errors import InputError

Value = int | float | str | bool
Record = dict[str, Value]


class MetricsFile:
    """Appends records to ``path``; each is with the operating system when ``write`` returns.

    ``go_on(first_step)`` comes first: a torn last line goes, and so do records of ``first_step`` and later, which are
    about to be trained again; what went is returned as the names told per step. A step thus stands there once.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file: IO[str] | None = None

    def go_on(self, first_step: int) -> dict[int, set[str]]:
        """Open the file for steps from ``first_step`` on."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        records = read_metrics(self.path)
        kept = [record for record in records if _step_of(record) < first_step]
        gone: dict[int, set[str]] = {}
        for record in records:
            if _step_of(record) >= first_step:
                gone.setdefault(_step_of(record), set()).update(record)
        beside = self.path.with_name(self.path.name + ".tmp")
        with open(beside, "w", encoding="utf-8") as file:
            file.writelines(_line(record) for record in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.path)
        self._file = open(self.path, "a", encoding="utf-8")
        return gone

    def write(self, record: Mapping[str, Value]) -> None:
        """Append one record; it has a "step"."""
        assert self._file is not None, "go_on comes first"
        self._file.write(_line(record))
        self._file.flush()

    def close(self) -> None:
        """Close the file; nothing is lost without it."""
        if self._file is not None:
            self._file.close()
        self._file = None


def read_metrics(path: str | Path) -> list[Record]:
    """The whole records of a file, in its order; none where there is no file. What cannot be read is left out."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    records = []
    for line in lines[:-1]:             # what stands after the last newline was torn
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append({name: _back(value) for name, value in record.items()})
    return records


def series(records: Iterable[Mapping[str, Value]], name: str) -> tuple[tuple[int, float], ...]:
    """(step, value) of one name, by step; the last record of a step counts, values that are no numbers do not."""
    points = {}
    for record in records:
        value = record.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            points[_step_of(record)] = float(value)
    return tuple(sorted(points.items()))


def plain_values(values: Mapping[str, object]) -> Record:
    """Numbers and texts as they are, arrays and tensors of one element as numbers.

    Raises ``InputError`` that names a value of another kind.
    """
    plain: Record = {}
    for name, value in values.items():
        item = getattr(value, "item", None)
        single = item() if callable(item) and _count(value) == 1 else value
        if not isinstance(single, (int, float, str, bool)):
            raise InputError(f"{name} is a {type(value).__name__}{_elements(value)}; log a number, a text, or a tensor "
                             "of one element")
        plain[name] = single
    return plain


def _count(value: object) -> int | None:
    """How many elements a tensor or an array has; None for anything else."""
    numel, size = getattr(value, "numel", None), getattr(value, "size", None)
    return int(numel()) if callable(numel) else size if isinstance(size, int) else None


def _elements(value: object) -> str:
    return "" if _count(value) is None else f" of {_count(value)} elements"


def _step_of(record: Mapping[str, Value]) -> int:
    return int(record["step"])


def _line(record: Mapping[str, Value]) -> str:
    return json.dumps({name: _forth(value) for name, value in record.items()}) + "\n"


_ODD = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _forth(value: Value) -> Value:
    """JSON has no word for what is not finite: such numbers are texts in the file."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _back(value: Value) -> Value:
    return _ODD.get(value, value) if isinstance(value, str) else value
