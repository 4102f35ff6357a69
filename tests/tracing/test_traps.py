"""The traps run in one plain process, the same each time, and the second batch differs from the first."""
import copy
import random
import warnings

import numpy as np
import pytest
import torch
from reference import assert_same_step, reference_step, row_weights
from traps import Trap, all_traps

TRAPS = {trap.name: trap for trap in all_traps()}


def run(trap: Trap, num_microbatches: int) -> list:
    """Both batches in turn through one fresh model."""
    model, found = trap.build(), []
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    for batch in copy.deepcopy((trap.batch, trap.second_batch)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss, grads = reference_step(model, batch, num_microbatches, row_weights(batch, num_microbatches))
        found.append((loss, {name: grad.clone() for name, grad in grads.items()}))
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    return found


@pytest.mark.parametrize("name", TRAPS)
def test_traps_run_and_repeat(name):
    """Two microbatches, twice from the start: equal, finite, and the batches tell apart."""
    first, again = run(TRAPS[name], 2), run(TRAPS[name], 2)
    for one, other in zip(first, again, strict=True):
        assert one[0].isfinite() and one[1]
        assert_same_step(one, other)
    assert first[0][0] != first[1][0]


@pytest.mark.parametrize("name", [name for name, trap in TRAPS.items() if trap.expect == "varies_or_refuse"])
def test_random_traps_vary(name):
    model, trap = TRAPS[name].build(), TRAPS[name]
    assert len({reference_step(model, trap.batch, 1, [1.0])[0].item() for _ in range(12)}) > 1
