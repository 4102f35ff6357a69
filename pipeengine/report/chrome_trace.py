"""Timelines for Perfetto and chrome://tracing."""
from __future__ import annotations

import numpy as np

from pipeengine.simulation import OPS, Timeline


def chrome_trace(*timelines: Timeline) -> dict[str, object]:
    """Chrome's trace format, which Perfetto opens: one process per timeline, one thread per worker."""
    events: list[dict[str, object]] = []
    for number, timeline in enumerate(timelines):
        events.append(_meta("process_name", number, 0, timeline.name))
        for worker in range(timeline.num_workers):
            events.append(_meta("thread_name", number, 2 * worker, f"worker {worker}"))
        for worker in np.unique(timeline.worker[~timeline.computes]).tolist():
            events.append(_meta("thread_name", number, 2 * worker + 1, f"worker {worker} messages"))
        events += _events(timeline, number)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _meta(name: str, process: int, thread: int, value: str) -> dict[str, object]:
    return {"ph": "M", "name": name, "pid": process, "tid": thread, "args": {"name": value}}


def _events(timeline: Timeline, process: int) -> list[dict[str, object]]:
    """Complete events, in microseconds as the format asks."""
    begin = timeline.start.min(initial=np.inf)
    thread = 2 * timeline.worker + ~timeline.computes
    columns = (thread, timeline.op, timeline.stage, timeline.microbatch,
               (timeline.start - begin) * 1e6, (timeline.end - timeline.start) * 1e6)
    return [{"ph": "X", "pid": process, "tid": t, "name": OPS[op] + (str(m) if m >= 0 else ""),
             "cat": OPS[op], "ts": start, "dur": seconds, "args": {"stage": s, "microbatch": m}}
            for t, op, s, m, start, seconds in zip(*(column.tolist() for column in columns))]
