"""The space that is searched: every way to use the devices, as points."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from pipeengine.errors import InputError
from pipeengine.exploration.training_state import state_factor

KNOWN = ("gpipe", "1f1b", "zb-h1", "zb-h2", "interleaved-1f1b", "bfs", "interleaved-zb", "zb-v", "v-half", "v-min",
         "dualpipe-v")
SCHEDULES = ("gpipe", "1f1b", "zb-h1", "interleaved-1f1b", "bfs", "interleaved-zb", "zb-v", "v-half", "v-min")
"""Those that are searched unless others are named: the rest are for span or for blocks of experts."""
ONE_STAGE = ("gpipe", "1f1b", "zb-h1", "zb-h2", "auto")
TWO_STAGES = ("zb-v", "v-half", "v-min", "dualpipe-v")
RECOMPUTE = ("none", "stages", "blocks")
"""``"stages"`` and ``"blocks"``: whole stages, or every repeated block of a stage, where the stage would not fit."""


@dataclass(frozen=True, order=True)
class Point:
    """One configuration, but for its cuts. ``rows`` are those of a micro-batch."""

    replicas: int
    workers: int
    stages_per_worker: int
    rows: int
    num_microbatches: int
    schedule: str
    recompute: str
    shard: str | None
    near: str

    @property
    def num_stages(self) -> int:
        """Stages of one pipeline."""
        return self.workers * self.stages_per_worker

    def __str__(self) -> str:
        parts = [f"{self.replicas} x {self.workers} workers" if self.replicas > 1 else f"{self.workers} workers"]
        if self.stages_per_worker > 1:
            parts.append(f"{self.stages_per_worker} stages each")
        parts.append(f"{self.num_microbatches} micro-batches of {self.rows} row{'s' * (self.rows > 1)}")
        if self.workers > 1:
            parts.append(self.schedule)
        if self.recompute != "none":
            parts.append(f"recompute {self.recompute}")
        if self.shard:
            parts.append(f"shard {self.shard}")
        if self.replicas > 1 and self.workers > 1:
            parts.append(f"{self.near} side by side")
        return ", ".join(parts)


@dataclass(frozen=True)
class Space:
    """What each dimension may be; an empty tuple leaves it open.

    ``rows`` of a micro-batch, ``stages`` of one pipeline. ``shard``: ``None``, ``"optimizer"``, and where
    asked ``"parameters"``, which needs a part of the weights more. ``near``: which workers are numbered next to each
    other, a pipeline's ``"stages"`` or the ``"replicas"`` of a stage.
    """

    replicas: tuple[int, ...] = ()
    stages: tuple[int, ...] = ()
    stages_per_worker: tuple[int, ...] = (1, 2)
    rows: tuple[int, ...] = ()
    schedule: tuple[str, ...] = SCHEDULES
    recompute: tuple[str, ...] = ("stages", "blocks")
    shard: tuple[str | None, ...] = (None, "optimizer")
    near: tuple[str, ...] = ("stages",)

    def points(self, num_devices: int, global_rows: int) -> Iterator[Point]:
        """Every configuration that uses all devices and gives every micro-batch the same number of rows."""
        for replicas in _chosen(self.replicas, divisors(num_devices)):
            workers, share = num_devices // replicas, global_rows // replicas
            if num_devices % replicas or global_rows % replicas:
                continue
            for rows in _chosen(self.rows, divisors(share)):
                if share % rows == 0:
                    yield from self._ordered(replicas, workers, rows, share // rows)

    def _ordered(self, replicas: int, workers: int, rows: int, num_microbatches: int) -> Iterator[Point]:
        per_worker = self.stages_per_worker if workers > 1 else (1,)
        for several, name in ((v, name) for v in per_worker for name in _orders(self.schedule, workers, v)):
            if self.stages and workers * several not in self.stages:
                continue
            for recompute in self.recompute:
                for shard in self.shard if replicas > 1 else (None,):
                    for near in self.near if replicas > 1 and workers > 1 else self.near[:1]:
                        yield Point(replicas, workers, several, rows, num_microbatches, name, recompute, shard, near)

    def validate(self, num_devices: int, global_rows: int) -> None:
        """Refuse what is in no dimension. Raises ``InputError``."""
        known = {"schedule": KNOWN, "recompute": RECOMPUTE, "shard": (None, "optimizer", "parameters"),
                 "near": ("stages", "replicas")}
        for field in fields(self):
            for value in getattr(self, field.name):
                if field.name in known and value not in known[field.name]:
                    raise InputError(f"{field.name} {value!r} is none of {', '.join(map(str, known[field.name]))}")
                if field.name not in known and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                    raise InputError(f"{field.name} is {value!r}; give whole numbers of at least 1")
        if next(self.points(num_devices, global_rows), None) is None:
            raise InputError(f"no configuration uses {num_devices} devices for {global_rows} rows within {self}; leave "
                             "a dimension open")


def divisors(number: int) -> tuple[int, ...]:
    """All divisors, ascending."""
    return tuple(each for each in range(1, number + 1) if number % each == 0)


def _chosen(asked: Sequence[int], possible: Sequence[int]) -> Sequence[int]:
    return asked or possible


def _orders(names: tuple[str, ...], workers: int, stages_per_worker: int) -> tuple[str, ...]:
    """The schedules for so many stages per worker; one is enough where a worker is alone."""
    if workers == 1:
        return ("1f1b",) if "1f1b" in names else names[:1]
    if stages_per_worker == 1:
        return tuple(name for name in names if name in ONE_STAGE)
    return tuple(name for name in names if name not in ONE_STAGE and (stages_per_worker == 2 or name not in TWO_STAGES))


@dataclass(frozen=True)
class Training:
    """What is trained: ``global_rows`` per step, weights of ``bytes_per_weight``, and the optimizer. ``state_factor``
    raises for an unknown one."""

    global_rows: int
    optimizer: str = "adamw"
    bytes_per_weight: float = 2.0

    def __post_init__(self) -> None:
        state_factor(self.optimizer)
        if isinstance(self.global_rows, bool) or not isinstance(self.global_rows, int) or self.global_rows < 1:
            raise InputError(f"rows is {self.global_rows!r}; give a whole number of at least 1")
