"""Timelines for Perfetto and chrome://tracing."""
from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from pipeengine.simulation import OPS, Timeline

_LEAST = 1e-9       # seconds: shorter gaps are rounding


def chrome_trace(*timelines: Timeline, step: int | None = None,
                 held: Mapping[int, tuple[float, float]] | None = None) -> dict[str, object]:
    """Chrome's trace format, which Perfetto opens: one process per timeline, one thread per worker.

    Arrows lead from a forward to the forward of the next stage for the same micro-batch, and back from backward to
    backward (or input gradient), where the two are on different workers. Between its actions a worker has a "wait" for
    what comes next. A counter per worker tells the micro-batches that it holds, and with ``held`` (of each stage the
    bytes that a micro-batch keeps from F to B or I, and from I to W) the bytes of their activations. A marker spans the
    whole, called by the number ``step``, from 0.
    """
    events: list[dict[str, object]] = []
    for number, timeline in enumerate(timelines):
        events.append(_meta("process_name", number, 0, timeline.name))
        for worker in range(timeline.num_workers):
            events.append(_meta("thread_name", number, 2 * worker, f"worker {worker}"))
        for worker in np.unique(timeline.worker[~timeline.computes]).tolist():
            events.append(_meta("thread_name", number, 2 * worker + 1, f"worker {worker} messages"))
        events.append(_meta("thread_name", number, 2 * timeline.num_workers, "steps"))
        events += [*_marker(timeline, number, step), *_events(timeline, number), *_waits(timeline, number),
                   *_counters(timeline, number, held), *_flows(timeline, number)]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _meta(name: str, process: int, thread: int, value: str) -> dict[str, object]:
    return {"ph": "M", "name": name, "pid": process, "tid": thread, "args": {"name": value}}


def _marker(timeline: Timeline, process: int, step: int | None) -> Iterator[dict[str, object]]:
    if len(timeline.end):
        yield {"ph": "X", "pid": process, "tid": 2 * timeline.num_workers, "cat": "step", "ts": 0.0,
               "dur": timeline.makespan * 1e6, "name": "a step" if step is None else f"step {step}", "args": {}}


def _events(timeline: Timeline, process: int) -> list[dict[str, object]]:
    """Complete events, in microseconds as the format asks."""
    begin = timeline.start.min(initial=np.inf)
    thread = 2 * timeline.worker + ~timeline.computes
    columns = (thread, timeline.op, timeline.stage, timeline.microbatch,
               (timeline.start - begin) * 1e6, (timeline.end - timeline.start) * 1e6)
    return [{"ph": "X", "pid": process, "tid": t, "name": OPS[op] + (str(m) if m >= 0 else ""),
             "cat": OPS[op], "ts": start, "dur": seconds, "args": {"stage": s, "microbatch": m}}
            for t, op, s, m, start, seconds in zip(*(column.tolist() for column in columns))]


def _waits(timeline: Timeline, process: int) -> Iterator[dict[str, object]]:
    """From the end of one action to the start of the next, from the step's first moment to its last."""
    begin = timeline.start.min(initial=np.inf)
    for worker in range(timeline.num_workers):
        mine = np.flatnonzero(timeline.computes & (timeline.worker == worker))
        reached = begin
        for i in mine[np.argsort(timeline.start[mine], kind="stable")].tolist():
            what = OPS[timeline.op[i]] + (str(timeline.microbatch[i]) if timeline.microbatch[i] >= 0 else "")
            yield from _wait(process, worker, begin, reached, float(timeline.start[i]), what)
            reached = max(reached, float(timeline.end[i]))
        if len(mine):
            yield from _wait(process, worker, begin, reached, float(timeline.end.max()), "the end of the step")


def _wait(process: int, worker: int, begin: float, start: float, end: float, what: str) -> Iterator[dict[str, object]]:
    if end - start > _LEAST:
        yield {"ph": "X", "pid": process, "tid": 2 * worker, "cat": "wait", "name": "wait", "ts": (start - begin) * 1e6,
               "dur": (end - start) * 1e6, "args": {"for": what}}


def _counters(timeline: Timeline, process: int, held: Mapping[int, tuple[float, float]] | None
              ) -> Iterator[dict[str, object]]:
    """What a worker keeps for backward, at every change: it is there from the start of F, and goes at the end of B or
    W; I leaves what W needs."""
    begin = timeline.start.min(initial=np.inf)
    for worker in range(timeline.num_workers):
        changes = []
        for i in np.flatnonzero(timeline.worker == worker).tolist():
            op, stage = OPS[timeline.op[i]], int(timeline.stage[i])
            activation, kept = (held or {}).get(stage, (0.0, 0.0))
            change = {"F": (1, activation), "B": (-1, -activation), "I": (0, kept - activation),
                      "W": (-1, -kept)}.get(op)
            if change is not None:
                changes.append((float(timeline.start[i] if op == "F" else timeline.end[i]), *change))
        count, size = 0, 0.0
        for time, more, more_bytes in sorted(changes):
            count, size = count + more, size + more_bytes
            values = {"micro-batches": count} | ({} if held is None else {"activation bytes": round(size, 3)})
            for name, value in values.items():
                yield {"ph": "C", "pid": process, "tid": 2 * worker, "name": f"worker {worker}: {name}",
                       "ts": (time - begin) * 1e6, "args": {name: value}}


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
