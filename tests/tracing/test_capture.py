"""Traps: what a naive recorder gets silently wrong is exact here, or refused. And the model stays as it was."""
import copy
import random

import numpy as np
import pytest
import torch
import zoo
from reference import assert_same_step, reference_step, row_weights
from torch import nn
from traps import Trap, all_traps

import pipeengine as pe

TRAPS = {trap.name: trap for trap in all_traps()}
MICROBATCHES = 2
# A parameter that every forward changes cannot be exact while several micro-batches are in flight: refused by name.
# An LSTM over a packed sequence inside a block is refused too: the recorder cannot make up lengths for it.
REFUSED_ALL_THE_SAME = ("parameter_changed_in_place", "packed_sequence_through_a_module")
REFUSALS = (pe.CaptureError, pe.InputError, pe.PartitionError)


pytestmark = pytest.mark.usefixtures("quiet")


def set_seeds() -> None:
    torch.manual_seed(0), random.seed(0), np.random.seed(0)


def eager(trap: Trap) -> list:
    """Loss, gradients, weights and buffers after each batch, in one plain process."""
    model, found = trap.build(), []
    set_seeds()
    for batch in copy.deepcopy((trap.batch, trap.second_batch)):
        loss, grads = reference_step(model, batch, MICROBATCHES, row_weights(batch, MICROBATCHES))
        found.append((loss, {name: grad.clone() for name, grad in grads.items()}, state(model)))
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    return found


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def pipelined(trap: Trap, model: nn.Module, check: bool):
    """The same with a pipeline, one step at a time."""
    batches = copy.deepcopy((trap.batch, trap.second_batch))
    set_seeds()
    pipe = pe.Pipeline(model, batches[0], num_microbatches=MICROBATCHES, num_stages=2, costs="analytic", check=check,
                       loss_weight=lambda x, **others: len(x))
    for batch in batches:
        model.zero_grad()
        loss = pipe.step(**batch)
        yield loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, state(model)
        torch.optim.SGD(model.parameters(), lr=0.1).step()


@pytest.mark.parametrize(
    "check", (pytest.param(True, id="checked"), pytest.param(False, id="unchecked", marks=pytest.mark.slow))
)
@pytest.mark.parametrize("name", [name for name, trap in TRAPS.items() if trap.expect != "varies_or_refuse"])
def test_a_trap_is_exact_or_refused(name, check):
    """Never silently wrong: also not on the second batch, and also when the recording is not checked against eager."""
    trap, model = TRAPS[name], TRAPS[name].build()
    expected, steps = eager(trap), pipelined(trap, model, check)
    for loss, grads, buffers in expected:
        try:
            found = next(steps)
        except REFUSALS:
            assert trap.expect == "exact_or_refuse" or name.startswith(REFUSED_ALL_THE_SAME), (
                f"{name} must not be refused"
            )
            return
        assert_same_step((loss, grads), found[:2], 1e-6)
        assert buffers.keys() == found[2].keys()
        assert all(torch.equal(value, found[2][n]) for n, value in buffers.items()), "buffers differ"


@pytest.mark.parametrize("name", [name for name, trap in TRAPS.items() if trap.expect == "varies_or_refuse"])
def test_a_random_choice_is_made_again(name):
    """Repeated steps on one batch must not all give one loss."""
    trap, losses = TRAPS[name], set()
    try:
        pipe = pe.Pipeline(trap.build(), trap.batch, num_microbatches=MICROBATCHES, num_stages=2, costs="analytic")
        for _ in range(12):
            losses.add(pipe.step(**trap.batch).item())
    except REFUSALS:
        return
    assert len(losses) > 1


# ------------------------------------------------------------------------------------------- the model stays as it was

def picture(model: nn.Module) -> dict:
    """Everything that one could notice about a model, by identity where it has one."""
    found = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            found[path, name] = dict(value) if isinstance(value, dict) else value
        found[path, "class"] = type(module)
        found[path, "call"] = type(module).__call__, type(module).forward
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[name, "bits"] = tensor.detach().clone()
        found[name, "grad"] = None if tensor.grad is None else tensor.grad.clone()
        found[name, "identity"] = id(tensor), tensor.data_ptr(), tensor.requires_grad
        # buffers are put back
        found[name, "version"] = tensor._version if isinstance(tensor, nn.Parameter) else None
    return found


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a is b or a == b


def global_state() -> dict:
    numpy_state = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (numpy_state[1].tobytes(), *numpy_state[2:]),
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
        "module call": nn.Module.__call__,
        "linear": torch.nn.functional.linear,
        "hooks": len(nn.modules.module._global_forward_hooks),
        "function": vars(torch.autograd.Function).get("apply"),
    }


