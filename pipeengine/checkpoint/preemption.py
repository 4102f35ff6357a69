"""Signals that ask for a checkpoint: SIGTERM before the machine is taken away, SIGUSR1 at any time."""
from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from pipeengine.distributed import Wishes

STOP, AGAIN, DUE = 1, 2, 4
"""What workers ask each other for: save and stop, save and go on, save because it is time."""

_BITS = {signal.SIGTERM: STOP, signal.SIGUSR1: AGAIN}


class SignalWatch:
    """Turns signals into wishes, once it watches; a second SIGTERM ends the process as it would have without."""

    def __init__(self, wishes: Wishes):
        self._wishes, self._process = wishes, os.getpid()
        self._watching = False

    def watch(self) -> None:
        """Take the signals over that still have their default; in other threads than the main one, none."""
        if self._watching or threading.current_thread() is not threading.main_thread():
            return
        self._watching = True
        for number in _BITS:
            now = signal.getsignal(number)
            # Of several pipelines in a process (a notebook's cell that ran again) the last that saves has the signals.
            if now == signal.SIG_DFL or isinstance(getattr(now, "__self__", None), SignalWatch):
                signal.signal(number, self._heard)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGTERM and self._wishes.own() & STOP
        if again or os.getpid() != self._process:       # a forked process (of a loader) has no checkpoint to save
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._wishes.ask(_BITS[signal.Signals(number)])

    def release(self) -> None:
        """Give the signals their default back."""
        if self._watching and threading.current_thread() is threading.main_thread():
            for number in _BITS:
                if signal.getsignal(number) == self._heard:
                    signal.signal(number, signal.SIG_DFL)
        self._watching = False
