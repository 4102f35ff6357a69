"""A step whose gradients are not finite somewhere is skipped by every worker alike, and scaled training is that of one
process."""
import warnings
from functools import cache

import half_precision
import pytest
import torch
import zoo
from reference import gradients, reference_parts, split_batch, worst_difference
from workers import launch

import pipeengine as pe
from pipeengine.runtime import Executor, scale_of

pytestmark = pytest.mark.usefixtures("quiet")
MICROBATCHES, STEPS = 2, 6
CASE = zoo.hugging_face("gpt2")


def scaler(growth_interval: int = 3, **options) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0 ** 24, growth_interval=growth_interval, **options)


def make(replicas: int, shard: str | None, schedule: str = "1f1b", **options) -> tuple[torch.nn.Module, pe.Pipeline]:
    model, batch = CASE.build(), CASE.batches[0]
    example = {key: value[:8 // replicas] for key, value in batch.items()}
    return model, pe.Pipeline(model, example, num_microbatches=MICROBATCHES, costs="analytic", check=False,
                              num_replicas=replicas, shard=shard, schedule=schedule, **options)


@cache
def truth(replicas: int) -> tuple[list, list, dict]:
    """The same in one process: losses, scales and the weights in the end."""
    model, grad_scaler = CASE.build(), scaler()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parts = split_batch(CASE.batches[0], replicas * MICROBATCHES)
    losses, scales = [], []
    for _ in range(STEPS):
        total = 0.0
        for part in parts:
            with torch.autocast("cpu", torch.float16):
                loss = model(**part).loss / len(parts)
            grad_scaler.scale(loss).backward()
            total += float(loss)
        grad_scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        grad_scaler.step(optimizer)
        grad_scaler.update()
        optimizer.zero_grad()
        losses.append(total)
        scales.append(grad_scaler.get_scale())
    return losses, scales, {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_is_truth(found: tuple[list, list], weights: dict, replicas: int) -> None:
    losses, scales, expected = truth(replicas)
    assert found[1] == scales and min(scales) < 2.0 ** 24, "some steps overflow, the same ones as in one process"
    assert found[0] == pytest.approx(losses, rel=1e-3)
    assert worst_difference(expected, weights)[0] < 2e-3          # float16 has 11 bits


@pytest.mark.parametrize("schedule", ("1f1b", "zb-h1"))
def test_half_precision_is_that_of_one_process(schedule):
    model, pipe = make(1, None, schedule, num_stages=2)
    optimizer, grad_scaler = torch.optim.SGD(pipe.parameters(), lr=0.1), scaler()
    found = half_precision.train(pipe, CASE.batches[0], optimizer, grad_scaler, STEPS)
    assert_is_truth(found, {name: p.detach() for name, p in model.named_parameters()}, 1)


def test_scaled_gradients_are_the_gradients_times_the_scale():
    model, pipe = make(1, None, num_stages=2)
    loss = pipe.step(**CASE.batches[0], scaler=scaler())
    other = CASE.build()
    expected = reference_parts(other, split_batch(CASE.batches[0], MICROBATCHES))
    assert float(loss) == pytest.approx(float(expected), rel=1e-6), "the loss itself is not scaled"
    unscaled = {name: grad / 2.0 ** 24 for name, grad in gradients(model).items()}
    assert worst_difference(gradients(other), unscaled)[0] < 1e-6


def test_what_is_no_scaler_is_refused_and_a_disabled_one_does_nothing():
    model, pipe = make(1, None, num_stages=2)
    with pytest.raises(pe.InputError, match="GradScaler"):
        pipe.step(**CASE.batches[0], scaler=3.0)
    assert scale_of(scaler(enabled=False), torch.device("cpu")) is None and Executor
    pipe.step(**CASE.batches[0])
    plain = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    pipe.step(**CASE.batches[0], scaler=scaler(enabled=False))
    assert worst_difference(plain, gradients(model))[0] == 0.0


def test_the_norm_says_alike_that_a_step_is_to_be_skipped():
    """Without a scaler: what clipping returns is not finite where some gradient is not."""
    model, pipe = make(1, None, num_stages=2)
    for bad in (float("nan"), float("inf"), -float("inf")):
        pipe.step(**CASE.batches[0])
        next(pipe.parameters()).grad.view(-1)[3] = bad
        assert not pipe.clip_grad_norm_(1.0).isfinite()
        model.zero_grad()


def test_a_scaler_is_checkpointed(tmp_path):
    model, pipe = make(1, None, num_stages=2)
    optimizer, grad_scaler = torch.optim.SGD(pipe.parameters(), lr=0.1), scaler()
    half_precision.train(pipe, CASE.batches[0], optimizer, grad_scaler, STEPS)
    pe.Checkpoints(tmp_path, pipe, optimizer=optimizer, scaler=grad_scaler, background=False).save(STEPS)
    other = scaler()
    pe.Checkpoints(tmp_path, pipe, optimizer=optimizer, scaler=other).load()
    assert other.state_dict() == grad_scaler.state_dict() and other.get_scale() < 2.0 ** 24


# ------------------------------------------------------------------------------------------------------ among workers

BAD = {"nan": float("nan"), "inf": float("inf"), "overflow": 3e38}


def faulty(report, replicas: int, shard: str | None, steps: int) -> None:
    """In each step one value of one gradient in one worker is bad; then half precision, and scales that differ."""
    warnings.simplefilter("ignore")
    model, pipe = make(replicas, shard)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mine = {key: value.tensor_split(replicas)[pipe.replica] for key, value in CASE.batches[0].items()}
    turn: dict[str, object] = {}

    def spoiling(act):
        def run(*where) -> None:
            act(*where)
            if turn["worker"] == rank and held[-1].grad is not None:
                held[-1].grad.view(-1)[-1] = BAD[turn["kind"]]
                held[-1].grad *= 4.0
        return run
    held = [p for name, p in model.named_parameters() if p.device.type != "meta" and name != "lm_head.weight"]
    actions = pipe._runner.executor._do         # before anything is summed: a hook would see the sum
    actions["B"] = spoiling(actions["B"])
    optimizer, grad_scaler = torch.optim.SGD(pipe.parameters(), lr=0.1), torch.amp.GradScaler("cpu", 2.0 ** 60)
    before = {name: p.detach().clone() for name, p in pipe.named_parameters()}
    for step in range(steps):
        turn |= {"worker": step % size, "kind": list(BAD)[step // size % len(BAD)]}
        pipe.step(**mine, scaler=grad_scaler)
        grad_scaler.unscale_(optimizer)
        pipe.clip_grad_norm_(1.0)
        grad_scaler.step(optimizer)
        grad_scaler.update()
        optimizer.zero_grad()
        assert grad_scaler.get_scale() == 2.0 ** (59 - step), f"step {step} was not skipped here"
    report("same", all(torch.equal(before[name], p) for name, p in pipe.named_parameters()))
    turn["worker"] = -1
    optimizer.zero_grad()
    grad_scaler = scaler()
    found = half_precision.train(pipe, mine, optimizer, grad_scaler, STEPS)
    pipe.verify_shared()
    report("trained", (found, {name: p.detach().clone() for name, p in pipe.named_parameters()}))
    try:
        pipe.step(**mine, scaler=torch.amp.GradScaler("cpu", 2.0 ** rank))
    except pe.InputError as error:
        report("differ", str(error))
    pipe.step(**mine)
    pipe.close()


@pytest.mark.parametrize(("replicas", "shard", "steps"), [
    (2, "optimizer", 12), pytest.param(1, None, 100, marks=pytest.mark.slow),
    pytest.param(2, None, 100, marks=pytest.mark.slow), pytest.param(2, "optimizer", 100, marks=pytest.mark.slow)])
def test_every_worker_skips_what_one_has_to(replicas, shard, steps):
    reports = launch(4, faulty, replicas, shard, steps, limit=200)
    weights: dict[str, torch.Tensor] = {}
    for report in reports:
        assert report["same"] and "a scale of" in report["differ"]
        weights |= report["trained"][1]
    for report in reports:
        assert_is_truth(report["trained"][0], weights, replicas)
