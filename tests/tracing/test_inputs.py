"""What a forward is called with, and where the loss is in its answer."""
from collections import OrderedDict, namedtuple
from functools import partial

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from pipeengine.errors import CaptureError
from pipeengine.tracing.inputs import Inputs, find_loss, loss_of, needs_target, usable_loss

LOSS, LOGITS, COUNT = torch.tensor(2.5), torch.ones(3, 4), torch.tensor(7)
Answer = namedtuple("Answer", "logits loss")


@pytest.mark.parametrize("example, args, kwargs", [
    ({"x": LOGITS, "mask": None}, (), {"x": LOGITS, "mask": None}),
    (OrderedDict(x=LOGITS), (), {"x": LOGITS}),
    ((LOGITS, 3), (LOGITS, 3), {}), ([LOGITS], (LOGITS,), {}), (LOGITS, (LOGITS,), {}), ((), (), {})])
def test_a_dict_is_keywords_a_tuple_positions_and_a_tensor_one_position(example, args, kwargs):
    inputs = Inputs.of(example, target="answer")
    assert (inputs.args, inputs.kwargs, inputs.target) == (args, kwargs, "answer")
    assert inputs.everything() == (args, kwargs, "answer")
    if isinstance(example, dict):
        assert inputs.kwargs is not example, "the user's dict stays the user's"


@pytest.mark.parametrize("output", [
    LOSS, {"loss": LOSS, "logits": LOGITS}, CausalLMOutput(loss=LOSS, logits=LOGITS), Answer(LOGITS, LOSS),
    (LOGITS, LOSS), (COUNT, LOSS, torch.tensor(1.0)), [LOSS], (None, "text", LOSS)])
def test_a_models_own_loss_is_found(output):
    assert find_loss(output) is LOSS


@pytest.mark.parametrize("output", [
    LOGITS, COUNT, None, {"logits": LOGITS}, {"loss": None}, {"loss": LOGITS}, {"loss": 2.5},
    CausalLMOutput(logits=LOGITS), (LOGITS, COUNT), (), "loss", torch.ones(1)])
def test_what_is_no_loss_is_not_taken_for_one(output):
    """A count is no loss, nor is a vector of one element, a Python number, or a tensor that is not there."""
    assert find_loss(output) is None


def two(output, target):
    return (output - target).square().mean()


def one(output):
    return output.mean()


def optional(output, target=None):
    return output.mean() if target is None else two(output, target)


class Module(nn.Module):
    def forward(self, output, target):
        return two(output, target)


class Callable:
    def __call__(self, output, target, *, weight=1.0):
        return weight * two(output, target)


@pytest.mark.parametrize("loss_fn, must, takes", [
    (two, True, True), (one, False, False), (optional, False, True), (Module(), True, True), (nn.MSELoss(), True, True),
    (Callable(), True, True), (nn.functional.mse_loss, True, True), (partial(two, target=LOGITS), False, False),
    (lambda *everything: two(*everything), True, True), (lambda output, *, scale=2.0: scale * output.mean(), False,
                                                         False), (None, False, False)])
def test_who_needs_a_target_is_asked_of_the_signature(loss_fn, must, takes):
    assert needs_target(loss_fn) == must
    without, with_one = Inputs((), {}), Inputs((), {}, LOGITS)
    assert usable_loss(loss_fn, without) is (None if must else loss_fn)
    assert usable_loss(loss_fn, with_one) is loss_fn
    if takes:
        assert loss_of(loss_fn, 3 * LOGITS, LOGITS) == 4.0
    elif loss_fn is not None:
        assert loss_of(loss_fn, LOGITS, LOGITS).dim() == 0


def test_without_a_loss_function_it_is_the_models_own():
    assert loss_of(None, {"loss": LOSS}, LOGITS) is LOSS and loss_of(None, LOGITS, LOGITS) is None


@pytest.mark.parametrize("answer", [{"loss": LOSS, "accuracy": 0.5}, (LOSS, {"accuracy": 0.5}), Answer(LOGITS, LOSS)])
def test_a_loss_function_may_answer_with_more(answer):
    assert loss_of(lambda output: answer, LOGITS, None) is LOSS


def test_one_number_of_any_shape_is_a_loss_functions_loss():
    """``reduction="sum"`` over a column returns shape (1,), as do many hand-written losses."""
    answer = torch.ones(1, 1)
    assert loss_of(lambda output: answer, LOGITS, None) is answer


@pytest.mark.parametrize("answer, said", [
    (LOGITS, r"returned a torch.float32 tensor of shape \(3, 4\); return one number"),
    ({"logits": LOGITS, "extra": 1}, "returned a dict with logits, extra, in which there is no loss"),
    ((LOGITS, 3), "returned a tuple, in which there is no loss: return a scalar tensor"),
    (2.5, "returned a float"), (None, "returned a NoneType")])
def test_an_answer_without_a_loss_is_refused_with_what_it_was(answer, said):
    with pytest.raises(CaptureError, match=said):
        loss_of(lambda output: answer, LOGITS, None)
