"""Where the values of a run go, on the worker that tells: the file, the trackers, the progress line."""
from __future__ import annotations

import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeengine.tracking import MetricsFile, Progress, Teller, Tracker, TrackerSetting, make_tracker, name_of

PATIENCE = 20.0             # seconds for which a tracker may be silent at the end
_REMEMBERED = 1000          # steps of which values may still arrive from other workers


class Recorder:
    """Takes values of steps from any thread and hands them on; each name of a step once, the first that comes.

    The file has them when ``record`` returns; trackers are told on their own threads. ``close`` may be called again.
    """

    def __init__(self, metrics: Path, trackers: Sequence[object], setting: TrackerSetting):
        names = [name_of(given) for given in trackers]
        self._lock = threading.Lock()
        self._file = MetricsFile(metrics)
        self._told_before = self._file.go_on(setting.first_step)
        self._told: OrderedDict[int, set[str]] = OrderedDict()
        self._progress: Progress | None = None
        self._closed = False
        self._tellers = [Teller(name, partial(make_tracker, given, setting), say=self.say)
                         for name, given in zip(names, trackers)]
        self._measurer = Teller("of the pipeline's own values", lambda: None, say=self.say)

    def configure(self, values: Mapping[str, Any]) -> None:
        """Tell the trackers the run's parameters."""
        self._tell("store the configuration", lambda tracker: tracker.store_init_configuration(dict(values)))

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """Values of one step."""
        with self._lock:
            if self._closed:
                return
            told = self._told.setdefault(step, set())
            new = {name: value for name, value in values.items() if name not in told}
            if not new:
                return
            told.update(new)
            while len(self._told) > _REMEMBERED:
                self._told.popitem(last=False)
            self._file.write({"step": step, "time": round(time.time(), 3), **new})
        before = self._told_before.get(step, set())
        self._tell("log a step", partial(_log, new, step, before))

    def show(self, step: int, loss: float | None, rate: tuple[float, str] | None) -> None:
        """Show how far the run is."""
        if self._progress is not None:
            self._progress.show(step, loss, rate)

    def begin_progress(self, progress: Progress) -> None:
        """Show progress from now on."""
        self._progress = progress

    def add_artifacts(self, paths: Sequence[Path]) -> None:
        """Give files to the trackers that take files."""
        for path in paths:
            self._tell(f"take {path.name}", partial(_add_artifact, path))

    def measure(self, what: Callable[[], None]) -> None:
        """Run something on a thread that nobody waits for."""
        self._measurer.tell("measure", lambda _: what())

    def close(self) -> None:
        """Tell what is left, finish the trackers, close the file."""
        self._measurer.close(PATIENCE)
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._file.close()
        self.end_progress()
        self._tell("finish", lambda tracker: tracker.finish() if hasattr(tracker, "finish") else None)
        for teller in self._tellers:
            teller.close(PATIENCE)

    def end_progress(self) -> None:
        """Leave the progress line standing."""
        if self._progress is not None:
            self._progress.close()

    def _tell(self, what: str, do: Callable[[Tracker], object]) -> None:
        for teller in self._tellers:
            teller.tell(what, do)

    def say(self, line: str) -> None:
        """Tell people, above the progress line where there is one."""
        if self._progress is not None:
            self._progress.interrupt(line)
        else:
            print(line, file=sys.stderr, flush=True)


def _log(values: Mapping[str, Any], step: int, told_before: set[str], tracker: Tracker) -> None:
    """What an earlier start has told of this step is told again only where it replaces the first."""
    again = bool(getattr(tracker, "replaces_steps", False))
    values = {name: value for name, value in values.items() if again or name not in told_before}
    if values:
        tracker.log(values, step=step)


def _add_artifact(path: Path, tracker: Tracker) -> None:
    take = getattr(tracker, "log_artifact", None)
    if callable(take) and path.exists():
        take(path)
