"""Who did what from when to when. Simulated and measured runs have the same type."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from partitioners.notebook import html_of
from pipeengine.errors import ScheduleError
from pipeengine.schedules import LETTERS

OPS = LETTERS + ("SA", "RA", "SG", "RG", "X", "U", "R")
"""All letters of a timeline: actions, messages (send and receive, activation and gradient), the end of a step (X
exchanges the gradients of shared parameters, U updates the parameters), and R: a stage's gradients are summed among
the replicas, while its worker goes on."""
SA, RA, SG, RG, X, U, R = range(4, 11)


@dataclass(frozen=True, eq=False)
class Timeline:
    """Who did what from when to when: one entry per action, in each worker's order, simulated or measured.

    ``op`` indexes ``OPS``. ``num_workers`` counts idle ones too. ``peak_bytes`` and ``sent_bytes`` are per worker,
    where known.
    """
    name: str
    num_workers: int
    num_microbatches: int
    worker: np.ndarray
    op: np.ndarray
    stage: np.ndarray
    microbatch: np.ndarray
    start: np.ndarray
    end: np.ndarray
    peak_bytes: tuple[float, ...] | None = None
    sent_bytes: tuple[float, ...] | None = None

    @classmethod
    def from_columns(cls, worker: Sequence[int], op: Sequence[str] | Sequence[int], stage: Sequence[int],
                     microbatch: Sequence[int], start: Sequence[float], end: Sequence[float], *, name: str = "run",
                     num_workers: int | None = None, num_microbatches: int | None = None,
                     peak_bytes: Sequence[float] | None = None, sent_bytes: Sequence[float] | None = None) -> Timeline:
        """A timeline from lists or arrays; ``op`` as letters or codes; the counts are the largest seen unless given."""
        codes = [OPS.index(x) if isinstance(x, str) else x for x in op] if not isinstance(op, np.ndarray) else op
        worker, microbatch = np.asarray(worker, np.int32), np.asarray(microbatch, np.int32)
        columns = (worker, np.asarray(codes, np.uint8), np.asarray(stage, np.int32), microbatch,
                   np.asarray(start, np.float64), np.asarray(end, np.float64))
        if len({len(column) for column in columns}) > 1:
            raise ScheduleError(f"columns of {[len(column) for column in columns]} entries; give all the same number")
        return cls(name, num_workers or int(worker.max(initial=-1)) + 1,
                   num_microbatches or int(microbatch.max(initial=-1)) + 1, *columns,
                   None if peak_bytes is None else tuple(peak_bytes), None if sent_bytes is None else tuple(sent_bytes))

    @cached_property
    def computes(self) -> np.ndarray:
        """Boolean mask of the entries that keep a worker busy (no messages, no sums among replicas)."""
        return (self.op < SA) | (self.op == X) | (self.op == U)

    @property
    def makespan(self) -> float:
        """Seconds from the first start to the last end: what a synchronised step pays."""
        return float(self.end.max() - self.start.min()) if len(self.end) else 0.0

    @cached_property
    def first(self) -> np.ndarray:
        """Each worker's first start, seconds."""
        return self._extreme(self.start, np.minimum, np.inf)

    @cached_property
    def last(self) -> np.ndarray:
        """Each worker's last end, seconds."""
        return self._extreme(self.end, np.maximum, -np.inf)

    def _extreme(self, times: np.ndarray, better: np.ufunc, worst: float) -> np.ndarray:
        extreme = np.full(self.num_workers, worst)
        better.at(extreme, self.worker[self.computes], times[self.computes])
        return np.where(np.isfinite(extreme), extreme, 0.0)

    @property
    def span(self) -> float:
        """The longest time, in seconds, that one worker takes from its own first start to its own last end."""
        return float((self.last - self.first).max(initial=0.0))

    @cached_property
    def busy(self) -> np.ndarray:
        """Seconds each worker computes."""
        mask = self.computes
        return np.bincount(self.worker[mask], (self.end - self.start)[mask], self.num_workers)

    @property
    def idle_share(self) -> np.ndarray:
        """The part of the makespan in which each worker does not compute."""
        return 1 - self.busy / self.makespan if self.makespan else np.zeros(self.num_workers)

    def __repr__(self) -> str:
        idle = 100 * self.idle_share.mean() if self.num_workers else 0.0
        return (f"<Timeline {self.name!r}: {len(self.end)} entries on {self.num_workers} workers, "
                f"{self.makespan:.4g} s, {idle:.1f} % idle>")

    def _repr_html_(self) -> str | None:
        return html_of(self)

    def to_dict(self) -> dict[str, object]:
        """JSON types only."""
        columns = {name: getattr(self, name).tolist() for name in COLUMNS}
        columns["op"] = [OPS[code] for code in columns["op"]]
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in COLUMNS}
        return rest | {name: list(value) for name, value in rest.items() if isinstance(value, tuple)} | columns

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Timeline:
        """The timeline that ``to_dict`` made. Raises ``ScheduleError`` where columns are missing."""
        known = {f.name for f in fields(cls)}
        missing = set(COLUMNS) - set(data)
        if missing:
            raise ScheduleError(f"this is no timeline: {', '.join(sorted(missing))} missing of {len(COLUMNS)} columns; "
                                "give what Timeline.to_dict wrote")
        return cls.from_columns(**{name: value for name, value in data.items() if name in known})

    def to_json(self) -> str:
        """The timeline as JSON text."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Timeline:
        """The timeline that ``to_json`` wrote."""
        return cls.from_dict(json.loads(text))
COLUMNS = ("worker", "op", "stage", "microbatch", "start", "end")
