"""Live tensor bytes by the allocator's events, as the profiler sees them."""
from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile, record_function


@dataclass(frozen=True)
class Live:
    """Tensor bytes on top of those that were there before: at the end, at the most, and where ``mark`` was called."""
    left: int
    peak: int
    marks: dict[str, int] = field(default_factory=dict)


def mark(name: str) -> None:
    """Note what is alive at this point of what ``live`` looks at."""
    with record_function("mark " + name):
        pass


def live(what: Callable[[], object]) -> Live:
    """What ``what()`` allocates and frees on the CPU; its result is dropped before the count ends."""
    gc.collect()        # what earlier tests have left in cycles must not be freed inside
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as seen:
        what()
    events = [(e.start_ns(), e.name(), e.nbytes()) for e in seen.profiler.kineto_results.events()
              if e.name() == "[memory]" and e.device_type() == torch.autograd.DeviceType.CPU
              or e.name().startswith("mark ")]
    events.sort(key=lambda event: event[0])
    levels = list(accumulate(size if name == "[memory]" else 0 for _, name, size in events))
    marks = {name.removeprefix("mark "): level for (_, name, _), level in zip(events, levels) if name != "[memory]"}
    return Live(levels[-1] if levels else 0, max(levels, default=0), marks)
