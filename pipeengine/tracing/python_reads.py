"""What a forward and its loss read from Python while they were recorded: a recording holds only while that is the same.

An ``Entry`` is one place (an attribute, an entry of a container, a global, a closure's cell) with the value that stood
there. ``PythonReads`` are the entries of one recording, ``PythonWatch`` looks at those of many in one pass. Plain
values (numbers, texts, ...) are compared by value, everything else by identity; what the forward itself writes is left
out, or each step would be recorded anew.
"""
from __future__ import annotations

import zlib
from collections.abc import Iterable, Sized
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import compress
from operator import getitem, is_not
from types import CellType
from typing import Any, NamedTuple, Protocol

import torch

MISSING = object()
"""Stands for an attribute that was asked for and is not there."""
_PLAIN = (int, float, bool, str, bytes, complex, type(None), torch.dtype)


Identity = tuple[int, type, object]


class Place(Protocol):
    """Where values stand: a dict, a list, or one of the classes below."""

    def __getitem__(self, key: Any, /) -> object:
        """The present value."""


@dataclass(frozen=True)
class Length:
    """Under a number: whether the container has so many entries."""

    of: Sized

    def __getitem__(self, key: int) -> bool:
        return len(self.of) == key


@dataclass(frozen=True)
class Cell:
    """The contents of a closure's cell, under any key."""

    of: CellType

    def __getitem__(self, key: object) -> object:
        return self.of.cell_contents


@dataclass(frozen=True)
class InContext:
    """What a context variable is in the present context, under any key."""

    of: ContextVar

    def __getitem__(self, key: object) -> object:
        return self.of.get(MISSING)


@dataclass(frozen=True)
class Attribute:
    """An attribute of an object that does not stand in its dict."""

    of: object

    def __getitem__(self, key: str) -> object:
        return getattr(self.of, key, MISSING)


@dataclass(frozen=True)
class OfClass:
    """What stands in a class itself."""

    of: type

    def __getitem__(self, key: str) -> object:
        return vars(self.of)[key]


@dataclass(frozen=True)
class Absent:
    """A dict that may not have the key."""

    of: dict

    def __getitem__(self, key: object) -> object:
        return self.of.get(key, MISSING)


class Entry(NamedTuple):
    """``place[key]`` was ``value``; ``label`` says where that is, the same in every process."""

    label: str
    place: Place
    key: object
    value: object

    @property
    def identity(self) -> Identity:
        """Equal for entries of one place and key."""
        return identity(self.place, self.key)

    def now(self) -> object:
        """What stands there at present."""
        try:
            return self.place[self.key]
        except (LookupError, AttributeError, ValueError):
            return MISSING

    def holds(self) -> bool:
        """Whether the value is still the same."""
        return same(self.now(), self.value)


def identity(place: Place, key: object) -> Identity:
    """Equal for one place and key, whatever object stands for the place."""
    return id(getattr(place, "of", place)), type(place), key


def same(now: object, before: object) -> bool:
    """One object, or plain values of one type that are equal."""
    if now is before:
        return True
    if type(now) is not type(before):
        return False
    if isinstance(now, tuple) and isinstance(before, tuple):
        return len(now) == len(before) and all(map(same, now, before))
    return isinstance(now, _PLAIN) and (now == before or (now != now and before != before))


@dataclass(frozen=True)
class PythonReads:
    """What one recording depends on. ``digest`` is equal in two processes where all plain values are."""

    entries: tuple[Entry, ...] = ()
    digest: int = 0

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> PythonReads:
        """Of those ``entries`` whose value still stands there: others were written by what was recorded."""
        kept = tuple(entry for entry in entries if entry.holds())
        plain = [(entry.label, type(entry.value).__name__, entry.value) for entry in kept
                 if isinstance(entry.value, _PLAIN)]
        return cls(kept, zlib.crc32(repr(plain).encode()))

    def told(self) -> dict[str, str]:
        """The plain values by their labels, as text that two processes can compare: what ``digest`` is of."""
        return {entry.label: repr(entry.value) for entry in self.entries if isinstance(entry.value, _PLAIN)}

    def hold(self, ignored: frozenset[Identity] = frozenset()) -> bool:
        """Whether everything is as it was, besides what is ``ignored`` (by ``Entry.identity``)."""
        return all(entry.holds() or entry.identity in ignored for entry in self.entries)


class PythonWatch:
    """Looks at everything that some recordings depend on, in one pass.

    ``version`` changes when something has. ``ignored`` are the places that forwards write to.
    """

    def __init__(self) -> None:
        self.version = 0
        self.ignored: frozenset[Identity] = frozenset()
        self._entries: dict[Identity, Entry] = {}
        self._places: list[Place] = []
        self._keys: list[object] = []
        self._values: list[object] = []

    def add(self, reads: PythonReads) -> None:
        """Look at what one more recording depends on."""
        for entry in reads.entries:
            if entry.identity not in self._entries and entry.identity not in self.ignored:
                self._entries[entry.identity] = entry
                self._places.append(entry.place)
                self._keys.append(entry.key)
                self._values.append(entry.now())

    def look(self) -> int:
        """The present ``version``."""
        if self._changed():
            self.version += 1
        return self.version

    def ignore_written(self) -> None:
        """Called after a forward: what has changed since the last look was written by it, and is not watched."""
        changed = self._changed()
        if changed:
            self.ignored |= {list(self._entries)[index] for index in changed}
            kept = [entry for identity, entry in self._entries.items() if identity not in self.ignored]
            self._entries = {entry.identity: entry for entry in kept}
            self._places, self._keys = [entry.place for entry in kept], [entry.key for entry in kept]
            self._values = [entry.now() for entry in kept]

    def _changed(self) -> list[int]:
        """Positions of what is not what it was at the last look."""
        before = self._values
        try:
            now = list(map(getitem, self._places, self._keys))
        except (LookupError, AttributeError, ValueError):
            now = [entry.now() for entry in self._entries.values()]
        if not any(map(is_not, now, before)):
            return []
        others = list(compress(range(len(now)), map(is_not, now, before)))
        self._values = now
        return [index for index in others if not same(now[index], before[index])]
