"""What a message between two workers takes."""
from __future__ import annotations

import math
from dataclasses import dataclass

from pipeengine.errors import ScheduleError


@dataclass(frozen=True)
class LinkTimes:
    """A message is there ``latency_seconds + bytes / bytes_per_second`` after its sender has made it.

    ``send_overhead_seconds`` is what the sending worker itself spends on each message, unable to compute meanwhile.
    ``bytes_per_second=None`` is infinitely fast. Raises ``ScheduleError`` for times below 0 or a rate of 0 or less.
    """
    latency_seconds: float = 0.0
    send_overhead_seconds: float = 0.0
    bytes_per_second: float | None = None

    def __post_init__(self) -> None:
        rate = self.bytes_per_second
        if not all(0 <= seconds < math.inf for seconds in (self.latency_seconds, self.send_overhead_seconds)) or (
                rate is not None and not rate > 0):
            raise ScheduleError(
                f"a message takes {self.latency_seconds} s and {self.send_overhead_seconds} s of its "
                f"sender, at {rate} bytes per second; give finite seconds of 0 or more, and a rate over "
                "0 or None"
            )

    def sum_seconds(self, num_bytes: float, num_replicas: int) -> float:
        """Seconds to sum ``num_bytes`` over replicas: each sends every other its share, then the sum of its own."""
        if num_replicas == 1:
            return 0.0
        steps, rate = 2 * (num_replicas - 1), self.bytes_per_second
        moved = steps / num_replicas * num_bytes
        return steps * (self.latency_seconds + self.send_overhead_seconds) + (moved / rate if rate else 0.0)

    @classmethod
    def free(cls) -> LinkTimes:
        """Messages that take no time: all stages in one process."""
        return cls()
