"""Threads that work beside the training loop: steps come first."""
from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable

_NICE = 10      # not lower: one that holds Python's lock while it must not run would hold the steps as well


def start_beside_training(name: str, what: Callable[[], object]) -> threading.Thread:
    """A started thread that does ``what`` with lower priority, where threads have one of their own."""
    def run() -> None:
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        what()
    thread = threading.Thread(target=run, daemon=True, name=name)
    thread.start()
    return thread
