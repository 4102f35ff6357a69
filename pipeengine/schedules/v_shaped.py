"""Schedules on a V: worker r of p holds stage r on the way there and stage 2p - 1 - r on the way back.

So the loss is on worker 0, where the input is, and early workers need not keep more than late ones.
"""
from __future__ import annotations

from itertools import product

import numpy as np

from pipeengine.schedules.linear import at_least
from pipeengine.schedules.schedule import LETTERS, B, F, I, Lane, Schedule, Topology, W, from_keys


class LaneBuilder:
    """One worker's lane, built in order: ``append("F0")`` is the next forward of its first stage, and so on.

    ``microbatches`` are those of each of its two ``stages``, taken in turn by F, by the first half of backward and by
    the second.
    """

    def __init__(self, stages: tuple[int, int], microbatches: tuple[range, range]) -> None:
        self.stages, self.microbatches = stages, microbatches
        self.names, self.blocks = bytearray(), bytearray()

    def append(self, *names: str, times: int = 1) -> None:
        """Append the next action of each name in turn, all of that ``times`` times."""
        self.names += bytes(_NAMES.index(name) for name in names) * times
        self.blocks += bytes(len(names) * times)

    def append_blocks(self, *names: str, times: int = 1) -> None:
        """Append names by twos, each two as one block, all of that ``times`` times."""
        self.append(*names, times=times)
        self.blocks[len(self.blocks) - len(names) * times:] = bytes((1, 0)) * (len(names) * times // 2)

    def pairs(self) -> np.ndarray:
        """Boolean, one per action: whether it forms a block with the next one."""
        return np.frombuffer(bytes(self.blocks), bool)

    def lane(self) -> Lane:
        """What has been appended, as columns."""
        name = np.frombuffer(bytes(self.names), np.uint8)
        op, chunk = name >> 1, name & 1
        stage, microbatch = np.take(np.array(self.stages, np.int32), chunk), np.empty(len(name), np.int32)
        for number, batches in enumerate(self.microbatches):
            mine = chunk == number
            for letters in ((F,), (I, B), (W, B)):
                each = mine & np.isin(op, letters)
                # A fused backward counts as both of its halves.
                microbatch[each] = batches.start + np.arange(np.count_nonzero(each))
        return Lane(op, stage, microbatch)


_NAMES = tuple(letter + chunk for letter in LETTERS for chunk in "01")


def zb_v(num_workers: int, num_microbatches: int) -> Schedule:
    """No bubble when F = I = W, at 1F1B's memory (Qi et al., Zero Bubble, ICLR 2024, section on ZB-V)::

        0  F0 F1 F2 f0 i0 w0 f1 i1 w1 I0 W0 f2 i2 w2 I1 W1 I2 W2 .
        1  .  F0 f0 F1 f1 i0 w0 F2 I0 W0 f2 i1 w1 I1 i2 I2 W1 w2 W2
    """
    p, m = num_workers, num_microbatches
    at_least("zb-v", 2 * p - 1, p, m)
    lanes = []
    for r in range(p):
        builder = LaneBuilder((r, 2 * p - 1 - r), (range(m), range(m)))
        builder.append("F0", times=2 * (p - r) - 1)
        builder.append("F1", "F0", times=r)
        builder.append("F1", "I1", "W1", times=p - r)
        builder.append("F0", "I0", "W0", "F1", "I1", "W1", times=m - 2 * p + r + 1)
        builder.append("I0", "W0", "F1", "I1", "W1", times=p - 1 - r)
        builder.append("I0", "I1", times=r)
        builder.append("I0", "W0", times=p - r)
        builder.append("W1", times=r)
        builder.append("W0", times=r)
        lanes.append(builder.lane())
    return Schedule("zb-v", Topology.v(p), m, tuple(lanes))


def v_half(num_workers: int, num_microbatches: int) -> Schedule:
    """Half of 1F1B's memory (Qi et al., Controllable Memory, NeurIPS 2024)::

        0  F0 F1 .  .  .  f0 i0 w0 F2 .  f1 i1 w1 I0 W0 f2 i2 w2 I1 W1 .  .  .  I2 W2
        1  .  F0 .  .  f0 F1 .  i0 w0 f1 F2 I0 i1 w1 f2 W0 .  I1 i2 w2 W1 .  I2 W2 .
        2  .  .  F0 f0 .  .  F1 f1 i0 w0 I0 W0 F2 f2 i1 w1 I1 W1 .  i2 w2 I2 W2 .  .
    """
    return _repeated_block("v-half", num_workers, num_microbatches, 2)


def v_min(num_workers: int, num_microbatches: int) -> Schedule:
    """A third of 1F1B's memory (Qi et al., Controllable Memory, NeurIPS 2024)::

        0  F0 .  .  .  .  f0 F1 i0 w0 .  .  f1 F2 I0 i1 W0 w1 f2 .  I1 i2 W1 w2 .  .  I2 W2
        1  .  F0 .  .  f0 .  .  F1 i0 .  f1 w0 I0 F2 W0 i1 f2 w1 I1 W1 .  i2 w2 .  I2 W2 .
        2  .  .  F0 f0 .  .  .  .  F1 f1 i0 I0 W0 w0 F2 f2 i1 I1 W1 w1 .  .  i2 I2 W2 w2 .
    """
    return _repeated_block("v-min", num_workers, num_microbatches, 1)


PERIOD = 6
"""Slots per micro-batch: F, I and W of two stages."""


def _repeated_block(name: str, p: int, m: int, down: int) -> Schedule:
    """One micro-batch's actions at fixed slots, repeated every six slots: memory is the sum of lifetimes over six.

    A micro-batch moves ``down`` slots per worker on the way there, one on the way back, forward and backward.
    """
    offsets = _block(p, down)
    k, lanes = np.arange(m), []
    for r in range(p):
        stages = {0: r, 1: 2 * p - 1 - r}
        lanes.append([(op, np.full(m, stages[chunk]), k, PERIOD * k + offset)
                      for (op, chunk), offset in offsets[r].items()])
    return from_keys(name, Topology.v(p), m, lanes)


def _block(p: int, down: int) -> list[dict[tuple[int, int], int]]:
    """Slots of F, I and W of both stages on every worker: of all waits at the turns the ones with the least memory.

    No two actions of a worker may share a slot modulo the period; of those with equal memory, the shortest.
    """
    def slots(turns: tuple[int, int, int], r: int) -> dict[tuple[int, int], int]:
        f1 = (p - 1) * down + 1 + turns[0]
        i1 = f1 + p + turns[1]
        i0 = i1 + (p - 1) * down + 1 + turns[2]
        return {(F, 0): r * down, (F, 1): f1 + p - 1 - r, (I, 1): i1 + r * down, (I, 0): i0 + p - 1 - r}

    def fits(turns: tuple[int, int, int]) -> bool:
        return all(len({slot % PERIOD for slot in slots(turns, r).values()}) == 4 for r in range(min(p, PERIOD)))

    def price(turns: tuple[int, int, int]) -> tuple[int, int]:
        whole = [_with_weights(slots(turns, r)) for r in range(min(p, 2 * PERIOD))]
        return max(map(_alive, whole)), sum(turns)
    best = min(filter(fits, product(range(PERIOD), repeat=3)), key=price)
    return [_with_weights(slots(best, r)) for r in range(p)]


def _alive(slots: dict[tuple[int, int], int]) -> int:
    """Stage activations held at once, from F to W, when the block has been repeated for long."""
    late = max(slots.values())
    return max(sum((t - slots[F, chunk]) // PERIOD - (t - 1 - slots[W, chunk]) // PERIOD for chunk in (0, 1))
               for t in range(late, late + PERIOD))


def _with_weights(slots: dict[tuple[int, int], int]) -> dict[tuple[int, int], int]:
    """The two slots left go to W, each after its I, together as early as possible."""
    left = sorted(set(range(PERIOD)) - {slot % PERIOD for slot in slots.values()})

    def after(chunk: int, residue: int) -> int:
        return slots[I, chunk] + 1 + (residue - slots[I, chunk] - 1) % PERIOD
    first, second = min((left, left[::-1]), key=lambda pair: after(0, pair[0]) + after(1, pair[1]))
    return slots | {(W, 0): after(0, first), (W, 1): after(1, second)}
