"""A keyed permutation: a bijection for every size, as evenly spread as a list that is shuffled."""
import itertools
import math
import time
from collections import Counter

import numpy
import pytest
from scipy import stats

from pipeengine.data import Permutation


def order(size: int, key: int) -> numpy.ndarray:
    return Permutation(size, key)(numpy.arange(size))


def test_it_is_a_bijection_for_every_size():
    for size in (*range(1, 260), 511, 512, 513, 999, 4097, 10_007):
        assert numpy.array_equal(numpy.sort(order(size, key=size)), numpy.arange(size)), size


def test_a_large_one_has_no_two_alike():
    size = 10**9
    images = Permutation(size, 5)(numpy.arange(10**6, 10**6 + 200_000))
    assert images.min() >= 0 and images.max() < size and len(numpy.unique(images)) == 200_000
    assert stats.kstest(images / size, "uniform").pvalue > 1e-3


def test_it_is_the_same_however_it_is_asked():
    whole = order(1000, 3)
    assert [int(Permutation(1000, 3)(numpy.array([i]))[0]) for i in range(0, 1000, 37)] == whole[::37].tolist()
    assert numpy.array_equal(Permutation(1000, 3)(numpy.arange(1000).reshape(10, 100)), whole.reshape(10, 100))
    assert not numpy.array_equal(whole, order(1000, 4))


@pytest.mark.parametrize("size", (3, 4, 5))
def test_every_order_of_a_few_comes_as_often(size):
    """Chi-square over all size! orders, on average at least 30 of each."""
    counts = Counter(tuple(order(size, key).tolist()) for key in range(3600))
    observed = [counts[perm] for perm in itertools.permutations(range(size))]
    assert sum(observed) == 3600 and stats.chisquare(observed).pvalue > 1e-3


@pytest.mark.parametrize("size", (6, 9, 12, 31))
def test_every_place_goes_everywhere_as_often(size):
    """Chi-square over (place, image), and over where two neighbours go together; 2,000 keys."""
    orders = numpy.stack([order(size, key) for key in range(2000)])
    for place in range(size):
        counts = numpy.bincount(orders[:, place], minlength=size)
        assert stats.chisquare(counts).pvalue > 1e-4, place
    pairs = numpy.bincount(orders[:, 0] * size + orders[:, 1], minlength=size * size).reshape(size, size)
    apart = pairs[~numpy.eye(size, dtype=bool)]
    assert pairs.trace() == 0 and stats.chisquare(apart).pvalue > 1e-4


def test_fixed_points_are_as_many_as_of_a_shuffled_list():
    """Their number is Poisson with mean 1 in the limit; so is that of neighbours that stay neighbours."""
    fixed = [int((order(400, key) == numpy.arange(400)).sum()) for key in range(1500)]
    successions = [int((numpy.diff(order(400, key)) == 1).sum()) for key in range(1500)]
    for counts in (fixed, successions):
        observed = [counts.count(k) for k in range(4)] + [sum(c > 3 for c in counts)]
        expected = [1500 * math.exp(-1) / math.factorial(k) for k in range(4)]
        assert stats.chisquare(observed, [*expected, 1500 - sum(expected)]).pvalue > 1e-4


def test_neighbouring_keys_have_nothing_in_common():
    a, b = order(5000, 100), order(5000, 101)
    assert abs(stats.spearmanr(a, b).statistic) < 0.06 and abs(stats.spearmanr(a, range(5000)).statistic) < 0.06


def test_any_place_among_very_many_is_reached_at_once():
    start = time.perf_counter()
    Permutation(2**62, 1)(numpy.array([2**62 - 1]))
    assert time.perf_counter() - start < 1, "a list of that length would take years"
