"""Half precision with float32 masters is plain float32 AdamW that hands out rounded weights."""
import tempfile

import pytest
import torch
import zoo
from reference import reference_step, worst_difference
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


class Failing(torch.optim.SGD):
    """Raises once it has updated its first parameter."""

    def step(self, closure=None):
        group = self.param_groups[0]
        with torch.no_grad():
            group["params"][0].sub_(group["lr"] * group["params"][0].grad)
        raise FloatingPointError("no more")


def test_a_step_that_raises_leaves_half_precision():
    """Float32 values used to stay in the model. As in plain torch, what was updated before the error is."""
    parameters = [torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = pe.keep_master_weights(Failing(parameters, lr=2.0 ** -12))
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        with pytest.raises(FloatingPointError):
            optimizer.step()
        assert all(p.dtype == p.grad.dtype == torch.bfloat16 for p in parameters)
    scheduler.step()
    assert [optimizer.state[p]["master"].tolist() for p in parameters] == [[1 - 2.0 ** -11] * 3, [1.0] * 3]


TIED = zoo.hugging_face("gpt2", tied=True)


def train_tied(report) -> None:
    torch.set_num_threads(1)
    pipe = pe.Pipeline(TIED.build().to(torch.bfloat16), TIED.batches[0], num_microbatches=2, costs="analytic",
                       check=False)
    optimizer = pe.keep_master_weights(torch.optim.AdamW(pipe.parameters(), lr=1e-3))
    for _ in range(4):
        pipe.step(**TIED.batches[0])
        optimizer.step()
        optimizer.zero_grad()
    pipe.verify_shared()
    report("weights", {name: p.detach().clone() for name, p in pipe.named_parameters()})
    report("masters", {name: optimizer.state[p]["master"] for name, p in pipe.named_parameters()})
    pipe.close()


@pytest.mark.slow
def test_tied_weights_differ_from_one_process_by_the_order_of_one_sum():
    """In bfloat16 AdamW makes a visible step of rounding where a gradient is zero but for that (biases of attention
    keys), so only a process that adds the tied gradients of its two readers as the workers do has the same weights."""
    model = TIED.build().to(torch.bfloat16)
    token = model.transformer.wte.weight
    model.lm_head.weight = torch.nn.Parameter(token.detach().clone())
    optimizer = pe.keep_master_weights(torch.optim.AdamW(model.parameters(), lr=1e-3))
    for _ in range(4):
        reference_step(model, TIED.batches[0], 2)
        token.grad = token.grad + model.lm_head.weight.grad
        model.lm_head.weight.grad = token.grad.clone()
        optimizer.step()
    for reported in launch(2, train_tied):
        for what, of in (("weights", lambda p: p.detach()), ("masters", lambda p: optimizer.state[p]["master"])):
            found = reported[what]
            expected = {name: of(p) for name, p in model.named_parameters() if name in found}
            assert worst_difference(expected, found)[0] == 0.0


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
