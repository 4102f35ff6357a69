"""Values of other workers, on their way to the one that tells."""
from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeengine.distributed import Workers


class Mail:
    """Worker 0 takes what the others have posted; they post what it does not tell itself.

    A name that worker 0 has told by the step's end, as the others see it, stays at home: the loss, which all of them
    have, is not sent. Two short calls to the store where something is sent, none otherwise.
    """

    def __init__(self, workers: Workers):
        self._workers = workers
        self._known: frozenset[str] = frozenset()
        self._looked: dict[str, int] = {}

    def names_told(self, names: frozenset[str]) -> None:
        """On worker 0: these are the names of its own values."""
        if self._workers.size > 1 and not names <= self._known:
            self._known |= names
            self._workers.board.note("names", json.dumps(sorted(self._known)))

    def post(self, step: int, values: Mapping[str, Any]) -> None:
        """On another worker: values of a step."""
        unknown = values.keys() - self._known
        if any(self._looked.get(name, 0) < 3 for name in unknown):
            self._looked |= {name: self._looked.get(name, 0) + 1 for name in unknown}
            self._known = frozenset(json.loads(self._workers.board.noted("names") or "[]"))
            unknown = unknown - self._known
        if unknown:
            self._workers.board.post(json.dumps({"step": step, "values": {name: values[name] for name in unknown}}))

    def take(self) -> list[tuple[int, dict[str, Any]]]:
        """On worker 0: (step, values) of what has arrived."""
        letters = [json.loads(text) for text in self._workers.board.posted()]
        return [(letter["step"], letter["values"]) for letter in letters]
