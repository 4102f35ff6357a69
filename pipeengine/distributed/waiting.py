"""The one place that blocks."""
from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from time import perf_counter

import torch.distributed as dist

from pipeengine.distributed.failure import ConnectionLost


class Waiter:
    """The one place that blocks. It waits on a helper thread, so that Ctrl-C reaches the caller.

    ``interrupted`` is asked now and then while waiting; when it returns an error, the wait ends with it.
    """

    def __init__(self, interrupted: Callable[[], Exception | None] = lambda: None, interval_seconds: float = 1.0):
        self._todo: queue.SimpleQueue = queue.SimpleQueue()
        self._interrupted, self._interval = interrupted, interval_seconds
        self._thread: threading.Thread | None = None
        self.seconds = 0.0

    def wait(self, *work: dist.Work) -> None:
        """Return when all of ``work`` is done; raises ``ConnectionLost`` when it broke off."""
        if all(one.is_completed() for one in work):
            error = _outcome(work)
            if error is not None:
                raise error
            return
        start = perf_counter()
        if self._thread is None:
            self._thread = threading.Thread(target=_serve, args=(self._todo,), daemon=True, name="pipeengine-wait")
            self._thread.start()
        done: queue.SimpleQueue = queue.SimpleQueue()
        self._todo.put((work, done))
        del work
        while True:
            try:
                error = done.get(timeout=self._interval)
                break
            except queue.Empty:
                if (stop := self._interrupted()) is not None:
                    raise stop from None
        self.seconds += perf_counter() - start
        if error is not None:
            raise error

    def close(self) -> None:
        """Let the helper thread end."""
        if self._thread is not None:
            self._todo.put(None)
            self._thread = None


def _serve(todo: queue.SimpleQueue) -> None:
    while (task := todo.get()) is not None:
        work, done = task
        del task
        error = _outcome(work)
        del work
        done.put(error)
        del done, error


def _outcome(work: tuple[dist.Work, ...]) -> ConnectionLost | None:
    """Wait for ``work``; what went wrong, without references to it (they would keep the connections open)."""
    one: dist.Work | None = None
    try:
        for one in work:
            one.wait()
    except Exception as error:
        return ConnectionLost(str(error))
    finally:
        del work
        one = None
    return None


def give_up(group: dist.ProcessGroup) -> None:
    """Destroy a group whether or not it still works."""
    try:
        dist.destroy_process_group(group)
    except Exception as error:              # already broken: that is why we are here
        del error
