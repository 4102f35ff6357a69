"""All schedules by name, and what else stands for one: text, a file, a function.

``SCHEDULES`` is the published table with ``auto`` above it.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from inspect import signature
from pathlib import Path

from pipeengine.errors import ScheduleError
from pipeengine.object_path import named
from pipeengine.program import check
from pipeengine.schedules import PUBLISHED, Schedule, call_schedule
from pipeengine.simulation import Costs
from pipeengine.synthesis.auto import auto

SCHEDULES: dict[str, Callable[..., Schedule]] = PUBLISHED | {"auto": auto}


TORCH_NAMES = {
    "ScheduleGPipe": "gpipe",
    "Schedule1F1B": "1f1b",
    "ScheduleInterleaved1F1B": "interleaved-1f1b",
    "ScheduleLoopedBFS": "bfs",
    "ScheduleInterleavedZeroBubble": "interleaved-zb",
    "ScheduleZBVZeroBubble": "zb-v",
    "ScheduleDualPipeV": "dualpipe-v",
}
"""The classes of ``torch.distributed.pipelining.schedules``, by the names that their schedules have here."""


def build(schedule: str | Callable[..., Schedule] | Schedule, *, num_workers: int, num_microbatches: int,
          stages_per_worker: int | None = None, costs: Costs | None = None,
          max_peak: float | Sequence[float] | None = None, objective: str | None = None) -> Schedule:
    """The schedule that a name, a function or a schedule stands for, for these numbers.

    A name is one of ``SCHEDULES``, or a schedule's text, a ``.csv`` file of it, or ``module:function``. A function is
    called with ``num_workers`` and ``num_microbatches``, and with ``stages_per_worker``, ``costs``, ``max_peak`` and
    ``objective`` where it takes them. What is not of ``SCHEDULES`` is checked.
    """
    if num_workers < 1 or num_microbatches < 1 or (stages_per_worker or 1) < 1:
        raise ScheduleError(
            f"{num_workers} workers, {num_microbatches} micro-batches and {stages_per_worker or 1} stages "
            "per worker; give at least one of each"
        )
    meant = find(schedule) if isinstance(schedule, str) else schedule
    if isinstance(meant, Schedule):
        return _checked(_same_numbers(meant, num_workers, num_microbatches))
    built = call_schedule(meant, num_workers, num_microbatches, stages_per_worker=stages_per_worker, costs=costs,
                          max_peak=max_peak, objective=objective)
    if meant not in SCHEDULES.values():
        built = _checked(_same_numbers(built, num_workers, num_microbatches))
    has = built.topology.num_stages // (built.topology.num_workers * built.topology.num_routes)
    if stages_per_worker not in (None, has):
        several = [name for name, known in SCHEDULES.items() if "stages_per_worker" in signature(known).parameters]
        raise ScheduleError(
            f"schedule {built.name} has {has} stages per worker, {stages_per_worker} were asked for; use "
            f"{has * num_workers} stages on {num_workers} workers, or one that takes any number: "
            f"{', '.join(several)}"
        )
    return built


def build_short(schedule: str | Callable[..., Schedule] | Schedule, *, num_workers: int, num_microbatches: int,
                **options: object) -> Schedule:
    """``build`` for a batch that may be shorter than the schedule is made for, such as the last one of an epoch.

    The order for the nearest larger number of micro-batches that works, without those that are not there.
    """
    refusal: ScheduleError | None = None
    for more in range(num_microbatches, num_microbatches + 4 * num_workers + 1):
        try:
            return build(schedule, num_workers=num_workers, num_microbatches=more, **options).keep(num_microbatches)
        except ScheduleError as error:
            refusal = refusal or error
    raise refusal


def find(text: str) -> Callable[..., Schedule] | Schedule:
    """What ``text`` stands for: a name of ``SCHEDULES``, a schedule's text or ``.csv`` file, or ``module:function``."""
    text = TORCH_NAMES.get(text, text)
    if text in SCHEDULES:
        return SCHEDULES[text]
    if re.match(r"\s*\(?\d+[FBIW]\d+\s*[,;\n]", text):
        return Schedule.from_text(text)
    if text.endswith(".csv"):
        return _from_file(Path(text))
    if ":" in text:
        own = named(text, "schedule")
        if not (callable(own) or isinstance(own, Schedule)):
            raise ScheduleError(f"{text} is {own!r}; give a function (num_workers, num_microbatches) or a Schedule")
        return own
    nearest = get_close_matches(text.lower(), SCHEDULES, 1, 0.5)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise ScheduleError(
        f"unknown schedule {text!r}; {hint}known: {', '.join(SCHEDULES)}; or give your own as a .csv file or as "
        "module:function"
    )


def _from_file(path: Path) -> Schedule:
    try:
        return Schedule.from_text(path.read_text(encoding="utf-8"), name=path.stem)
    except (OSError, UnicodeDecodeError) as error:
        raise ScheduleError(f"cannot read the schedule {path}: {error}") from error


def _checked(schedule: Schedule) -> Schedule:
    check(schedule)
    return schedule


def _same_numbers(schedule: object, num_workers: int, num_microbatches: int) -> Schedule:
    if not isinstance(schedule, Schedule):
        raise ScheduleError(f"{schedule!r} is no schedule; give a Schedule, or a function that returns one")
    has = schedule.topology.num_workers, schedule.num_microbatches
    if has != (num_workers, num_microbatches):
        raise ScheduleError(f"schedule {schedule.name} is for {has[0]} workers and {has[1]} micro-batches, the run has "
                            f"{num_workers} and {num_microbatches}; build it again for these")
    return schedule
