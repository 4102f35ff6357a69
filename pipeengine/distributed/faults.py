"""Faults on purpose, at an action of a step, to see that a run survives them or says what happened."""
from __future__ import annotations

import ctypes
import errno
import os
import random
import signal
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeengine.distributed.activity import Activity


def _hold(seconds: float) -> None:
    """One call into C that computes for about so long and lets no other thread of Python run."""
    count = 1_000_000
    start = time.perf_counter()
    sum(range(count))
    sum(range(int(count * seconds / (time.perf_counter() - start))))


def _deadlock(seconds: float) -> None:
    """One call into C that does nothing for so long and lets no other thread of Python run."""
    ctypes.PyDLL(None).sleep(int(seconds))


def _raise(seconds: float) -> None:
    raise RuntimeError("a fault on purpose")


def _fill(seconds: float) -> None:
    """From now on the disk is full for this process: what is written through ``os.write`` to a file fails."""
    write = os.write

    def full(file: int, data: Any) -> int:
        if stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data)
    os.write = full


FAULTS: dict[str, Callable[[float], None]] = {
    "kill": lambda seconds: os.kill(os.getpid(), signal.SIGKILL),
    "terminate": lambda seconds: os.kill(os.getpid(), signal.SIGTERM),
    "abort": lambda seconds: os.abort(),
    "stop": lambda seconds: os.kill(os.getpid(), signal.SIGSTOP),
    "exit": lambda seconds: os._exit(7),
    "raise": _raise,
    "sleep": time.sleep,
    "hold": _hold,
    "deadlock": _deadlock,
    "fill": _fill,
}


@dataclass(frozen=True)
class Fault:
    """What happens to ``worker`` before action number ``action`` (from 0) of step ``step``; ``seconds`` for sleep,
    hold and deadlock."""

    kind: str
    worker: int
    step: int
    action: int
    seconds: float = 3600.0

    @classmethod
    def draw(cls, seed: int, kinds: tuple[str, ...], workers: int, steps: int, actions: int) -> Fault:
        """One at random: the same for the same ``seed``."""
        random_ = random.Random(seed)
        return cls(random_.choice(kinds), random_.randrange(workers), random_.randrange(steps),
                   random_.randrange(actions))


def inject(activity: Activity, rank: int, fault: Fault, before: Callable[[], None] = lambda: None) -> None:
    """Let ``fault`` happen to this worker, if it is the one; calls ``before()`` just before it."""
    if rank != fault.worker:
        return
    at, number = activity.at, dict[int, int]()

    def faulty(operation: str, stage: int, microbatch: int) -> None:
        at(operation, stage, microbatch)
        step = activity.step
        if step == fault.step and number.get(step, 0) == fault.action:
            before()
            FAULTS[fault.kind](fault.seconds)
        number[step] = number.get(step, 0) + 1
    activity.at = faulty       # type: ignore[method-assign]
