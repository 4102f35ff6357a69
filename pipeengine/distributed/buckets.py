"""What the replicas exchange, laid out: which copies there are, who updates which, and which travel together."""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

BUCKET_BYTES = 25 << 20


@dataclass(frozen=True)
class Copies:
    """A parameter or buffer and the workers that hold it, ascending. ``stage`` is the only stage that reads it, -1
    where there are several."""

    name: str
    workers: tuple[int, ...]
    stage: int


@dataclass(frozen=True)
class Bucket:
    """Parameters of one dtype that the same ``workers`` hold, one after the other in one flat tensor.

    ``cuts`` are the positions, one more than there are workers, between which each worker has its share of the sum.
    ``starts[i]`` is where parameter i begins. Shares are of equal length, unless whole parameters were dealt.
    """

    workers: tuple[int, ...]
    stage: int
    dtype: torch.dtype
    names: tuple[str, ...]
    starts: tuple[int, ...]
    cuts: tuple[int, ...]

    def share(self, member: int) -> int:
        """Entries in the share of the worker that is number ``member`` among those of this bucket."""
        return self.cuts[member + 1] - self.cuts[member]

    def pieces(self, number: int, length: int) -> Iterable[tuple[int, int, int]]:
        """Where parameter ``number``, of ``length`` entries, lies: (member, first and last position in the flat
        tensor)."""
        begin, end = self.starts[number], self.starts[number] + length
        for member, (low, high) in enumerate(pairwise(self.cuts)):
            if max(begin, low) < min(end, high):
                yield member, max(begin, low), min(end, high)


def deal(copies: Sequence[Copies], sizes: Mapping[str, int]) -> dict[str, int]:
    """The worker that updates each parameter: the largest first, to the holder with the fewest entries so far.

    Longest processing time first (Graham, SIAM J. Appl. Math. 1969): the fullest worker has at most 4/3 of the least
    possible where all hold the same.
    """
    load: dict[int, int] = {}
    owner = {}
    for one in sorted(copies, key=lambda one: (-sizes[one.name], one.name)):
        chosen = min(one.workers, key=lambda worker: (load.get(worker, 0), worker))
        load[chosen] = load.get(chosen, 0) + sizes[one.name]
        owner[one.name] = chosen
    return owner


def make_buckets(copies: Sequence[Copies], tensors: Mapping[str, torch.Tensor], owner: Mapping[str, int] | None,
                 most: int = BUCKET_BYTES) -> tuple[Bucket, ...]:
    """Buckets of up to ``most`` bytes (a larger parameter has one of its own), in an order that all workers share.

    With ``owner`` each parameter's sum goes whole to its owner, else each worker has an equal share of the bucket.
    """
    alike: dict[tuple, list[str]] = {}
    for one in copies:
        alike.setdefault((one.stage, one.workers, str(tensors[one.name].dtype)), []).append(one.name)
    buckets = []
    for (stage, workers, _), names in sorted(alike.items()):
        for together in within(names, tensors, most):
            if owner is not None:
                together = sorted(together, key=lambda name: workers.index(owner[name]))
            lengths = [tensors[name].numel() for name in together]
            buckets.append(Bucket(workers, stage, tensors[together[0]].dtype, tuple(together),
                                  tuple(accumulate(lengths, initial=0))[:-1],
                                  _cuts(together, lengths, workers, owner)))
    return tuple(buckets)


def within(names: Sequence[str], tensors: Mapping[str, torch.Tensor], most: int) -> Iterable[list[str]]:
    """``names`` in runs of at most ``most`` bytes, in their order."""
    run: list[str] = []
    size = 0
    for name in names:
        more = tensors[name].numel() * tensors[name].element_size()
        if run and size + more > most:
            yield run
            run, size = [], 0
        run.append(name)
        size += more
    if run:
        yield run


def _cuts(names: Sequence[str], lengths: Sequence[int], workers: tuple[int, ...],
          owner: Mapping[str, int] | None) -> tuple[int, ...]:
    if owner is None:
        equal = -(-sum(lengths) // len(workers))
        return tuple(equal * member for member in range(len(workers) + 1))
    shares = [sum(length for name, length in zip(names, lengths) if owner[name] == worker) for worker in workers]
    return tuple(accumulate(shares, initial=0))
