"""Parameters in shards: every replica holds rows of them between steps, and all of it stays one plain process."""
import traceback
import warnings
from functools import cache

import pytest
import torch
from reference import assert_same_step, gradients
from test_replicas import CASES, MICROBATCHES, call, make, replica_batches, truth, without_targets
from workers import launch

import pipeengine as pe

pytestmark = pytest.mark.usefixtures("quiet")


def whole_gradients(pipe: pe.Pipeline) -> dict[str, object]:
    """Of a shard (its own rows, where its first stands among all), of others the whole."""
    found = {}
    for name, parameter in pipe.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            found[name] = gradient.to_local().clone() if hasattr(gradient, "to_local") else gradient.clone()
    return found


def one_case(name: str, schedule: str, replicas: int) -> tuple[list[tuple], int, set[str]]:
    """(loss, gradients) of a step, of a second one on top of it, of a short one, of one without targets in the last
    replica, and an evaluation before."""
    model, pipe = make(name, schedule, "parameters", replicas)
    seen = []
    call(pipe.evaluate, replica_batches(name, 0, replicas)[pipe.replica])
    for number, keep in ((0, False), (1, True), (2, False)):
        if not keep:
            for parameter in model.parameters():
                parameter.grad = None
        loss = call(pipe.step, replica_batches(name, number, replicas)[pipe.replica])
        seen.append((loss, whole_gradients(pipe)))
    for parameter in model.parameters():
        parameter.grad = None
    batch = replica_batches(name, 1, replicas)[pipe.replica]
    loss = call(pipe.step, without_targets(batch) if pipe.replica == replicas - 1 else batch)
    seen.append((loss, whole_gradients(pipe)))
    pipe.verify_shared()
    sharded = {n for n, p in pipe.named_parameters() if hasattr(p, "to_local")}
    pipe.close()
    return seen, pipe.replica, sharded


def run_cases(report, replicas: int, cases: tuple) -> None:
    warnings.simplefilter("ignore")
    for case in cases:
        try:
            report(case, one_case(*case, replicas))
        except Exception:
            report(case, traceback.format_exc())


GRIDS = {(2, 1): (("gpt2", "1f1b"), ("LongSkips", "1f1b"), ("FrozenAndUnused", "1f1b")),
         (2, 2): tuple((name, "1f1b") for name in CASES) +
         tuple((name, schedule) for name in ("LongSkips", "gpt2") for schedule in (
             "gpipe", "interleaved-1f1b", "zb-h1")),
         (4, 1): (("gpt2", "1f1b"), ("FrozenAndUnused", "1f1b"), ("gpt2-dropout", "1f1b"))}


@cache
def ran(replicas: int, width: int) -> list[dict]:
    return launch(replicas * width, run_cases, replicas, GRIDS[replicas, width], limit=400)


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
