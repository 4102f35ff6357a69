"""The one place that blocks."""
from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Callable
from time import perf_counter
from typing import TypeVar, cast

import torch.distributed as dist

from pipeengine.distributed.failure import ConnectionLost

T = TypeVar("T")

_CLOSING_SECONDS = 0.2      # until a group that does not close is left behind
_LAST_SECONDS = 1.0         # at the end of the process, for all that were left behind
_threads: weakref.WeakKeyDictionary[threading.Thread, queue.SimpleQueue] = weakref.WeakKeyDictionary()


class Waiter:
    """The one place that blocks. It waits on a helper thread, so that Ctrl-C reaches the caller.

    ``interrupted`` is asked now and then while waiting; when it returns an error, the wait ends with it. ``waits`` is
    told when this worker begins to wait, and when it ends.
    """

    def __init__(self, interrupted: Callable[[], Exception | None] = lambda: None, interval_seconds: float = 0.05,
                 waits: Callable[[bool], None] = lambda waits: None):
        self._todo: queue.SimpleQueue = queue.SimpleQueue()
        self._interrupted, self._interval, self._waits = interrupted, interval_seconds, waits
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
        task = _Outcome(work)
        del work
        error = cast(ConnectionLost | None, self._elsewhere(task))
        self.seconds += perf_counter() - start
        if error is not None:
            raise error

    def run(self, what: Callable[[], T]) -> T:
        """What ``what()`` returns, which may block in a call that nothing can interrupt; raises what it raises."""
        result, error = cast(tuple, self._elsewhere(_Call(what)))
        if error is not None:
            raise error
        return cast(T, result)

    def _elsewhere(self, task: Callable[[], object]) -> object:
        """Run ``task`` on the helper thread; wait until it is done, or this worker is interrupted."""
        if self._thread is None:
            self._thread = _start(_serve, self._todo, "pipeengine-wait", self._todo)
        done: queue.SimpleQueue = queue.SimpleQueue()
        self._todo.put((task, done))
        del task
        self._waits(True)
        try:
            while True:
                try:
                    return done.get(timeout=self._interval)
                except queue.Empty:
                    if (stop := self._interrupted()) is not None:
                        self._todo.put(None)        # that thread is stuck: it ends when it can
                        self._thread, self._todo = None, queue.SimpleQueue()
                        raise stop from None
        finally:
            self._waits(False)

    def close(self) -> None:
        """Let the helper thread end."""
        if self._thread is not None:
            self._todo.put(None)
            self._thread = None


def _start(target: Callable[[T], None], argument: T, name: str, todo: queue.SimpleQueue | None = None
           ) -> threading.Thread:
    """A thread that is no obstacle to the process's end; ``todo`` is where it is told to end."""
    thread = threading.Thread(target=target, args=(argument,), daemon=True, name=name)
    _threads[thread] = todo or queue.SimpleQueue()
    thread.start()
    return thread


@atexit.register
def _see_off() -> None:
    """A thread that comes back from C++ when the interpreter is gone already aborts the process: wait for it, but not
    long, since it may be stuck, and then it does not come back."""
    deadline = perf_counter() + _LAST_SECONDS
    for todo in list(_threads.values()):
        todo.put(None)
    for thread in list(_threads):
        thread.join(max(0.0, deadline - perf_counter()))


def _serve(todo: queue.SimpleQueue) -> None:
    while (pair := todo.get()) is not None:
        task, done = pair
        del pair
        result = task()
        del task
        done.put(result)
        del done, result


class _Outcome:
    """Waits for work, and lets go of it: a reference would keep the connections open."""

    def __init__(self, work: tuple[dist.Work, ...]):
        self._work = [work]

    def __call__(self) -> ConnectionLost | None:
        return _outcome(self._work.pop())


class _Call:
    """A call whose result or error is told as a pair."""

    def __init__(self, what: Callable[[], object]):
        self._what = what

    def __call__(self) -> tuple[object, BaseException | None]:
        try:
            return self._what(), None
        except BaseException as error:
            return None, error


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


def give_up(groups: list[dist.ProcessGroup]) -> None:
    """Destroy groups whether or not they still work, and empty the list, which must hold the last references to them.

    gloo's destructor waits for the collectives of its group, and one that a lost worker has not joined ends with the
    group's timeout. Nobody waits for that: a thread does, which is no obstacle to the process's end.
    """
    _start(_destroy, groups, "pipeengine-close").join(_CLOSING_SECONDS)


def _destroy(groups: list[dist.ProcessGroup]) -> None:
    while groups:
        try:
            dist.destroy_process_group(groups[-1])
        except Exception as error:          # already broken: that is why we are here
            del error
        groups.pop()
