"""All ways to make the stages of a chain: what they hold, up to every place, plain or recomputing.

Prices and needs are linear in what a stage holds (``PER_STAGE``), so a stage from place a to place b costs
``C[b] - C[a]``, and what is dear or large puts out whole ranges of places at once.
"""
from __future__ import annotations

from dataclasses import replace

import numpy as np

from pipeengine.exploration.chain import Chain, Figures

SLACK = 1e-9
Cut = tuple[tuple[int, ...], tuple[int, ...]]
"""Places of the cuts, both ends included; and for each stage the place up to which it recomputes: its start for
nothing, its end for all of it."""


def recomputing(cut: Cut) -> tuple[int, ...]:
    """The stages that recompute something."""
    return tuple(stage for stage, (start, until) in enumerate(zip(*cut)) if until > start)


def holdings(chain: Chain, recompute: str) -> tuple[np.ndarray, ...]:
    """Sums up to every place of what paths count, plain and recomputing: (7, places) each.

    A whole stage that recomputes keeps what it receives, which is left out: it depends on where the stage starts.
    """
    has_halves = chain.plain.weight_grad.any()

    def rows(figures: Figures, keeps: bool = True) -> np.ndarray:
        weight = figures.weight_grad if has_halves else figures.backward / 2
        whole = chain.sums(figures.activation_bytes)
        return np.stack([chain.sums(figures.forward), chain.sums(figures.backward - weight), chain.sums(weight),
                         chain.own_parameters, whole * keeps, chain.sums(figures.kept_bytes), whole])
    whole = replace(chain.plain, backward=chain.plain.backward + chain.plain.forward)
    again = {"stages": lambda: (rows(whole, False),), "blocks": lambda: (rows(chain.again),), "none": lambda: ()}
    return rows(chain.plain), *again[recompute]()


def range_minima(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """``min(values[starts: ends + 1])`` for every entry of ``starts`` and ``ends``; inf where that is empty."""
    length = ends.astype(np.int64) - starts + 1
    result = np.full(starts.shape, np.inf)
    some = np.nonzero(length > 0)
    if not len(some[0]):
        return result
    low, high, count = starts[some], ends[some], length[some]
    tables, span, longest = [values], 1, int(count.max())
    while 2 * span <= longest:
        before = tables[-1]
        tables.append(np.minimum(before, np.append(before[span:], np.full(span, np.inf))))
        span *= 2
    level = np.frexp(count)[1] - 1
    stacked = np.stack(tables)
    result[some] = np.minimum(stacked[level, low], stacked[level, high + 1 - (1 << level)])
    return result
