"""A shuffled order that is a function and not a list: where a position goes follows from a key alone."""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy

from pipeengine.rng import mix

_ROUNDS = 12
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Permutation:
    """A bijection of ``range(size)``, chosen by ``key``; needs no memory, whatever the size (up to 2**62).

    A generalised Feistel network over pairs (left, right) with left < a, right < b and a * b barely above ``size``:
    in turn each half is moved by a hash of the other, modulo its own range, which can be undone. What lands at or
    above ``size`` is sent through again until it does not (Black and Rogaway, CT-RSA 2002, sections 3 and 5).
    """

    size: int
    key: int

    def __call__(self, positions: numpy.ndarray) -> numpy.ndarray:
        """Where ``positions`` (int64, any shape, each in ``range(size)``) go; int64 of the same shape."""
        images = self._network(positions.astype(numpy.uint64))
        while (outside := images >= numpy.uint64(self.size)).any():
            images[outside] = self._network(images[outside])
        return images.astype(numpy.int64)

    def _network(self, numbers: numpy.ndarray) -> numpy.ndarray:
        wide = math.isqrt(max(self.size - 1, 0)) + 1
        narrow = -(-self.size // wide)
        left, right = numpy.divmod(numbers, numpy.uint64(narrow))
        for number in range(0, _ROUNDS, 2):
            left = (left + _hash(right, mix(self.key, number)) % numpy.uint64(wide)) % numpy.uint64(wide)
            right = (right + _hash(left, mix(self.key, number + 1)) % numpy.uint64(narrow)) % numpy.uint64(narrow)
        return left * numpy.uint64(narrow) + right


def _hash(numbers: numpy.ndarray, key: int) -> numpy.ndarray:
    """Well-mixed 64 bits of every number under ``key`` (the finaliser of splitmix64, Steele et al., OOPSLA 2014)."""
    state = (numbers + numpy.uint64(key)) * numpy.uint64(_GOLDEN)
    state = (state ^ (state >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return state ^ (state >> numpy.uint64(31))
