"""What this worker is doing, in a few bytes that its guard reads: cheap enough to write at every action."""
from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from pipeengine.distributed.guard_watch import (
    CALLS,
    CALLS_AT,
    LEAVING_AT,
    LONG_AT,
    MARK,
    RECORD_BYTES,
    SECTION_AT,
    WAITING_AT,
)

OPERATIONS = {"F": 1, "B": 2, "I": 3, "W": 4, "SA": 5, "RA": 6, "SG": 7, "RG": 8, "R": 9}


class Unwatched:
    """Nobody looks: one process, which has no guard. ``call`` is the call of the pipeline that this worker is in."""

    call = ""

    def at(self, operation: str, stage: int, microbatch: int) -> None:
        """An action of a step begins."""

    @contextmanager
    def section(self, name: str, step: int = 0, *, takes_long: bool = False) -> Iterator[None]:
        """Inside, this worker does ``name``."""
        yield


class Activity(Unwatched):
    """The call of the pipeline that this worker is in, and its place inside; one for all pipelines of a process.

    ``file`` holds the memory that the guards read.
    """

    def __init__(self) -> None:
        self.file = os.memfd_create("pipeengine")
        os.ftruncate(self.file, RECORD_BYTES)
        self._memory = mmap.mmap(self.file, RECORD_BYTES)
        weakref.finalize(self, os.close, self.file)
        self._progress, self.step, self.call = 0, 0, ""
        self._calls: dict[str, int] = {}

    def at(self, operation: str, stage: int, microbatch: int) -> None:
        """An action of a step begins."""
        self._progress += 1
        MARK.pack_into(self._memory, 0, self._progress, self.step, microbatch, OPERATIONS[operation], stage)

    @contextmanager
    def section(self, name: str, step: int = 0, *, takes_long: bool = False) -> Iterator[None]:
        """Inside, this worker is in the call ``name``. ``takes_long``: no limit is learnt."""
        outer = self.call, self._memory[LONG_AT]
        self.step = step
        self._enter(name, takes_long)
        try:
            yield
        finally:
            self._calls[name] = self._calls.get(name, 0) + 1
            self._calls[""] = self._calls.get("", 0) + 1
            self._enter(outer[0], bool(outer[1]))

    def _enter(self, name: str, takes_long: bool) -> None:
        self.call = name
        self._progress += 1
        text = (f"{name} {self.step}" if name == "step" else name).encode()[:RECORD_BYTES - SECTION_AT - 1]
        self._memory[SECTION_AT:RECORD_BYTES] = text + bytes(RECORD_BYTES - SECTION_AT - len(text))
        self._memory[LONG_AT] = takes_long
        CALLS.pack_into(self._memory, CALLS_AT, self._calls.get(name, 0))
        MARK.pack_into(self._memory, 0, self._progress, self.step, 0, 0, 0)

    def wait(self, waits: bool) -> None:
        """Whether this worker waits for others from now on."""
        self._memory[WAITING_AT] = waits

    def leave(self) -> None:
        """The script ends."""
        self._memory[LEAVING_AT] = 1
