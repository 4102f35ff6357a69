"""When actions ran: by the host where it computes itself, by events of the device where the host only gives orders."""
from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """``mark()`` notes this moment in the order of work; ``seconds`` tells later when a mark was reached."""

    def begin(self) -> float:
        """A step begins: marks are made from now on; the time of this moment, in seconds of ``perf_counter``."""

    def mark(self) -> Any:
        """This moment, which on a device comes when the work given so far is done."""

    def seconds(self, mark: Any) -> float:
        """When ``mark`` was reached, in seconds of ``perf_counter``; waits for it."""


class HostClock:
    """The host computes: a call that has returned is done."""

    def begin(self) -> float:
        """Now, in seconds."""
        return perf_counter()

    mark = staticmethod(perf_counter)

    def seconds(self, mark: float) -> float:
        """The mark itself, in seconds of ``perf_counter``."""
        return mark


class DeviceClock:
    """The host gives orders to ``device``, which follows in its own time: marks are events among its work.

    ``begin`` waits until the device has nothing left to do, so that both clocks start together. ``event`` and
    ``synchronize`` are torch's.
    """

    def __init__(self, device: torch.device, event: Callable[..., Any] = torch.Event,
                 synchronize: Callable[[torch.device], None] = torch.accelerator.synchronize):
        self._device, self._event, self._synchronize = device, event, synchronize
        self._first, self._start = None, 0.0

    def begin(self) -> float:
        """Wait for the device; now, in seconds."""
        self._synchronize(self._device)
        self._start, self._first = perf_counter(), self.mark()
        return self._start

    def mark(self) -> Any:
        """An event among the device's work."""
        event = self._event(self._device, enable_timing=True)
        event.record()
        return event

    def seconds(self, mark: Any) -> float:
        """When the device came to ``mark``, in seconds of ``perf_counter``; waits for it."""
        assert self._first is not None, "begin() comes first"
        mark.synchronize()
        return self._start + 1e-3 * self._first.elapsed_time(mark)


HOST = HostClock()


def clock_of(device: torch.device) -> Clock:
    """The clock that tells the truth about work on ``device``."""
    return HOST if device.type == "cpu" else DeviceClock(device)
