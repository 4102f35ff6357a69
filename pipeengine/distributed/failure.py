"""How one worker's failure becomes everybody's: what travels, and what each worker raises for it."""
from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch.distributed as dist

from pipeengine import errors
from pipeengine.errors import WorkerError

T = TypeVar("T")


class ConnectionLost(WorkerError):
    """A message or a collective broke off. It is the consequence of another worker's end, never a cause."""


def start(operation: Callable[..., T], *args: object, **options: object) -> T:
    """Begin an operation on a group; raises ``ConnectionLost`` where a peer is gone already."""
    try:
        return operation(*args, **options)
    except (RuntimeError, dist.DistError) as error:
        raise ConnectionLost(str(error)) from error


def is_from_a_collective(error: BaseException) -> bool:
    """Whether torch.distributed raised ``error``, in a call that may not be ours: its type and text tell too little."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and str(frame.tb_frame.f_globals.get("__name__")).startswith("torch.distributed.")


class Description(NamedTuple):
    """An error as three texts, so that it can travel without running anybody's code."""
    kind: str
    text: str
    traceback: str

    @classmethod
    def of(cls, error: BaseException) -> Description:
        """The three texts of ``error``."""
        return cls(type(error).__name__, str(error), "".join(traceback.format_exception(error)))

    def error(self, rank: int) -> Exception:
        """What the other workers raise for this problem of worker ``rank``: the same type where it is one of ours."""
        known = getattr(errors, self.kind, None)
        if known is not None:
            return known(f"{self.text} (on worker {rank})")
        return WorkerError(f"worker {rank} failed: {self.kind}: {self.text}\n"
                           f"--- traceback of worker {rank} ---\n{self.traceback}")


def headline(error: BaseException) -> str:
    """The first line of an error's text; its type where it has none (a bare assert, Ctrl-C)."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
