"""Times of actions are those of the device that does the work, not of the host that orders it."""
from time import perf_counter

import pytest
import torch
from torch import nn

import pipeengine as pe
from pipeengine.runtime import step
from pipeengine.runtime.clock import HOST, DeviceClock, clock_of


class Device:
    """A device that takes ``milliseconds`` for whatever lies between two events, however soon the host goes on."""

    def __init__(self, milliseconds: float):
        self.milliseconds, self.now, self.waited = milliseconds, 0.0, 0

    def event(self, device, enable_timing):
        assert enable_timing, "an event without it cannot tell the time"
        return Event(self)

    def synchronize(self, device):
        self.waited += 1

    def clock(self, device="meta") -> DeviceClock:
        return DeviceClock(torch.device(device), self.event, self.synchronize)


class Event:
    def __init__(self, device: Device):
        self._device, self.at, self.reached = device, None, False

    def record(self):
        self.at = self._device.now
        self._device.now += self._device.milliseconds

    def synchronize(self):
        self.reached = True

    def elapsed_time(self, later: "Event") -> float:
        assert later.reached, "its time is not known before the device is there"
        return later.at - self.at


def test_the_host_is_its_own_clock():
    before = perf_counter()
    start, mark = HOST.begin(), HOST.mark()
    assert before <= start <= HOST.seconds(mark) <= perf_counter()
    assert clock_of(torch.device("cpu")) is HOST and isinstance(clock_of(torch.device("cuda")), DeviceClock)


def test_marks_are_told_by_the_device_from_when_both_stand_still():
    device = Device(250.0)
    clock = device.clock()
    start = clock.begin()
    marks = [clock.mark() for _ in range(4)]
    assert device.waited == 1 and perf_counter() - start < 100.0
    assert [clock.seconds(mark) - start for mark in marks] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    again = clock.begin()
    assert device.waited == 2 and clock.seconds(clock.mark()) - again == pytest.approx(0.25)


def test_a_timeline_shows_what_the_device_took(monkeypatch):
    """The host is through in milliseconds; a device that takes a second per action has a step of many seconds."""
    device = Device(1000.0)
    monkeypatch.setattr(step, "clock_of", lambda _: device.clock())
    x = torch.randn(8, 4)
    pipe = pe.Pipeline(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), (x,), loss_fn=nn.functional.mse_loss, target=x,
                       num_stages=2, num_microbatches=4, schedule="1f1b", costs="analytic")
    pipe.step(x, target=x)
    timeline = pipe.timeline()
    assert (timeline.end - timeline.start) == pytest.approx(1.0), "each action lies between two marks"
    assert timeline.makespan == pytest.approx(2 * 16 - 1), "one at a time, each with a mark before and after"
    for _ in range(3):
        pipe.step(x, target=x)
    assert device.waited == 3, "only the steps that are published wait for the device"
