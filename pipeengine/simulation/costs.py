"""What actions and messages take. Seconds and bytes throughout (or any unit of time, and any of memory, used alike)."""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pipeengine.errors import ScheduleError
from pipeengine.schedules import Edge, Topology


def _per_stage(name: str, value: float | Sequence[float], num_stages: int) -> tuple[float, ...]:
    values = tuple(float(x) for x in (value if isinstance(value, (Sequence, np.ndarray)) else [value] * num_stages))
    if len(values) != num_stages:
        raise ScheduleError(f"{name} has {len(values)} entries for {num_stages} stages; give one per stage")
    if not all(0 <= x < float("inf") for x in values):
        raise ScheduleError(f"{name} is {min(values):g} to {max(values):g}; "
                            "times and sizes are finite and not negative")
    return values


@dataclass(frozen=True)
class Costs:
    """What actions and messages take: one entry per stage, or one number for all (then with ``num_stages``).

    ``backward`` is the fused one, ``input_grad + weight_grad`` unless given; given alone it is halved between them.
    A message takes ``hop`` seconds, plus ``edge_bytes[source, target] / bandwidth`` where both are given.
    ``activation`` is what a stage keeps per micro-batch from F to its backward; ``weight_activation`` what of it stays
    between I and W (all of it unless given); ``transient`` what backward needs on top while it runs. After its last
    action a worker spends ``exchange`` (shared gradients, by the stages that take part, who wait for each other), then
    ``optimizer``. Where there are replicas, ``reduce`` is what summing a stage's gradients takes: it begins after the
    stage's last backward, one stage of a worker after the other, while the worker goes on, and ends before
    ``optimizer``.
    """
    forward: tuple[float, ...]
    input_grad: tuple[float, ...] | None = None
    weight_grad: tuple[float, ...] | None = None
    backward: tuple[float, ...] | None = None
    hop: float = 0.0
    bandwidth: float | None = None
    edge_bytes: Mapping[tuple[int, int], float] = field(default_factory=dict)
    activation: tuple[float, ...] | None = None
    weight_activation: tuple[float, ...] | None = None
    transient: tuple[float, ...] | None = None
    exchange: tuple[float, ...] | None = None
    optimizer: tuple[float, ...] | None = None
    reduce: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: float | Sequence[float]) -> None:
            object.__setattr__(self, name, _per_stage(name, value, count))
        count = len(self.forward) if isinstance(self.forward, (Sequence, np.ndarray)) else 1
        put("forward", self.forward)
        if self.input_grad is None and self.weight_grad is None:
            whole = _per_stage("backward", 0.0 if self.backward is None else self.backward, count)
            halves = [tuple(x / 2 for x in whole)] * 2
        else:
            halves = [self.input_grad or 0.0, self.weight_grad or 0.0]
        put("input_grad", halves[0])
        put("weight_grad", halves[1])
        if self.backward is None:
            put("backward", [i + w for i, w in zip(self.input_grad, self.weight_grad)])
        else:
            put("backward", self.backward)
        for name in ("activation", "weight_activation", "transient", "exchange", "optimizer", "reduce"):
            if getattr(self, name) is not None:
                put(name, getattr(self, name))
        _per_stage("edge_bytes", list(self.edge_bytes.values()), len(self.edge_bytes))
        if not 0 <= self.hop < float("inf") or (self.bandwidth is not None and not self.bandwidth > 0):
            raise ScheduleError(
                f"hop is {self.hop} seconds and bandwidth {self.bandwidth} bytes per second; a hop takes 0 "
                "or more, a bandwidth is over 0 or left out"
            )

    @classmethod
    def uniform(cls, topology: Topology, *, forward: float = 1.0, input_grad: float = 1.0, weight_grad: float = 1.0,
                hop: float = 0.0, weight_activation: float = 1.0) -> Costs:
        """Equal workers: times are seconds of one micro-batch on one worker, shared by its stages; ``hop`` those of one
        message.

        Activations are in micro-batches of a whole worker, ``weight_activation`` of which stays between I and W.
        """
        share = topology.shares()
        return cls(tuple(forward * share), tuple(input_grad * share), tuple(weight_grad * share), hop=hop,
                   activation=tuple(share), weight_activation=tuple(weight_activation * share))

    def duration(self, op: np.ndarray, stage: np.ndarray) -> np.ndarray:
        """Seconds of each action."""
        return np.array([self.forward, self.backward, self.input_grad, self.weight_grad])[op, stage]

    def latency(self, edge: Edge) -> float:
        """Seconds that one message of ``edge`` takes, either way."""
        size = self.edge_bytes.get((edge.source, edge.target), 0.0)
        return self.hop + (size / self.bandwidth if self.bandwidth else 0.0)

    def recomputing(self, stages: Iterable[int], kept: float = 0.0) -> Costs:
        """These costs when ``stages`` keep only ``kept`` bytes per micro-batch and run forward again in backward."""
        again = np.isin(np.arange(len(self.forward)), list(stages))
        extra = np.where(again, self.forward, 0.0)
        activation = np.array(self.activation or (1.0,) * len(self.forward))
        transient = np.where(again, np.maximum(activation - kept, 0.0), self.transient or (0.0,))
        return replace(self, input_grad=tuple(self.input_grad + extra), backward=tuple(self.backward + extra),
                       activation=tuple(np.where(again, np.minimum(kept, activation), activation)),
                       transient=tuple(transient))
