"""Prices of paths and limits against the cuts that are cheapest at them, in turns: a bound."""
from __future__ import annotations

import numpy as np

from pipeengine.exploration.paths import Path
from pipeengine.exploration.relaxation import Relaxation, balance
from pipeengine.exploration.ways import Cut

_STEP = 0.3             # of the way from the best prices to those that suit the cuts so far: these alone would swing
_BALANCING = 150
WORK = 3_000            # of one balancing, about in microseconds


class Pricing:
    """The best weights of ``relaxed``'s rows so far, those of the paths adding up to 1, and the bound that they prove.

    (Kelley's cutting planes, Journal of SIAM 1960, held near the best prices so far.)
    """

    def __init__(self, relaxed: Relaxation) -> None:
        self.relaxed, self.bound, self.tables = relaxed, 0.0, 0
        self.cuts: list[Cut] = []
        self.held: list[np.ndarray] = []
        self.lengths = np.zeros((len(relaxed.paths) + len(relaxed.limits), 0))
        self.weights, self.mixture = np.zeros(0), np.zeros(0)

    def tried(self, weights: np.ndarray) -> Cut | None:
        """The cheapest cut at these weights, and its bound if that is the best; None if there is no cut."""
        weights = weights / max(float(weights[:len(self.relaxed.paths)].sum()), 1e-9)
        value, cut = self.relaxed.cheapest(weights)
        self.tables += 1
        if value > self.bound or not len(self.weights):
            self.bound, self.weights = max(self.bound, value), weights
        if cut is not None:
            self.cuts.append(cut)
            self.held.append(self.relaxed.ways.held(cut))
            self.lengths = np.column_stack((self.lengths, self.relaxed.lengths(self.held[-1])))
        return cut

    def step(self) -> Cut | None:
        """``tried`` between the best weights and those that make the cuts so far as dear as can be."""
        suited, self.mixture = balance(self.lengths, _BALANCING)
        suited = suited / max(float(suited[:len(self.relaxed.paths)].sum()), 1e-9)
        return self.tried(_STEP * suited + (1 - _STEP) * self.weights)

    def mixed(self) -> np.ndarray:
        """What the stages hold on the average of the cuts that suits the rows so far best: (stages, 7).

        The paths of a step that takes so long are those that are missing.
        """
        many = len(self.mixture)
        return np.tensordot(self.mixture, np.stack(self.held[:many]), 1) if many else self.held[-1]

    def add(self, path: Path, cutoff: float) -> None:
        """One more path to be priced."""
        self.relaxed.add(path, cutoff)
        place = len(self.relaxed.paths) - 1
        row = [float((path.counts * held).sum()) + path.fixed for held in self.held]
        self.lengths = np.insert(self.lengths, place, row, axis=0)
        self.weights = np.insert(self.weights, place, 0.0)

    def rescale(self, scale: float) -> None:
        """Weigh a limit that is just kept as so many seconds: near what the best cut takes, both sides meet soonest."""
        paths, ratio = len(self.relaxed.paths), scale / self.relaxed.scale
        self.relaxed.scale = scale
        self.lengths[paths:] *= ratio
        self.weights[paths:] /= ratio
