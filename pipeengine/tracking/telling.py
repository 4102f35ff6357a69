"""Telling a tracker things without waiting for it: a thread of its own, a queue with an end."""
from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

_END = None


class _Call(NamedTuple):
    """One thing to do with a tracker."""
    what: str
    do: Callable[[Any], object]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Teller:
    """Tells one tracker, made by ``make()``, what it is given, in order, on a thread.

    ``tell`` never waits and never raises. Where the tracker cannot be made, or raises, or falls ``capacity`` calls
    behind, ``say`` is told once and the training goes on: after an error in ``make`` or ``start`` the tracker is given
    up, after another one it is told the next thing. ``close(patience)`` returns when all is told, or when the tracker
    has taken more than ``patience`` seconds over one call or three times as many over all that was left.
    """

    def __init__(self, name: str, make: Callable[[], object], *, capacity: int = 10_000,
                 say: Callable[[str], None] = _say):
        self.name, self._make, self._say = name, make, say
        self._calls: queue.Queue[_Call | None] = queue.Queue(capacity)
        self._moved = time.monotonic()
        self._lost, self._errors = 0, 0
        self._gave_up = threading.Event()
        # A daemon: the process ends though a tracker hangs.
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def tell(self, what: str, do: Callable[[Any], object]) -> None:
        """Have ``do(tracker)`` called some time; ``what`` names it where it fails."""
        if self._gave_up.is_set():
            return
        try:
            self._calls.put_nowait(_Call(what, do))
        except queue.Full:
            self._lost += 1
            if self._lost == 1:
                self._say(f"tracker {self.name} is {self._calls.maxsize:,} calls behind: it is told only part of what "
                          "follows; metrics.jsonl has everything")

    def close(self, patience: float = 20.0) -> bool:
        """Whether the tracker has been told everything it was to be told."""
        begin = self._moved = time.monotonic()
        ended = False
        while self._thread.is_alive() and not ended:
            try:
                self._calls.put(_END, timeout=0.1)
                ended = True
            except queue.Full:
                if time.monotonic() - self._moved > patience:
                    break
        while self._thread.is_alive() and time.monotonic() - self._moved <= patience \
                and time.monotonic() - begin <= 3 * patience:
            self._thread.join(0.05)
        if self._thread.is_alive():
            self._gave_up.set()
            self._say(f"tracker {self.name} is not done after {time.monotonic() - begin:.3g} s with "
                      f"{self._calls.qsize() - ended:,} calls left: left behind; metrics.jsonl has everything")
            return False
        return not self._lost and not self._errors

    def _run(self) -> None:
        try:
            tracker = self._make()
        except BaseException as error:
            self._fail("cannot be used", error, "; metrics.jsonl has everything")
            self._gave_up.set()
            self._drain()
            return
        while (call := self._calls.get()) is not _END and not self._gave_up.is_set():
            try:
                call.do(tracker)
            except BaseException as error:
                self._errors += 1
                if self._errors == 1:
                    self._fail(f"failed to {call.what}", error, "; said once, training goes on and metrics.jsonl has "
                               "everything")
            self._moved = time.monotonic()

    def _fail(self, what: str, error: BaseException, end: str) -> None:
        self._errors = max(self._errors, 1)
        self._say(f"tracker {self.name} {what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}{end}")

    def _drain(self) -> None:
        while not self._calls.empty():
            self._calls.get_nowait()
