"""Parameters in shards: every replica holds rows of them between steps, and all of it stays one plain process."""
from functools import cache

import pytest
import torch
from reference import assert_same_step, gradients
from test_replicas import CASES, MICROBATCHES, call, four_steps, make, replica_batches, run_cases, truth
from workers import launch

import pipeengine as pe
from pipeengine.distributed import is_sharded

pytestmark = pytest.mark.usefixtures("quiet")


def one_case(name: str, schedule: str, replicas: int) -> tuple[list[tuple], int, set[str]]:
    """What ``four_steps`` are after an evaluation, of which replica, and which parameters are sharded."""
    model, pipe = make(name, schedule, "parameters", replicas)
    call(pipe.evaluate, replica_batches(name, 0, replicas)[pipe.replica])
    seen = four_steps(model, pipe, name, replicas)
    sharded = {name for name, parameter in pipe.named_parameters() if is_sharded(parameter)}
    pipe.close()
    return seen, pipe.replica, sharded


GRIDS = {(2, 1): (("gpt2", "1f1b"), ("LongSkips", "1f1b"), ("FrozenAndUnused", "1f1b")),
         (2, 2): tuple((name, "1f1b") for name in CASES) +
         tuple((name, schedule) for name in ("LongSkips", "gpt2") for schedule in (
             "gpipe", "interleaved-1f1b", "zb-h1")),
         (4, 1): (("gpt2", "1f1b"), ("FrozenAndUnused", "1f1b"), ("gpt2-dropout", "1f1b"))}


@cache
def ran(replicas: int, width: int) -> list[dict]:
    return launch(replicas * width, run_cases, one_case, replicas, GRIDS[replicas, width], limit=400)


def put_together(seen: list[tuple], number: int, replicas: int) -> dict[str, torch.Tensor]:
    """The gradients of step ``number``, of the rows of all replicas in their order."""
    merged: dict[str, torch.Tensor] = {}
    for replica in range(replicas):
        for steps, own, names in seen:
            if own == replica:
                for name, gradient in steps[number][1].items():
                    merged[name] = torch.cat([merged[name], gradient]) if name in merged and name in names else gradient
    return merged


@pytest.mark.slow
@pytest.mark.parametrize(("grid", "case"), [
    pytest.param(grid, case, id="-".join(map(str, (*grid, *case))))
    for grid, cases in GRIDS.items() for case in cases if not CASES[case[0]].random])
def test_shards_are_one_process(grid, case):
    """Two steps whose gradients add up, a short batch, a replica without a target: every gradient, put together."""
    seen = [worker.get(case, "this worker never got here") for worker in ran(*grid)]
    assert not any(isinstance(one, str) for one in seen), "\n".join(map(str, seen))
    shards = set().union(*(names for _, _, names in seen))
    assert shards, "something is sharded"
    for number, expected in enumerate(truth(case[0], grid[0])):
        merged = put_together(seen, number, grid[0])
        assert all(torch.equal(steps[number][0], seen[0][0][number][0]) for steps, _, _ in seen)
        assert_same_step(expected, (seen[0][0][number][0], merged), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("grid", ((2, 2), (4, 1)), ids=str)
def test_dropout_is_that_of_one_pipeline(grid):
    """The first step, as one pipeline with all micro-batches makes it."""
    case = CASES["gpt2-dropout"]
    model, batch = case.build(), case.batches[0]
    pipe = pe.Pipeline(model, batch, num_microbatches=grid[0] * MICROBATCHES, costs="analytic", check=False)
    loss = pipe.step(**batch)
    seen = [worker["gpt2-dropout", "1f1b"] for worker in ran(*grid)]
    assert not any(isinstance(one, str) for one in seen), seen
    assert_same_step((loss, gradients(model)), (seen[0][0][0][0], put_together(seen, 0, grid[0])), 1e-6)
