"""What to change first, from the numbers of a report."""
from __future__ import annotations

import numpy as np

from partitioners.units import format_seconds, format_share
from pipeengine.report.run_report import RunReport
from pipeengine.simulation import Timeline

# What handing a result to another process of the same machine takes, with what both of them spend on it, in seconds.
# Stages that differ by less per micro-batch are even.
_HANDOVER = 5e-4
_UNEVEN, _IDLE, _HELD_UP = 1.1, 0.15, 2.0


def advice(report: RunReport) -> list[str]:
    """What to change first, from the numbers at hand."""
    name, timeline = ("measured", report.measured) if report.measured else ("predicted", report.predicted)
    if timeline is None or timeline.num_workers < 2 or not timeline.makespan:
        return []
    return _advice_in_turns(report, name) if report.in_turns else _advice_apart(report, name, timeline)


def _advice_in_turns(report: RunReport, name: str) -> list[str]:
    """Only the work of the stages says anything here; it is added up for the workers that would have them."""
    seconds = [getattr(row, f"{name}_seconds") or 0.0 for row in report.rows]
    busy = np.bincount([row.worker for row in report.rows], seconds)
    worst, least = int(busy.argmax()), int(busy.argmin())
    lines = [
        f"most work: stages of worker {worst} with {format_seconds(busy[worst])} {name}; least: those of worker "
        f"{least} with {format_seconds(busy[least])}"
    ]
    if busy[worst] - busy.mean() > max((_UNEVEN - 1) * busy.mean(), _HANDOVER * report.num_microbatches):
        lines.append(_uneven(worst, busy).replace("has", "would have", 1))
    return lines + ["only a run with one process per worker (torchrun) shows how long workers wait for each other"]


def _advice_apart(report: RunReport, name: str, timeline: Timeline) -> list[str]:
    busy, idle = timeline.busy, timeline.idle_share
    worst, least = int(busy.argmax()), int(busy.argmin())
    lines = [f"busiest: worker {worst} with {format_seconds(busy[worst])} of the {name} "
             f"{format_seconds(timeline.makespan)}; least busy: worker {least} with {format_seconds(busy[least])}"]
    # Fill and drain of any schedule are at most as long as GPipe's.
    explained = busy[worst] * (1 + (timeline.num_workers - 1) / max(timeline.num_microbatches, 1))
    if timeline.makespan > _HELD_UP * explained:
        lines.append(_held_up(report, timeline, explained))
    elif busy[worst] > _UNEVEN * busy.mean():
        lines.append(_uneven(worst, busy))
    elif idle.min() > _IDLE:
        lines.append(f"even the busiest worker idles {format_share(idle.min(), 0)}: more micro-batches than "
                     f"{report.num_microbatches}, or a schedule with smaller bubbles, would help")
    return lines


def _uneven(worst: int, busy: np.ndarray) -> str:
    return (
        f"worker {worst} has {busy[worst] / busy.mean():.2f} times the mean work: plan again with measured costs, or "
        f"open the "
        "modules of its stage"
    )


def _held_up(report: RunReport, timeline: Timeline, explained: float) -> str:
    """What to do when neither the balance of the stages nor the schedule explains the length of a step."""
    action = timeline.busy.sum() / max(np.count_nonzero(timeline.computes), 1)
    text = (f"messages and overhead dominate: work and schedule explain {format_seconds(explained)} of the "
            f"{format_seconds(timeline.makespan)}; ")
    if action > 2 * _HANDOVER:
        return text + (
            f"an action takes {format_seconds(action)}, much more than handing over its result should: look at the "
            "links, and at what else the machines do"
        )
    fewer = (
        f"micro-batches of more rows (fewer than {report.num_microbatches}), " if report.num_microbatches > 1 else ""
    )
    return text + (f"the stages are too small: an action takes {format_seconds(action)}, handing over its result some "
                   f"{format_seconds(_HANDOVER)}; {fewer}larger batches or fewer stages would help")
