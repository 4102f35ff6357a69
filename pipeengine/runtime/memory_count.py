"""What a step adds to memory: live tensor bytes by the allocator's own events, as torch.profiler tells them."""
from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from pipeengine.torch_private import memory_events

_ACTION = re.compile(r"stage (\d+): ")
Event = tuple[int, int, int]
"""Nanoseconds, address, bytes (less than 0 where they are given back)."""


@dataclass(frozen=True)
class MemoryCount:
    """The most bytes that were alive at once of those made inside: in all, and by each stage's actions."""

    peak: int
    stages: dict[int, int]


def count_memory(what: Callable[[], object], device: torch.device) -> MemoryCount:
    """Run ``what``, whose actions are marked for the profiler, and count what it makes on ``device``."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as seen:
        what()
    events, ranges = memory_events(seen, device)
    return count(events, [(start, end, int(found[1])) for name, start, end in ranges
                          if (found := _ACTION.match(name))])


def count(events: Iterable[Event], ranges: Iterable[tuple[int, int, int]]) -> MemoryCount:
    """Peaks by ``events``; what is made between the start and the end of a range (start, end, stage) is that stage's
    until it is given back, wherever that is. What was there before is not counted."""
    spans, at = sorted(ranges), 0
    live: dict[int, tuple[int, int]] = {}           # address -> stage (-1: none), bytes
    held: defaultdict[int, int] = defaultdict(int)
    peaks: defaultdict[int, int] = defaultdict(int)
    total = peak = 0
    for time, address, size in sorted(events, key=lambda event: event[0]):
        while at < len(spans) and spans[at][1] < time:
            at += 1
        if size > 0:
            stage = spans[at][2] if at < len(spans) and spans[at][0] <= time else -1
            live[address] = stage, size
        else:
            stage, size = live.pop(address, (-1, 0))
            size = -size
        held[stage] += size
        total += size
        peak, peaks[stage] = max(peak, total), max(peaks[stage], held[stage])
    return MemoryCount(peak, {stage: size for stage, size in sorted(peaks.items()) if stage >= 0})
