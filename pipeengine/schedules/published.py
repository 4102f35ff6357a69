"""Every schedule that has been published, by name: one function and one line here make a new one."""
from __future__ import annotations

from collections.abc import Callable
from inspect import signature

from pipeengine.schedules.bidirectional import dualpipe, dualpipe_v
from pipeengine.schedules.interleaved import breadth_first, interleaved_one_f_one_b, interleaved_zero_bubble
from pipeengine.schedules.linear import gpipe, one_f_one_b, zb_h1, zb_h2
from pipeengine.schedules.schedule import Schedule
from pipeengine.schedules.v_shaped import v_half, v_min, zb_v

PUBLISHED: dict[str, Callable[..., Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved-1f1b": interleaved_one_f_one_b,
    "bfs": breadth_first,
    "zb-h1": zb_h1,
    "zb-h2": zb_h2,
    "interleaved-zb": interleaved_zero_bubble,
    "zb-v": zb_v,
    "v-half": v_half,
    "v-min": v_min,
    "dualpipe": dualpipe,
    "dualpipe-v": dualpipe_v,
}


def call_schedule(function: Callable[..., Schedule], num_workers: int, num_microbatches: int,
                  **options: object) -> Schedule:
    """What ``function`` makes, given those of ``options`` that it takes and that are not None."""
    takes = signature(function).parameters
    return function(num_workers, num_microbatches,
                    **{name: value for name, value in options.items() if name in takes and value is not None})
