"""Texts that workers leave for each other, for whom nobody waits."""
from __future__ import annotations

from typing import Protocol

import torch.distributed as dist


class Board(Protocol):
    """Where any worker leaves texts at any time, alone."""

    def post(self, text: str) -> None:
        """Send worker 0 a text."""

    def posted(self) -> list[str]:
        """On worker 0: the texts that have arrived since the last call, in the order in which they were sent."""

    def note(self, name: str, text: str) -> None:
        """Leave a text under a name, over the one before."""

    def noted(self, name: str) -> str | None:
        """The text that some worker has left under a name last."""


class LocalBoard:
    """The board of one process."""

    def __init__(self) -> None:
        self._posted: list[str] = []
        self._notes: dict[str, str] = {}

    def post(self, text: str) -> None:
        """Keep the text for ``posted``."""
        self._posted.append(text)

    def posted(self) -> list[str]:
        """The texts since the last call."""
        texts, self._posted = self._posted, []
        return texts

    def note(self, name: str, text: str) -> None:
        """Keep the text under its name."""
        self._notes[name] = text

    def noted(self, name: str) -> str | None:
        """The text kept last under a name."""
        return self._notes.get(name)


class StoreBoard:
    """A board in the store of a process group; two short calls for a text, one where nothing has arrived."""

    def __init__(self, store: dist.Store):
        self._store, self._taken = store, 0

    def post(self, text: str) -> None:
        """Send worker 0 a text."""
        self._store.set(f"post/{self._store.add('posts', 1)}", text)

    def posted(self) -> list[str]:
        """The texts that have arrived on worker 0 since the last call; one that is on its way stops those after it."""
        texts = []
        while self._store.check([key := f"post/{self._taken + 1}"]):
            texts.append(self._store.get(key).decode())
            self._store.delete_key(key)
            self._taken += 1
        return texts

    def note(self, name: str, text: str) -> None:
        """Leave a text under a name."""
        self._store.set(f"note/{name}", text)

    def noted(self, name: str) -> str | None:
        """The text left under a name last."""
        return self._store.get(f"note/{name}").decode() if self._store.check([f"note/{name}"]) else None
