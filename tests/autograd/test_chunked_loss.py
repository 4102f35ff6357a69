"""A cross-entropy in chunks is torch's own of all logits, in less memory, and the plan knows."""
import copy
import itertools

import pytest
import torch
from live import live
from torch import nn
from torch.nn import functional as F

import pipeengine as pe

ROWS, TIME, WIDTH, CLASSES, IGNORED = 5, 7, 16, 33, -100


def truth(hidden, weight, targets, *, bias=None, reduction="mean", **settings):
    logits = F.linear(hidden, weight, bias).flatten(0, -2)
    loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets.flatten(),
                           reduction=reduction, **settings)
    return loss.view(targets.shape) if reduction == "none" else loss


def results(loss_function, tensors, targets, autocast=False, **settings) -> list[torch.Tensor]:
    """Loss, and the gradients of hidden, weight and bias, of a loss that counts by another number for each row."""
    hidden, weight, bias = (None if one is None else one.clone().requires_grad_() for one in tensors)
    with torch.autocast("cpu", torch.bfloat16, autocast):
        loss = loss_function(hidden, weight, targets, bias=bias, **settings)
    loss.backward(torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape))
    return [loss.detach(), *(one.grad for one in (hidden, weight, bias) if one is not None)]


def made_up(kind: torch.dtype, with_bias: bool) -> tuple[tuple, torch.Tensor]:
    torch.manual_seed(0)
    targets = torch.randint(CLASSES, (ROWS, TIME))
    targets[0, :4] = targets[3] = IGNORED
    tensors = (torch.randn(ROWS, TIME, WIDTH, dtype=kind), torch.randn(CLASSES, WIDTH, dtype=kind),
               torch.randn(CLASSES, dtype=kind) if with_bias else None)
    return tensors, targets


@pytest.mark.parametrize("kind, autocast, tolerance", [
    (torch.float64, False, 1e-12), (torch.float32, False, 1e-6), (torch.float32, True, 1e-2),
    (torch.bfloat16, False, 1e-2)], ids=["float64", "float32", "autocast", "bfloat16"])
def test_loss_and_gradients_are_those_of_all_logits(kind, autocast, tolerance):
    for reduction, smoothing, with_bias, chunk_rows in itertools.product(
            ("mean", "sum", "none"), (0.0, 0.1), (False, True), (1, 8, 1000)):
        tensors, targets = made_up(kind, with_bias)
        settings = dict(reduction=reduction, label_smoothing=smoothing, ignore_index=IGNORED)
        expected = results(truth, tensors, targets, autocast, **settings)
        ours = results(pe.chunked_cross_entropy, tensors, targets, autocast, **settings, chunk_rows=chunk_rows)
        for one, other in zip(ours, expected, strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance * float(other.abs().max()))


def test_without_a_target_that_counts_it_is_what_torch_says():
    (hidden, weight, _), targets = made_up(torch.float64, False)
    targets[:] = IGNORED
    for smoothing in (0.0, 0.1):
        ours = results(pe.chunked_cross_entropy, (hidden, weight, None), targets, label_smoothing=smoothing)
        expected = results(truth, (hidden, weight, None), targets, label_smoothing=smoothing)
        assert all(torch.equal(one.nan_to_num(7), other.nan_to_num(7)) for one, other in zip(ours, expected))


def test_a_frozen_head_gets_no_gradient():
    (hidden, weight, _), targets = made_up(torch.float32, False)
    twin = hidden.clone().requires_grad_()
    hidden.requires_grad_()
    pe.chunked_cross_entropy(hidden, weight, targets).backward()
    truth(twin, weight, targets).backward()
    assert weight.grad is None
    torch.testing.assert_close(hidden.grad, twin.grad)


@pytest.mark.parametrize("change, words", [
    (dict(targets=torch.zeros(3, dtype=torch.long)), "targets of shape (3,)"), (dict(chunk_rows=0), "chunk_rows is 0"),
    (dict(weight=torch.zeros(3, 9)), "weight of shape (3, 9)"), (dict(reduction="max"), "one of mean, sum, none"),
    (dict(bias=torch.zeros(9)), "a bias of shape (9,)"), (dict(label_smoothing=2.0), "label_smoothing is 2.0")])
