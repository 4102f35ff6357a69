"""Weights of micro-batches where several replicas make up the batch.

A replica knows its own micro-batches. What it has to know of the others is three numbers each: enough wherever the
loss is a mean over rows or over targets.
"""
from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from pipeengine.stages.loss_weight import Kind, Weights, as_weights


@dataclass(frozen=True)
class Totals:
    """Of one replica's batch: its ``rows``, what its micro-batches ``count`` for together (targets, or what the user's
    ``loss_weight`` says; None where that is not known), and whether ``counts`` decide, or rows alone."""

    rows: int
    counts: bool
    count: float | None

    def to_words(self) -> tuple[int, int, int]:
        """Three whole numbers of 64 bits, to be sent."""
        count = 0.0 if self.count is None else self.count
        return self.rows, self.counts + 2 * (self.count is not None), struct.unpack("<q", struct.pack("<d", count))[0]

    @classmethod
    def from_words(cls, rows: int, flags: int, count: int) -> Totals:
        """What ``to_words`` made."""
        value = struct.unpack("<d", struct.pack("<q", count))[0]
        return cls(rows, bool(flags & 1), value if flags & 2 else None)


@dataclass(frozen=True)
class Shares:
    """Of the micro-batches of one replica: their rows ``sizes``, and what each counts for (None: not known);
    ``num_terms`` of each one's loss."""

    sizes: tuple[int, ...]
    counts: tuple[float, ...] | None
    by_count: bool
    num_terms: tuple[int, ...]

    @classmethod
    def of(cls, kinds: Sequence[Kind], parts: Sequence[Sequence], sizes: Sequence[int]) -> Shares:
        """Flow, terms and counter of targets of each micro-batch; its tensors; its rows."""
        counters = [count for _, _, count in kinds]
        counts = None if None in counters else tuple(count(part) for count, part in zip(counters, parts) if count)
        return cls(tuple(sizes), counts, any(term.kind == "sum" for _, terms, _ in kinds for term in terms),
                   tuple(len(terms) for _, terms, _ in kinds))

    @property
    def totals(self) -> Totals:
        """What the other replicas have to know."""
        return Totals(sum(self.sizes), self.by_count, None if self.counts is None else float(sum(self.counts)))

    def weigh(self, everybody: Sequence[Totals]) -> Weights | None:
        """What each micro-batch's loss counts for in the loss of all replicas' batches; None where that takes the whole
        batch."""
        raw: Sequence[float] = self.sizes
        total: float = sum(one.rows for one in everybody)
        if any(one.counts for one in everybody):
            counts = [one.count for one in everybody if one.count is not None]
            if self.counts is None or len(counts) < len(everybody):
                return None
            if sum(counts):
                raw, total = self.counts, sum(counts)
        loss = [value / total for value in raw]
        return as_weights([(weight,) * max(1, count) for weight, count in zip(loss, self.num_terms)], loss)
