"""What is chosen where nothing was asked for."""
import pytest

from pipeengine.defaults import paying_microbatches


@pytest.mark.parametrize("rows, num_stages, expected", [
    (64, 4, 16), (16, 2, 8), (12, 2, 6), (7, 2, 7), (13, 2, 8), (3, 4, 3), (1, 8, 1), (64, 1, 1), (100, 4, 10)])
def test_microbatches_that_pay(rows, num_stages, expected):
    assert paying_microbatches(rows, num_stages) == expected


@pytest.mark.parametrize("num_stages", [2, 3, 4, 8])
def test_at_most_a_third_of_a_step_is_idle_where_rows_allow(num_stages):
    """1F1B's bubble, (K - 1) / (m + K - 1)."""
    for rows in range(2 * num_stages, 200):
        count = paying_microbatches(rows, num_stages)
        assert count <= rows and (num_stages - 1) / (count + num_stages - 1) < 1 / 3