def test_what_does_not_fit_is_said(change, words):
    (hidden, weight, _), targets = made_up(torch.float32, False)
    with pytest.raises(pe.InputError) as error:
        pe.chunked_cross_entropy(**{**dict(hidden=hidden, weight=weight, targets=targets), **change})
    assert words in str(error.value)


# ---------------------------------------------------------------------------------------------------- in a pipeline

class Words(nn.Module):
    """A few layers under a vocabulary that outweighs them."""

    def __init__(self, in_chunks: bool, vocabulary: int = 4000):
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocabulary, 64), nn.Linear(64, vocabulary, bias=False)
        self.body, self.in_chunks = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(4))), \
            in_chunks

    def forward(self, tokens, targets):
        hidden = self.body(self.embedding(tokens))
        if self.in_chunks:
            return pe.chunked_cross_entropy(hidden, self.head.weight, targets, chunk_rows=64)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten())


def batch_of(rows: int = 8, length: int = 128) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    tokens = torch.randint(4000, (rows, length))
    targets = tokens.clone()
    targets[:3, length // 5:] = IGNORED         # the first micro-batches have far fewer targets than the others
    return dict(tokens=tokens, targets=targets)


def pipeline(model: nn.Module, batch: dict, schedule: str, num_stages: int) -> pe.Pipeline:
    return pe.Pipeline(model, batch, num_microbatches=4, num_stages=num_stages, schedule=schedule, costs="analytic",
                       check=False)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1"])
def test_the_peak_of_a_step_is_lower_and_as_predicted(schedule):
    torch.set_num_threads(1)
    batch, peaks, last = batch_of(), [], []
    for in_chunks in (False, True):
        pipe = pipeline(Words(in_chunks), batch, schedule, 1)
        pipe.step(**batch)
        for parameter in pipe.parameters():
            parameter.grad = None
        peaks.append(live(lambda: pipe.step(**batch)).peak)
        assert peaks[-1] == pytest.approx(pipe.predicted_timeline().peak_bytes[0], rel=0.1)
        last.append(pipeline(Words(in_chunks), batch, schedule, 2).predicted_timeline().peak_bytes[-1])
    assert 2 * peaks[1] < peaks[0] and 2 * last[1] < last[0]


def test_uneven_targets_weigh_as_in_one_process():
    """Of a mean over targets that count, micro-batches have shares as their targets, not as their rows."""
    batch, model = batch_of(), Words(True)
    plain = Words(False)
    plain.load_state_dict(model.state_dict())
    loss = plain(**batch)
    loss.backward()
    torch.testing.assert_close(pipeline(model, batch, "zb-h1", 3).step(**batch), loss.detach())
    for name, parameter in plain.named_parameters():
        found = model.get_parameter(name).grad
        torch.testing.assert_close(found, parameter.grad, rtol=0, atol=1e-6 * float(parameter.grad.abs().max()))


class CausalLM(nn.Module):
    """A causal language model of Hugging Face whose loss never sees all logits, as the docs have it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids, labels, attention_mask=None):
        hidden = self.model.base_model(input_ids, attention_mask=attention_mask).last_hidden_state
        head = self.model.get_output_embeddings()
        return pe.chunked_cross_entropy(hidden[:, :-1], head.weight, labels[:, 1:], bias=head.bias)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_hugging_face_models_train_as_with_their_own_loss(name):
    """GPT-2's embedding is its head, tied over two stages; rows are padded unevenly."""
    import zoo
    plain = zoo.hugging_face(name).build()
    torch.manual_seed(0)
    tokens = torch.randint(3, zoo.VOCAB, (6, 12))
    mask = torch.ones_like(tokens)
    mask[:2, 5:] = 0
    batch = dict(input_ids=tokens, labels=tokens.masked_fill(mask == 0, IGNORED), attention_mask=mask)
    model = CausalLM(copy.deepcopy(plain))
    pipe = pe.Pipeline(model, batch, num_microbatches=3, num_stages=2, costs="analytic")
    loss = plain(**batch).loss
    loss.backward()
    torch.testing.assert_close(pipe.step(**batch), loss.detach())
    for name, parameter in plain.named_parameters():
        found = model.model.get_parameter(name).grad
        torch.testing.assert_close(found, parameter.grad, rtol=0, atol=2e-6 * float(parameter.grad.abs().max()))
