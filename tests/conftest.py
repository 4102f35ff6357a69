"""Fixtures that many test files use."""
import warnings

import pytest
import torch


@pytest.fixture
def quiet():
    """One thread, as the workers have (more add up in another order), no warnings, the global random state kept."""
    torch.set_num_threads(1)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def quiet_and_seeded(quiet):
    """The same, with random numbers from seed 0."""
    torch.manual_seed(0)
