"""Live tensor bytes by the allocator's events, as the profiler sees them."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Live:
    """Tensor bytes on top of those that were there before: at the end, and at the most."""
    left: int
    peak: int


def live(what: Callable[[], object]) -> Live:
    """What ``what()`` allocates and frees on the CPU; its result is dropped before the count ends."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as seen:
        what()
    events = [(e.start_ns(), e.nbytes()) for e in seen.profiler.kineto_results.events()
              if e.name() == "[memory]" and e.device_type() == torch.autograd.DeviceType.CPU]
    levels = list(accumulate(size for _, size in sorted(events, key=lambda event: event[0])))
    return Live(levels[-1] if levels else 0, max(levels, default=0))
