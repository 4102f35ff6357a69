"""Collectives that are not the pipeline's own, of a Trainer or a script: the guard ends them as it ends ours.

torch waits in C++ for half an hour for a worker that has fallen asleep, and then names nobody.
"""
from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from pipeengine.distributed.activity import Unwatched
from pipeengine.distributed.failure import ConnectionLost, is_from_a_collective
from pipeengine.distributed.waiting import Waiter

T = TypeVar("T")

# Those in which every process of the default group takes part.
_COLLECTIVES = ("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "barrier", "broadcast",
                "broadcast_object_list", "gather", "gather_object", "reduce", "scatter", "scatter_object_list")


class Guarded(Protocol):
    """Workers whose guard tells them who is lost."""

    waiter: Waiter
    activity: Unwatched

    def fail(self, error: BaseException, where: str) -> BaseException:
        """What to raise for ``error``."""


_open: weakref.WeakSet[Guarded] = weakref.WeakSet()


def watch_outside(workers: Guarded) -> None:
    """Until ``leave_outside``, the guard of ``workers`` sees what this process waits for elsewhere too."""
    _open.add(workers)


def leave_outside(workers: Guarded) -> None:
    """The guard of ``workers`` is closed."""
    _open.discard(workers)


def wait_guarded(name: str, what: Callable[[], T]) -> T:
    """What ``what()`` returns, a collective called ``name``. Raises ``WorkerError`` that says who is lost, where a
    worker never comes or the connection breaks, and whatever else ``what`` raises."""
    workers = next(iter(_open), None)
    if workers is None:
        return what()

    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def told_as_lost() -> T:
        try:
            with torch.inference_mode(inference), torch.set_grad_enabled(grad):     # which every thread has its own of
                return what()
        except RuntimeError as error:
            if is_from_a_collective(error):
                raise ConnectionLost(str(error)) from None
            raise
    try:
        with workers.activity.section(name):
            return workers.waiter.run(told_as_lost)
    except ConnectionLost as error:
        raise workers.fail(error, f"in {name}, outside of the pipeline") from None


@contextlib.contextmanager
def guarded_collectives() -> Iterator[None]:
    """Inside, collectives of this thread on the default group are ``wait_guarded``, whoever calls them."""
    owner = threading.get_ident()
    before = {name: getattr(dist, name) for name in _COLLECTIVES}

    def guarded(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(collective)
        def call(*args: Any, **options: Any) -> Any:
            # What does not wait here, is some workers' alone, or comes from the thread that waits, stays as it is.
            if threading.get_ident() != owner or options.get("async_op") \
                    or any(arg is True or isinstance(arg, dist.ProcessGroup) for arg in args) \
                    or options.get("group") not in (None, dist.group.WORLD):
                return collective(*args, **options)
            return wait_guarded(name, lambda: collective(*args, **options))
        return call
    for name, collective in before.items():
        setattr(dist, name, guarded(name, collective))
    try:
        yield
    finally:
        for name, collective in before.items():
            setattr(dist, name, collective)
