"""Ctrl-C as a request: the step is finished and saved, then the program ends."""
from __future__ import annotations

import signal
import sys
import threading
import time
from types import FrameType

_TOGETHER = 5.0


class Interruption:
    """Turns SIGINT into SIGTERM, which ``Checkpoints`` answers with a save at the end of the step.

    torchrun passes a Ctrl-C on that its workers have had already: what comes within 5 s of the first is the same one.
    A later one is Python's own ``KeyboardInterrupt``. Only where SIGINT has Python's handler, in the main thread.
    ``says``: whether this worker tells people, which one does for all.
    """

    def __init__(self, says: bool = True) -> None:
        self.first: float | None = None
        self._says, self._watching = says, False

    def watch(self) -> None:
        """Take SIGINT over; to be called once ``Checkpoints`` watches SIGTERM."""
        if threading.current_thread() is threading.main_thread() \
                and signal.getsignal(signal.SIGINT) is signal.default_int_handler \
                and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            signal.signal(signal.SIGINT, self._heard)
            self._watching = True

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.first is None:
            self.first = time.monotonic()
            if self._says:
                print("\ninterrupted: this step is finished and saved; Ctrl-C once more ends at once", file=sys.stderr,
                      flush=True)
            signal.raise_signal(signal.SIGTERM)
        elif time.monotonic() - self.first > _TOGETHER:
            self.release()
            signal.default_int_handler(number, frame)

    def release(self) -> None:
        """Give SIGINT back."""
        if self._watching and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._watching = False
