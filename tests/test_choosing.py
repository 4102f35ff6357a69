"""What is chosen where nothing was asked for."""
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from pipeengine.choosing import count_microbatches, paying_microbatches, used_microbatches
from pipeengine.options import Options
from pipeengine.runtime import BatchReader


def counted(capsys, width: int, *, asked: int | None = None, planned: int | None = None) -> tuple[int, str]:
    """How many micro-batches are taken for 12 rows on so many workers, and what worker 0 says of it."""
    options = Options(torch.nn.Linear(2, 2), (torch.zeros(12, 2),), asked, "1f1b", None, None, None, None, None, None,
                      None, None, 0, True, False)
    workers = SimpleNamespace(rank=0, grid=SimpleNamespace(width=width))
    plan = planned and SimpleNamespace(setting=SimpleNamespace(num_microbatches=planned))
    return count_microbatches(options, plan, workers, torch.device("cpu")), capsys.readouterr().err


@pytest.mark.parametrize("width, given, count, told", [
    (4, dict(asked=1), 1, ""), (4, dict(asked=1, planned=8), 1, ""), (1, {}, 1, ""), (1, dict(planned=1), 1, ""),
    (4, {}, 12, "12 micro-batches of a batch of 12 rows"), (4, dict(planned=8), 8, ""),
    (4, dict(planned=1), 1, "1 micro-batches, as the plan was made for, on 4 workers")])
def test_what_is_chosen_is_told_where_it_matters(capsys, width, given, count, told):
    chosen, text = counted(capsys, width, **given)
    assert chosen == count and (told in text if told else not text)


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


def test_more_microbatches_than_rows_are_taken_back_and_told(capsys):
    """A million micro-batches of 12 rows is a step of 12, not an order of a million."""
    options = Options(torch.nn.Linear(2, 2), (torch.zeros(12, 2),), 10**6, "1f1b", None, None, None, None, None, None,
                      None, None, 0, True, False)
    reader = BatchReader.of(options.model, torch.device("cpu"), 10**6, loss_fn=None, batch_dims=None)
    assert used_microbatches(options, reader, 0) == 12
    assert "12 micro-batches for now, one per row of the example; 1,000,000 were asked for" in capsys.readouterr().err
    assert used_microbatches(options, replace(reader, num_microbatches=4), 0) == 4 and not capsys.readouterr().err
