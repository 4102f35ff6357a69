"""What stages run on: devices, the links between them, and how much memory a schedule needs."""
from __future__ import annotations

import math
from dataclasses import dataclass

from partitioners.errors import PartitionError


def _at_least(value: object, least: float = 0.0) -> bool:
    """Whether ``value`` is a number (infinity included) of ``least`` or more."""
    try:
        return not isinstance(value, (bool, str)) and bool(value >= least)    # type: ignore[operator]
    except TypeError:
        return False


@dataclass(frozen=True)
class Device:
    """``count`` equal devices of class ``name``.

    ``speed`` divides a node's seconds; where a node gives its seconds per class, ``name`` picks them. ``memory`` is in
    bytes (None: no limit). A device that does not pay for links (``pays_link=False``: a CPU beside its accelerators)
    moves values for nothing.
    """
    name: str = "device"
    count: int = 1
    memory: float | None = None
    speed: float = 1.0
    pays_link: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or isinstance(self.count, bool) or not isinstance(self.count, int):
            raise PartitionError(
                f"device class {self.name!r} has count {self.count!r}; the name must be a string and the "
                "count a whole number"
            )
        if (self.count < 0 or not _at_least(self.speed) or self.speed == 0
                or (self.memory is not None and not _at_least(self.memory))):
            raise PartitionError(
                f"device class {self.name!r} has count {self.count}, speed {self.speed!r} and memory "
                f"{self.memory!r}; count and memory cannot be negative, speed must be a positive number"
            )


@dataclass(frozen=True)
class Link:
    """Moving ``n`` bytes takes ``latency + n / bandwidth`` seconds; ``bandwidth=None`` is infinitely fast."""
    bandwidth: float | None = None
    latency: float = 0.0

    def __post_init__(self) -> None:
        if (self.bandwidth is not None and (not _at_least(self.bandwidth) or self.bandwidth == 0)
                or not _at_least(self.latency) or self.latency == math.inf):
            raise PartitionError(
                f"a link has bandwidth {self.bandwidth!r} and latency {self.latency!r}; bandwidth must be "
                "positive bytes per second (or None), latency finite seconds, not negative"
            )

    def seconds(self, num_bytes: float, messages: float = 1.0) -> float:
        """Seconds to move ``num_bytes`` in ``messages`` messages."""
        return messages * self.latency + (num_bytes / self.bandwidth if self.bandwidth else 0.0)


@dataclass(frozen=True)
class Cluster:
    """Devices for the stages.

    Unordered (``ordered=False``): stages may use the devices in any order, and all links are alike. Ordered: device
    ``j`` holds stage ``j``, and ``links[j]`` joins stages ``j`` and ``j + 1``; a value is priced at the link next to
    the stage that sends or receives it.
    """
    devices: tuple[Device, ...]
    ordered: bool = False
    links: tuple[Link, ...] = (Link(),)

    @property
    def num_devices(self) -> int:
        """Devices of all classes."""
        return sum(device.count for device in self.devices)

    @classmethod
    def nodes(cls, num_nodes: int, per_node: int, *, device: Device = Device(), inside: Link = Link(),
              between: Link = Link()) -> Cluster:
        """``num_nodes`` machines with ``per_node`` equal devices each: fast links inside, slow ones between."""
        total = num_nodes * per_node
        links = tuple(inside if (j + 1) % per_node else between for j in range(total - 1))
        single = Device(device.name, 1, device.memory, device.speed, device.pays_link)
        return cls((single,) * total, ordered=True, links=links or (inside,))


# Tensors of the size of a weight that the optimizer keeps for it; Adafactor keeps sums of rows and columns.
OPTIMIZER_STATES = {"adam": 2, "adamw": 2, "nadam": 2, "radam": 2, "lamb": 2, "adadelta": 2, "adagrad": 1, "rmsprop": 1,
                    "lion": 1, "sgd-momentum": 1, "adafactor": 0, "sgd": 0}


MASTER = "-master"      # behind an optimizer's name: with master weights


def parameter_factor(optimizer: str, *, bytes_per_weight: float = 4.0, master_weights: bool = False) -> float:
    """Weights, gradients and state of ``optimizer``, in units of the weights.

    torch's optimizers keep their state in the weights' own precision. With ``master_weights`` there are copies of four
    bytes besides, and the state is of those; ``"adamw-master"`` says the same. Raises ``PartitionError`` for an unknown
    optimizer.
    """
    if optimizer.endswith(MASTER):
        optimizer, master_weights = optimizer.removesuffix(MASTER), True
    if optimizer not in OPTIMIZER_STATES:
        raise PartitionError(f"the optimizer {optimizer!r} is none of {', '.join(OPTIMIZER_STATES)}; give its "
                             "parameter factor")
    states = OPTIMIZER_STATES[optimizer]
    return 2.0 + (4.0 * (1 + states) / bytes_per_weight if master_weights else states)


@dataclass(frozen=True)
class MemoryModel:
    """Bytes a stage needs: ``parameter_factor`` x parameters + stashed activations x micro-batches in flight +
    workspace.

    ``parameter_factor`` counts weights, gradients and optimizer state in units of the weights (4 is Adam in one
    precision). ``schedule`` says how many micro-batches stage ``i`` of ``K`` holds: ``"gpipe"`` all of them, ``"1f1b"``
    ``min(num_microbatches, K - i)``, ``"none"`` one.
    """
    parameter_factor: float = 4.0
    schedule: str = "gpipe"

    def weights(self, total: float, frozen: float = 0.0) -> float:
        """Bytes of ``total`` bytes of weights, with gradients and optimizer state for all but ``frozen`` bytes."""
        return self.parameter_factor * (total - frozen) + frozen

    def __post_init__(self) -> None:
        if self.schedule not in ("gpipe", "1f1b", "none"):
            raise PartitionError(f"the memory model knows the schedules gpipe, 1f1b and none, not {self.schedule!r}")

    def in_flight(self, stage: int, num_stages: int, num_microbatches: int) -> int:
        """Micro-batches whose activations ``stage`` holds at its peak."""
        if self.schedule == "none":
            return 1
        if self.schedule == "gpipe":
            return num_microbatches
        return max(1, min(num_microbatches, num_stages - stage))
