"""A run in progress, for a terminal."""
from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from partitioners.tables import format_table
from partitioners.units import format_number, format_share
from pipeengine.errors import InputError
from pipeengine.report.curves import spark
from pipeengine.report.history import OWN, History
from pipeengine.tracking import duration


def progress_text(history: History, now: float) -> str:
    """Which step of how many, the loss and the step's time with their curves, when the last step ended.

    ``now`` is in seconds since 1970.
    """
    if history.last_step is None or history.last_time is None:
        return "no step yet"
    done, total = history.last_step + 1, history.total
    seconds = history.last(f"{OWN}step_seconds")
    lines = [f"step {done:,}" + (f" of {total:,}" if total else "")]
    if total and done >= total:
        lines[0] += ", done"
    elif total and seconds:
        lines[0] += f", {duration((total - done) * seconds)} left"
    own = [name for name in history.curves if not name.startswith(OWN)]
    rows = [(name, f"{history.last(name):.6g}", name) for name in sorted(own, key=lambda name: (name != "loss", name))]
    if seconds:
        rows.append(("s per step", format_number(seconds), f"{OWN}step_seconds"))
    rows += [(f"{unit}/s", f"{history.last(f'{OWN}{unit}_per_second'):,.0f}", f"{OWN}{unit}_per_second")
             for unit in ("tokens", "rows") if f"{OWN}{unit}_per_second" in history.curves]
    idle = history.group(f"{OWN}idle_share/")
    rows += [(f"idle, {label.replace('_', ' ')}", format_share(points[-1][1]), f"{OWN}idle_share/{label}")
             for label, points in idle.items()][:8]
    if rows:
        lines.append(format_table((), [(name, value, spark(history.curves[key])) for name, value, key in rows],
                                  left=(0, 2), indent="  "))
    lines.append(f"last step {duration(now - history.last_time)} ago")
    return "\n".join(lines)


def watch(folder: Path, show: Callable[[str], None], *, seconds: float = 2.0, clock: Callable[[], float] = time.time,
          sleep: Callable[[float], None] = time.sleep) -> None:
    """Show a run's progress every ``seconds`` until all its steps are done.

    Raises ``InputError`` where the folder is of no run.
    """
    if not (folder / "run.json").exists():
        raise InputError(f"{folder} has no run.json; give the folder of a pe.Run")
    while True:
        history = History.of(folder)
        show(progress_text(history, clock()))
        if history.total and history.last_step is not None and history.last_step + 1 >= history.total:
            return
        sleep(seconds)
