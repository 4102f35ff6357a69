"""Moves from a cut to its neighbours: whatever is yielded is a cut of the same chain that memory allows."""
from types import SimpleNamespace

import numpy as np
import pytest

from pipeengine.exploration.neighbours import Neighbours
from pipeengine.synthesis import build


@pytest.mark.parametrize("seed", range(20))
def test_every_move_is_a_cut_of_the_chain(seed):
    """A step can be longer than what is left of the chain: once such a move was looked up outside its tables."""
    draw = np.random.default_rng(seed)
    stages, length = int(draw.integers(2, 9)), int(draw.integers(30, 400))
    start = np.sort(draw.choice(np.arange(1, length), stages - 1, replace=False))
    places = (0, *start.tolist(), length)
    last = np.maximum(np.arange(length + 1) - 1, 0)         # a stage holds one place at least
    ways = SimpleNamespace(last_start=last)
    schedule = build("1f1b", num_workers=stages, num_microbatches=4)
    near = Neighbours(SimpleNamespace(ways=ways, paths=()), schedule, None, 0.0)
    moves = list(near._moves(places, draw.random((stages, 7))))
    assert moves or stages > length // 4
    for moved in moves:
        assert moved[0] == 0 and moved[-1] == length and len(moved) == len(places) and moved != places
        assert all(a < b for a, b in zip(moved, moved[1:])), moved