def decorated(case: zoo.Case) -> nn.Module:
    """The case's model with hooks, a frozen weight, a gradient and a part in evaluation mode."""
    model = case.build()
    modules = list(model.modules())
    modules[-1].register_forward_hook(lambda module, inputs, output: None)
    modules[len(modules) // 2].eval()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    model.note = ["mine"]
    return model


@pytest.mark.parametrize(
    "name",
    (
        "BatchNorms",
        "Dropouts",
        "DetachedStatistics",
        "NestedOutputs",
        "Recurrent",
        "UNet",
        "Checkpointed",
        "gpt2",
        "llama",
        "bert",
    ),
)
def test_construction_leaves_no_trace(name):
    """Modes, hooks, buffers, gradients, attributes, tensors and global state are what they were."""
    case = zoo.AWKWARD.get(name) or zoo.hugging_face(name, dropout=0.1)
    model = decorated(case)
    before, around = picture(model), global_state()
    with torch.no_grad():
        pe.Pipeline(model, case.batches[0], num_microbatches=2, num_stages=2, costs="analytic")
    after, now = picture(model), {**global_state()}
    assert all(same(before[key], after.get(key)) for key in before), [
        k for k in before if not same(before[k], after.get(k))
    ]
    assert before.keys() == after.keys(), set(after) ^ set(before)
    with torch.no_grad():
        assert not torch.is_grad_enabled()
    assert all(same(around[key], now[key]) for key in around), [k for k in around if not same(around[k], now[k])]


@pytest.mark.parametrize("costs", ("measured", "analytic"))
def test_measuring_leaves_no_trace(costs):
    case = zoo.AWKWARD["BatchNorms"]
    model = decorated(case)
    before, around = picture(model), global_state()
    pe.Pipeline(model, case.batches[0], num_microbatches=2, num_stages=2, costs=costs)
    assert same(before, picture(model)) and same(around, global_state())


@pytest.mark.parametrize("name", ("python_counter-InGlue", "memory_of_the_last_call-InBlock", "tensor_subclass-InGlue"))
def test_a_refusal_leaves_no_trace(name):
    """Refused or not, what a recording changed on the way is put back."""
    model = TRAPS[name].build()
    before, around = picture(model), global_state()
    try:
        pe.Pipeline(model, TRAPS[name].batch, num_microbatches=2, num_stages=2, costs="analytic")
    except REFUSALS:
        pass
    assert same(before, picture(model)) and same(around, global_state())


def test_a_meta_model_stays_on_meta_when_captured():
    with torch.device("meta"):
        model = zoo.hugging_face("llama").build()
    recording = pe.capture(model, zoo.hugging_face("llama").batches[0])
    assert all(p.device.type == "meta" for p in model.parameters())
    assert len(recording.nodes) > 50 and recording.loss is not None


def test_a_refusal_names_module_and_line():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            x = self.linear(x)
            return x.sum() if x.detach().sum() > 0 else -x.sum()
    with pytest.raises(pe.CaptureError, match=r"(?s)test_capture\.py:\d+.*submodule"):
        pe.Pipeline(Branches(), (torch.ones(4, 4),), num_stages=1)


def test_a_module_with_buffers_alone_may_come_first():
    """It writes to its statistics and needs no gradient: nothing is computed beside it, and nothing is refused."""
    model = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 4))
    recording = pe.capture(model, (torch.ones(8, 4),), loss_fn=lambda output, target: output.sum())
    assert [node.target for node in recording.nodes if node.is_module] == ["0", "1"] and recording.nodes[0].writes


@pytest.mark.parametrize("file", [torch.utils.checkpoint.__file__, "somebody.py"])
def test_only_torch_may_ask_where_a_tensor_comes_from(file):
    """A checkpoint of torch 2.11 looks at ``grad_fn`` of what it has made. What a model does with it stays as it was
    recorded, so a model's own question is refused."""
    space: dict = {}
    exec(compile("def grad_fn_of(tensor): return tensor.grad_fn", file, "exec"), space)

    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            y = self.linear(x)
            return y.mean() if space["grad_fn_of"](y) is not None else y.sum()
    model, x = Asks(), torch.randn(2, 4)
    if file == "somebody.py":
        with pytest.raises(pe.CaptureError, match="grad_fn|__get__"):
            pe.capture(model, (x,))
    else:
        assert [node.name for node in pe.capture(model, (x,)).nodes][-1].endswith("mean")
