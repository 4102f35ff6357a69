"""Half precision with float32 masters is plain float32 AdamW that hands out rounded weights."""
import tempfile

import pytest
import torch
import zoo
from reference import worst_difference
from workers import launch

import pipeengine as pe

pytestmark = pytest.mark.usefixtures("quiet")
CASE = zoo.AWKWARD["LongSkips"]
BATCH = {name: value.to(torch.bfloat16) for name, value in CASE.batches[0].items()}


def make(num_stages: int | None = None) -> tuple[torch.nn.Module, pe.Pipeline, torch.optim.Optimizer]:
    model = CASE.build().to(torch.bfloat16)
    pipe = pe.Pipeline(model, BATCH, num_microbatches=2, num_stages=num_stages, costs="analytic", check=False)
    return model, pipe, pe.keep_master_weights(torch.optim.AdamW(pipe.parameters(), lr=1e-3))


def train(pipe: pe.Pipeline, optimizer, steps: int) -> None:
    for _ in range(steps):
        pipe.step(**BATCH)
        optimizer.step()
        optimizer.zero_grad()


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.device.type != "meta"}


def by_hand(steps: int) -> dict[str, torch.Tensor]:
    """The same by two models' worth of tensors: gradients in bfloat16, AdamW on float32 copies."""
    model = CASE.build().to(torch.bfloat16)
    pipe = pe.Pipeline(model, BATCH, num_microbatches=2, num_stages=2, costs="analytic", check=False)
    copies = [p.detach().float().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.AdamW(copies, lr=1e-3)
    for _ in range(steps):
        pipe.step(**BATCH)
        for copy, parameter in zip(copies, model.parameters()):
            copy.grad, parameter.grad = parameter.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            for copy, parameter in zip(copies, model.parameters()):
                parameter.copy_(copy)
    return weights(model)


def test_it_is_float32_training_bit_for_bit():
    model, pipe, optimizer = make(2)
    train(pipe, optimizer, 5)
    assert worst_difference(by_hand(5), weights(model))[0] == 0.0
    assert all(state["master"].dtype == state["exp_avg"].dtype == torch.float32 for state in optimizer.state.values())
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_a_weight_that_is_changed_elsewhere_counts():
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = pe.keep_master_weights(torch.optim.SGD([parameter], lr=2.0 ** -12))
    for _ in range(4):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    with torch.no_grad():
        parameter[0] = 7.0
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.state[parameter]["master"].tolist() == [7.0 - 2.0 ** -12, *[1.0 - 5 * 2.0 ** -12] * 2]
    with pytest.raises(pe.InputError, match="closure"):
        optimizer.step(lambda: torch.zeros(()))


def go_on(report, folder: str) -> None:
    model, pipe, optimizer = make()
    assert pe.Checkpoints(folder, pipe, optimizer=optimizer).load() == 3
    train(pipe, optimizer, 2)
    report("weights", weights(model))
    pipe.close()


def test_two_workers_go_on_where_one_process_stopped():
    with tempfile.TemporaryDirectory() as folder:
        _, pipe, optimizer = make(2)
        train(pipe, optimizer, 3)
        pe.Checkpoints(folder, pipe, optimizer=optimizer, background=False).save(3)
        found: dict[str, torch.Tensor] = {}
        for report in launch(2, go_on, folder):
            found |= report["weights"]
    assert worst_difference(by_hand(5), found)[0] == 0.0
