"""Where the forward is while it is recorded: the module calls that have begun and not ended, and names for what they
do.
"""
from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pipeengine.tracing.recording import Call


class NotTraceable(BaseException):
    """The forward did what a recording at this grain cannot hold; ``path`` is the module where.

    Not an ``Exception``, so that a ``try`` in the user's forward does not swallow it.
    """

    def __init__(self, path: str, reason: str):
        super().__init__(reason)
        self.path, self.reason = path, reason


@dataclass(slots=True)
class OpenCall:
    """One call of a module that runs now.

    ``index`` is its number in ``calls``, ``start`` the number of nodes written before it. ``argument_ids`` are the
    ids of the leaves it was given. A class that overrides ``__call__`` calls the base class's inside:
    ``inner_called`` then, and ``inner_output_ids`` are the ids of what that returned, or None when it was not given
    the same arguments.
    """

    module: torch.nn.Module
    path: str
    scope: str
    index: int
    parent: int
    start: int
    argument_ids: list[int]
    inner_called: bool = False
    inner_output_ids: list[int] | None = None


class CallStack:
    """The open calls, innermost last; ``calls`` are the ended ones by number (None while one is open)."""

    def __init__(self) -> None:
        self.calls: list[Call | None] = []
        self._open: list[OpenCall] = []
        self._hidden = 0
        self._calls_of: Counter[str] = Counter()
        self._names: Counter[str] = Counter()

    @property
    def hidden(self) -> bool:
        """Whether what runs now is part of one node, so that nothing of it is written down."""
        return self._hidden > 0

    @contextlib.contextmanager
    def hide(self) -> Iterator[None]:
        """Nothing that runs inside is written down."""
        self._hidden += 1
        try:
            yield
        finally:
            self._hidden -= 1

    @property
    def innermost(self) -> OpenCall | None:
        """The open call whose forward runs now."""
        return self._open[-1] if self._open else None

    @property
    def path(self) -> str:
        """Path of the innermost open module; empty for the model itself, and outside of it."""
        return self._open[-1].path if self._open else ""

    @property
    def index(self) -> int:
        """Number of the innermost open call, -1 outside of the model."""
        return self._open[-1].index if self._open else -1

    def where(self) -> str:
        """The innermost module, and the line of the user's code that runs now."""
        module = f"module {self.path or '(root)'}"
        frames = [frame for frame in traceback.extract_stack()
                  if "/torch/" not in frame.filename and "pipeengine/" not in frame.filename]
        return f"{module}, {frames[-1].filename}:{frames[-1].lineno}" if frames else module

    def next_scope(self, path: str) -> str:
        """A name for the next call of the module at ``path``: ``path``, ``path#1``, ``path#2``, ..."""
        self._calls_of[path] += 1
        count = self._calls_of[path]
        return path if count == 1 else f"{path}#{count - 1}"

    def next_name(self, op: str) -> str:
        """A name for the next step ``op`` of this call: ``scope:op``, ``scope:op.1``, ..."""
        name = f"{self._open[-1].scope if self._open else ''}:{op}"
        self._names[name] += 1
        return name if self._names[name] == 1 else f"{name}.{self._names[name] - 1}"

    @contextlib.contextmanager
    def opened(self, module: torch.nn.Module, path: str, start: int, argument_ids: list[int]) -> Iterator[OpenCall]:
        """Inside, the call of ``module`` is the innermost one. The caller sets ``calls[index]`` when it has ended."""
        call = OpenCall(module, path, self.next_scope(path), len(self.calls), self.index, start, argument_ids)
        self.calls.append(None)
        self._open.append(call)
        try:
            yield call
        finally:
            self._open.pop()
