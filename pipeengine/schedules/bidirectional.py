"""DualPipe and its V form: two streams of micro-batches meet on every worker, one's F beside the other's B."""
from __future__ import annotations

import numpy as np

from pipeengine.errors import ScheduleError
from pipeengine.schedules.linear import at_least
from pipeengine.schedules.schedule import Lane, Schedule, Topology
from pipeengine.schedules.v_shaped import LaneBuilder


def _eight_steps(builder: LaneBuilder, workers: int, place: int, microbatches: int) -> None:
    """The published order of worker ``place`` among ``workers``, with ``microbatches`` in either stream."""
    before = workers - place - 1
    builder.append("F0", times=2 * before)
    builder.append("F0", "F1", times=place + 1)
    builder.append("I1", "W1", "F1", times=before)
    turns = microbatches - 2 * workers + place + 1
    if before == 0:
        # Where both streams meet first, nothing is there yet to run beside.
        builder.append("F0", "B1")
        builder.append_blocks("F1", "B0")
        turns -= 1
    builder.append_blocks("F0", "B1", "F1", "B0", times=turns)
    for _ in range(before):
        builder.append("B1")
        builder.append_blocks("F1", "B0")
    late: list[str] = []
    for turn, chunk in ((turn, chunk) for turn in range(place + 1) for chunk in (1, 0)):
        # Weight gradients wait from the middle of this step on.
        if late or (turn == (place + 1) // 2 and chunk == place % 2):
            late.append(f"W{chunk}")
        builder.append(f"{'I' if late else 'B'}{chunk}")
    for _ in range(before):
        builder.append(late.pop(0), "I0")
        late.append("W0")
    builder.append(*late)


def _built(builders: list[LaneBuilder]) -> tuple[tuple[Lane, ...], tuple[np.ndarray, ...]]:
    return tuple(builder.lane() for builder in builders), tuple(builder.pairs() for builder in builders)


def dualpipe(num_workers: int, num_microbatches: int) -> Schedule:
    """Micro-batches from both ends, over two copies of the model (DeepSeek-V3 technical report, 2024).

    To be checked and simulated; the engine does not run it, since each worker holds two stages' parameters::

        0  F0 F1 F2 f4 i4 w4 f5 F3 b5--- .  f6 B0--- b6--- .  f7 B1--- b7--- I2 W2 I3 W3
        1  .  F0 f4 F1 f5 F2 b4--- f6 B0--- F3 b5--- f7 B1--- b6--- B2--- .  i7 I3 w7 W3
        2  .  f4 F0 f5 F1 f6 B0--- F2 b4--- f7 B1--- F3 b5--- B2--- b6--- .  I3 i7 W3 w7
        3  f4 f5 f6 F0 I0 W0 F1 f7 B1--- .  F2 b4--- B2--- .  F3 b5--- B3--- i6 w6 i7 w7
    """
    p, m = num_workers, num_microbatches
    if p % 2 or m % 2 or m < 2 * p:
        workers, least = p + p % 2, 2 * (p + p % 2)
        raise ScheduleError("dualpipe is made for an even number of workers, and an even number of micro-batches of "
                            f"twice that or more, not {p} and {m}; the nearest that works is {workers} workers and "
                            f"{max(least, m + m % 2)} micro-batches")
    builders = []
    for r in range(p):
        place, stages, streams = r, (r, 2 * p - 1 - r), (range(m // 2), range(m // 2, m))
        if r >= p // 2:
            place, stages, streams = p - 1 - r, stages[::-1], streams[::-1]
        builder = LaneBuilder(stages, streams)
        _eight_steps(builder, p // 2, place, m // 2)
        builders.append(builder)
    return Schedule("dualpipe", Topology.bidirectional(p), m, *_built(builders))


def dualpipe_v(num_workers: int, num_microbatches: int) -> Schedule:
    """DualPipe cut in half: one copy of the parameters, on a V (Qi, Wan et al., 2025)::

        0  F0 F1 F2 f0 i0 w0 f1 F3 b1--- .  f2 B0--- b2--- .  f3 B1--- b3--- I2 W2 I3 W3
        1  .  F0 f0 F1 f1 F2 b0--- f2 B0--- F3 b1--- f3 B1--- b2--- B2--- .  i3 I3 w3 W3
    """
    at_least("dualpipe-v", 2 * num_workers, num_workers, num_microbatches)
    builders = []
    for r in range(num_workers):
        builder = LaneBuilder((r, 2 * num_workers - 1 - r), (range(num_microbatches),) * 2)
        _eight_steps(builder, num_workers, r, num_microbatches)
        builders.append(builder)
    return Schedule("dualpipe-v", Topology.v(num_workers), num_microbatches, *_built(builders))
