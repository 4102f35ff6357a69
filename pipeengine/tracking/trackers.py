"""Experiment trackers behind the five names of ``accelerate.tracking.GeneralTracker``, whose classes pass unchanged."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeengine.errors import InputError
from pipeengine.tracking import backends


class Tracker(Protocol):
    """What a tracker has: ``name``, ``requires_logging_directory``, ``tracker`` and these methods.

    Besides, where it has them: ``log_artifact(path)``, and ``replaces_steps`` (True: after a restart it is told again
    what an earlier start had told of the steps trained again; otherwise it is not).
    """

    name: str
    requires_logging_directory: bool

    def start(self) -> None:
        """Begin, or go on with, the experiment."""

    def store_init_configuration(self, values: dict) -> None:
        """The run's parameters."""

    def log(self, values: dict, step: int | None, **kwargs: Any) -> None:
        """Values of one step."""

    def finish(self) -> None:
        """The end of the run."""


@dataclass(frozen=True)
class TrackerSetting:
    """Which run a tracker is of: ``name`` for people, ``id`` (32 hexadecimal digits) for all its restarts, ``folder``
    for what the tracker writes, ``first_step`` that is told of."""
    name: str
    id: str
    folder: Path
    first_step: int = 0


TRACKERS: Mapping[str, Callable[[str, str, Path, int], Any]] = {
    "tensorboard": backends.TensorBoard, "comet_ml": backends.Comet, "mlflow": backends.MLflow, "wandb": backends.WandB}
_ALSO = {"comet": "comet_ml"}


def make_tracker(choice: object, setting: TrackerSetting) -> Tracker:
    """A started tracker from a name, a class that takes a run's name (and a folder where it
    ``requires_logging_directory``), or an object that is one.

    Raises ``InputError`` for anything else, and whatever the tracker raises: ``ImportError`` where it is not installed.
    """
    if isinstance(choice, str):
        tracker = TRACKERS[name_of(choice)](setting.name, setting.id, setting.folder, setting.first_step)
    elif isinstance(choice, type):
        needs_folder = getattr(choice, "requires_logging_directory", False)
        tracker = choice(setting.name, logging_dir=str(setting.folder)) if needs_folder else choice(setting.name)
    else:
        tracker = choice
    if callable(getattr(tracker, "start", None)):       # releases of accelerate before 1.8 start when they are made
        tracker.start()
    return tracker


def name_of(choice: object) -> str:
    """What a tracker is called. Raises ``InputError`` for a name that is not known and for what is no tracker."""
    if isinstance(choice, str):
        name = _ALSO.get(choice, choice)
        if name not in TRACKERS:
            raise InputError(f"there is no tracker {choice!r}; give one of {', '.join(TRACKERS)}, or an object with "
                             "store_init_configuration, log and finish")
        return name
    lacking = [name for name in ("store_init_configuration", "log") if not callable(getattr(choice, name, None))]
    if lacking:
        raise InputError(f"{choice!r} is no tracker: it has no {' and no '.join(lacking)}; give one of "
                         f"{', '.join(TRACKERS)}, or an object like accelerate's GeneralTracker")
    own = getattr(choice, "name", None)
    return own if isinstance(own, str) else getattr(choice, "__name__", type(choice).__name__)
