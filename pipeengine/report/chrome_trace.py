"""Timelines for Perfetto and chrome://tracing."""
from __future__ import annotations

import numpy as np

from pipeengine.simulation import OPS, Timeline


def chrome_trace(*timelines: Timeline) -> dict[str, object]:
    """Chrome's trace format, which Perfetto opens: one process per timeline, one thread per worker.

    Arrows lead from a forward to the forward of the next stage for the same micro-batch, and back from backward to
    backward (or input gradient), where the two are on different workers.
    """
    events: list[dict[str, object]] = []
    for number, timeline in enumerate(timelines):
        events.append(_meta("process_name", number, 0, timeline.name))
        for worker in range(timeline.num_workers):
            events.append(_meta("thread_name", number, 2 * worker, f"worker {worker}"))
        for worker in np.unique(timeline.worker[~timeline.computes]).tolist():
            events.append(_meta("thread_name", number, 2 * worker + 1, f"worker {worker} messages"))
        events += _events(timeline, number)
        events += _flows(timeline, number)
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


def _flows(timeline: Timeline, process: int) -> list[dict[str, object]]:
    """Arrows of micro-batches between workers: a start inside the one action, an end inside the other."""
    begin = timeline.start.min(initial=np.inf)
    at = {(OPS[op], stage, microbatch): i for i, (op, stage, microbatch) in enumerate(
        zip(timeline.op.tolist(), timeline.stage.tolist(), timeline.microbatch.tolist())) if timeline.computes[i]}
    pairs = [(i, at.get((op, stage + 1, m)) if op == "F" else at.get(("B", stage - 1, m), at.get(("I", stage - 1, m))))
             for (op, stage, m), i in at.items() if op in "FBI"]
    events: list[dict[str, object]] = []
    for number, (source, target) in enumerate(pairs):
        if target is None or timeline.worker[source] == timeline.worker[target]:
            continue
        own = {"cat": "micro-batch", "name": f"micro-batch {int(timeline.microbatch[source])}", "pid": process,
               "id": process * len(pairs) + number}
        events += [{**own, "ph": "s", "tid": 2 * int(timeline.worker[source]),
                    "ts": float(timeline.end[source] - begin) * 1e6},
                   {**own, "ph": "f", "bp": "e", "tid": 2 * int(timeline.worker[target]),
                    "ts": float(timeline.start[target] - begin) * 1e6}]
    return events
