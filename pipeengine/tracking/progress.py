"""How far a run is, on one line of a terminal or as plain lines elsewhere."""
from __future__ import annotations

import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

_BAR = 20


class Progress:
    """Shows steps of a run up to ``total`` on ``stream``: the loss, a rate, the time left.

    On a terminal one line that is written over, at most ten times a second; elsewhere a line for the first step, every
    ``seconds`` and the last. ``clock`` gives seconds. Time left follows the last 50 steps, and is at most what is left
    of ``limit``, in seconds from now on.
    """

    def __init__(self, first: int, total: int, *, stream: TextIO | None = None, seconds: float = 10.0,
                 limit: float | None = None, clock: Callable[[], float] = time.perf_counter):
        self._stream, self._clock = stream or sys.stderr, clock
        self._terminal = bool(getattr(self._stream, "isatty", lambda: False)())
        self._every = 0.1 if self._terminal else seconds
        self._first, self._total, self._told = first, total, -float("inf")
        self._ends = deque([clock()], maxlen=51)
        self._deadline = float("inf") if limit is None else clock() + limit
        self._width = 0

    def show(self, step: int, loss: float | None = None, rate: tuple[float, str] | None = None) -> None:
        """``step`` has ended; ``rate`` is a number per second and of what."""
        now = self._clock()
        self._ends.append(now)
        if now - self._told < self._every and step != self._total - 1:
            return
        self._told = now
        line = self.line(step, loss, rate)
        if self._terminal:
            line = line[:shutil.get_terminal_size().columns - 1]
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def line(self, step: int, loss: float | None, rate: tuple[float, str] | None) -> str:
        """The line that tells of ``step``."""
        done = step + 1
        per_step = (self._ends[-1] - self._ends[0]) / max(1, len(self._ends) - 1)
        parts = [f"step {done:,} of {self._total:,}"]
        if self._terminal:
            full = _BAR * done // self._total
            parts.insert(0, f"[{'#' * full}{'.' * (_BAR - full)}]")
        if loss is not None:
            parts.append(f"loss {loss:.4f}")
        if rate is not None:
            parts.append(f"{rate[0]:,.0f} {rate[1]}/s")
        left = min(per_step * (self._total - done), self._deadline - self._ends[-1])
        parts.append(f"{duration(left)} left" if done < self._total else "done")
        return "   ".join(parts)

    def interrupt(self, line: str) -> None:
        """Write a line of its own, above the progress."""
        if self._terminal and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._width = 0
        self._stream.write(line + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Leave the last line standing."""
        if self._terminal and self._width:
            self._stream.write("\n")
            self._stream.flush()
        self._width = 0


def duration(seconds: float) -> str:
    """Seconds as people say them: "45 s", "3 min 20 s", "5 h 10 min", "2 d 3 h"."""
    whole = max(0, round(seconds))
    for unit, size, below, small in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // small
            return f"{whole // size} {unit}" + (f" {rest} {below}" if rest else "")
    return f"{whole} s"
