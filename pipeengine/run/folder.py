"""The folder of a run: what lies where, and how it is begun."""
from __future__ import annotations

import json
import os
import platform
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeengine.errors import InputError

PLAN_PICTURE = "plan.svg"
_PACKAGES = ("pipeengine", "torch", "transformers", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run; worker 0 writes all but the checkpoints."""
    path: Path

    @property
    def run(self) -> Path:
        """The id, how many steps, and every start: when, from which step, with which versions and hosts."""
        return self.path / "run.json"

    @property
    def options(self) -> Path:
        """The user's config and the pipeline's options, of the last start."""
        return self.path / "options.json"

    @property
    def plan(self) -> Path:
        """The plan of the last start."""
        return self.path / "plan.json"

    @property
    def metrics(self) -> Path:
        """One line per step."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """What the run goes on from."""
        return self.path / "checkpoints"

    def id(self) -> str:
        """The id of the run that the folder is of; a new one, of 32 hexadecimal digits, where it is of none.

        Raises ``InputError`` where ``run.json`` is there and cannot be read.
        """
        try:
            return str(json.loads(self.run.read_text(encoding="utf-8"))["id"])
        except FileNotFoundError:
            return uuid.uuid4().hex
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.run} is damaged ({type(error).__name__}: {error}); remove it: the checkpoints "
                             "keep the run's id too") from error

    def begin(self, run_id: str, first_step: int, hosts: list[str]) -> None:
        """Add this start to ``run.json``."""
        self.path.mkdir(parents=True, exist_ok=True)
        known = _read(self.run)
        start = {"time": time.time(), "step": first_step, "hosts": hosts, "python": platform.python_version(),
                 "versions": _versions()}
        write_json(self.run, {"id": run_id, "total": known.get("total"),
                              "starts": [*_starts(known, run_id), start]})

    def set_total(self, total: int) -> None:
        """Note how many steps the run is to have."""
        write_json(self.run, {**_read(self.run), "total": total})


def write_json(path: Path, value: Mapping) -> None:
    """Write so that the file is never half; what JSON has no word for is written as text."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(beside, path)


def host_name() -> str:
    """This machine, for people."""
    return socket.gethostname()


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _read(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _starts(known: Mapping, run_id: str) -> list:
    starts = known.get("starts")
    return starts if known.get("id") == run_id and isinstance(starts, list) else []
