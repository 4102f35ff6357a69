"""Losses in many hands: a pipeline's loss and gradients are the full batch's, in whatever way the loss is written."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pipeengine as pe
from pipeengine.stages import Weights, full_batch_loss_check
from pipeengine.tracing import Inputs

ROWS, TIME, WIDTH, CLASSES = 7, 5, 6, 4  # 7 rows in 4 micro-batches: 2, 2, 2, 1


class Head(nn.Module):
    """Two layers and a loss: ``losses[way](self, logits, **inputs)``."""

    def __init__(self, way: str):
        super().__init__()
        self.below, self.above, self.way = nn.Linear(WIDTH, 8), nn.Linear(8, CLASSES), way
        self.cross_entropy, self.square = nn.CrossEntropyLoss(ignore_index=0), nn.MSELoss(reduction="sum")
        self.register_buffer("class_weights", torch.tensor([0.5, 1.0, 2.0, 3.0]))

    def forward(self, x, **inputs):
        return {"loss": LOSSES[self.way](self, self.above(torch.tanh(self.below(x))), **inputs)}


def flat(logits, labels):
    return logits.flatten(0, 1), labels.flatten()


def token_loss(logits, labels):
    return F.cross_entropy(*flat(logits, labels), reduction="none").view(labels.shape)


def added_in_place(m, o, labels, other, **_):
    loss = F.cross_entropy(*flat(o, labels), ignore_index=0)
    loss += 0.3 * F.cross_entropy(*flat(o, other), ignore_index=1)
    loss *= 2.0
    return loss


def connectionist(m, o, labels, lengths, reduction):
    steps = torch.full_like(lengths, TIME)
    return F.ctc_loss(
        o.log_softmax(-1).transpose(0, 1), labels.clamp(min=1)[:, :2], steps, lengths, reduction=reduction
    )


def of_probabilities(o, labels):
    return F.softmax(o.detach() + F.one_hot(labels, CLASSES), -1)


LOSSES = {
    "cross entropy": lambda m, o, labels, **_: F.cross_entropy(*flat(o, labels)),
    "cross entropy, ignored": lambda m, o, labels, **_: F.cross_entropy(*flat(o, labels), ignore_index=0),
    "cross entropy module": lambda m, o, labels, **_: m.cross_entropy(*flat(o, labels)),
    "cross entropy, summed": lambda m, o, labels, **_: F.cross_entropy(*flat(o, labels), reduction="sum"),
    "cross entropy, weighted": lambda m, o, labels, **_: F.cross_entropy(*flat(o, labels), weight=m.class_weights),
    "cross entropy, smoothed": lambda m, o, labels, **_: F.cross_entropy(
        *flat(o, labels), ignore_index=2, label_smoothing=0.1
    ),
    "cross entropy, smoothed and weighted": lambda m, o, labels, **_: F.cross_entropy(
        *flat(o, labels), weight=m.class_weights, ignore_index=1, label_smoothing=0.2
    ),
    "cross entropy, chunked": lambda m, o, labels, **_: pe.chunked_cross_entropy(
        o, m.above.weight[:, :CLASSES], labels, ignore_index=0, chunk_rows=3
    ),
    "cross entropy, chunked and smoothed": lambda m, o, labels, **_: pe.chunked_cross_entropy(
        o, m.above.weight[:, :CLASSES], labels, ignore_index=2, label_smoothing=0.1, chunk_rows=3
    ),
    "cross entropy with probabilities": lambda m, o, labels, **_: F.cross_entropy(
        o.flatten(0, 1), F.one_hot(labels, CLASSES).float().flatten(0, 1)
    ),
    "cross entropy over time": lambda m, o, labels, **_: F.cross_entropy(o.transpose(1, 2), labels, ignore_index=0),
    "cross entropy, scaled": lambda m, o, labels, **_: 0.25 * F.cross_entropy(*flat(o, labels), ignore_index=0) / 3,
    "negative log likelihood": lambda m, o, labels, **_: F.nll_loss(*flat(o.log_softmax(-1), labels), ignore_index=3),
    "negative log likelihood, summed": lambda m, o, labels, **_: F.nll_loss(
        *flat(o.log_softmax(-1), labels), reduction="sum"
    ),
    "by gather": lambda m, o, labels, **_: -o.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1).mean(),
    "square": lambda m, o, wanted, **_: F.mse_loss(o, wanted),
    "square, summed": lambda m, o, wanted, **_: F.mse_loss(o, wanted, reduction="sum"),
    "square module, summed": lambda m, o, wanted, **_: m.square(o, wanted),
    "square by hand": lambda m, o, wanted, **_: (o - wanted).pow(2).mean(),
    "square by hand, over rows": lambda m, o, wanted, **_: (o - wanted).pow(2).sum() / o.shape[0],
    "square by hand, over size": lambda m, o, wanted, **_: (o - wanted).pow(2).sum() / wanted.numel(),
    "square by hand, times a share": lambda m, o, wanted, **_: (o - wanted).pow(2).sum() * (1 / len(wanted)),
    "absolute, smooth": lambda m, o, wanted, **_: F.smooth_l1_loss(o, wanted) + F.l1_loss(o, wanted, reduction="sum"),
    "huber": lambda m, o, wanted, **_: F.huber_loss(o, wanted),
    "binary": lambda m, o, wanted, **_: F.binary_cross_entropy(o.sigmoid(), wanted.sigmoid()),
    "binary, summed": lambda m, o, wanted, **_: F.binary_cross_entropy_with_logits(
        o, wanted.sigmoid(), reduction="sum"
    ),
    "divergence": lambda m, o, labels, **_: F.kl_div(o.log_softmax(-1), of_probabilities(o, labels)),
    "divergence by rows": lambda m, o, labels, **_: F.kl_div(
        o.log_softmax(-1), of_probabilities(o, labels), reduction="batchmean"
    ),
    "divergence, summed": lambda m, o, labels, **_: F.kl_div(
        o.log_softmax(-1), of_probabilities(o, labels), reduction="sum"
    ),
    "connectionist": lambda m, o, labels, lengths, **_: connectionist(m, o, labels, lengths, "mean"),
    "connectionist, summed": lambda m, o, labels, lengths, **_: connectionist(m, o, labels, lengths, "sum"),
    "masked": lambda m, o, labels, mask, **_: (token_loss(o, labels) * mask).sum() / mask.sum(),
    "masked, at least one": lambda m, o, labels, mask, **_: (
        (token_loss(o, labels) * mask).sum() / mask.sum().clamp(min=1)
    ),
    "masked, maximum": lambda m, o, labels, mask, **_: (
        (token_loss(o, labels) * mask).sum() / torch.maximum(mask.sum(), torch.ones(()))
    ),
    "masked, python": lambda m, o, labels, mask, **_: (token_loss(o, labels) * mask).sum() / max(mask.sum().item(), 1),
    "masked, epsilon": lambda m, o, labels, mask, **_: (token_loss(o, labels) * mask).sum() / (mask.sum() + 1e-8),
    "masked by labels": lambda m, o, labels, **_: (token_loss(o, labels) * (labels != 0)).sum() / (labels != 0).sum(),
    "masked by index": lambda m, o, labels, mask, **_: token_loss(o, labels)[mask.bool()].mean(),
    "masked by index, of torch": lambda m, o, labels, mask, wanted, **_: F.mse_loss(
        o[mask.bool()], wanted[mask.bool()]
    ),
    "masked by select": lambda m, o, labels, mask, **_: token_loss(o, labels).masked_select(labels != 0).mul(2).mean(),
    "masked rows": lambda m, o, labels, mask, **_: (
        (token_loss(o, labels) * mask).sum(1) / mask.sum(1).clamp(min=1)
    ).mean(),
    "masked, added up in steps": lambda m, o, labels, mask, **_: (
        (token_loss(o, labels) * mask).sum(0).sum() / mask.sum(0).sum()
    ),
    "rows, then time": lambda m, o, labels, **_: token_loss(o, labels).mean(0).sum(),
    "weighted tokens": lambda m, o, labels, mask, **_: (
        (token_loss(o, labels) * m.class_weights[labels]).sum() / m.class_weights[labels].sum()
    ),
    "items, tensor": lambda m, o, labels, items, **_: (
        F.cross_entropy(*flat(o, labels), ignore_index=0, reduction="sum") / items
    ),
    "items, number": lambda m, o, labels, number, **_: (
        F.cross_entropy(*flat(o, labels), ignore_index=0, reduction="sum") / number
    ),
    "two heads": lambda m, o, labels, other, **_: (
        F.cross_entropy(*flat(o, labels), ignore_index=0) + F.cross_entropy(*flat(o, other), ignore_index=1)
    ),
    "two heads, halved": lambda m, o, labels, other, **_: (
        (F.cross_entropy(*flat(o, labels), ignore_index=0) + F.cross_entropy(*flat(o, other), ignore_index=1)) / 2
    ),
    "two heads, difference": lambda m, o, labels, other, **_: (
        F.cross_entropy(*flat(o, labels), ignore_index=0) - 0.2 * (F.cross_entropy(*flat(o, other), ignore_index=1))
    ),
    "heads in a list": lambda m, o, labels, other, wanted, **_: sum(
        [
            F.cross_entropy(*flat(o, labels), ignore_index=0),
            F.cross_entropy(*flat(o, other), ignore_index=1),
            F.mse_loss(o, wanted),
        ]
    ),
    "heads in a stack": lambda m, o, labels, other, **_: torch.stack(
        [F.cross_entropy(*flat(o, labels), ignore_index=0), F.cross_entropy(*flat(o, other), ignore_index=1)]
    ).mean(),
    "added in place": added_in_place,
    "mean and sum": lambda m, o, labels, wanted, **_: (
        F.cross_entropy(*flat(o, labels), ignore_index=0) + 0.01 * F.mse_loss(o, wanted, reduction="sum")
    ),
    "auxiliary mean": lambda m, o, labels, **_: (
        F.cross_entropy(*flat(o, labels), ignore_index=0) + 0.1 * o.pow(2).mean()
    ),
    "penalty on weights": lambda m, o, labels, **_: (
        F.cross_entropy(*flat(o, labels), ignore_index=0) + 0.1 * (m.above.weight.pow(2).sum())
    ),
    "penalty with a sum": lambda m, o, wanted, **_: (
        F.mse_loss(o, wanted, reduction="sum") + m.above.weight.abs().mean() + 0.5
    ),
    "scaled by a parameter": lambda m, o, wanted, **_: (
        m.above.bias.sum().exp() * F.mse_loss(o, wanted, reduction="sum")
    ),
    "half precision": lambda m, o, wanted, **_: F.mse_loss(o.double(), wanted.double(), reduction="sum").float(),
}
if hasattr(F, "linear_cross_entropy"):          # an older torch has none
    LOSSES |= {
        "cross entropy with a layer": lambda m, o, labels, **_: F.linear_cross_entropy(
            o.flatten(0, 1), m.above.weight[:, :CLASSES], labels.masked_fill(labels == 1, -100).flatten()
        ),
        "cross entropy with a layer, chunked": lambda m, o, labels, **_: F.linear_cross_entropy(
            o.flatten(0, 1), m.above.weight[:, :CLASSES].contiguous(), labels.flatten(), ignore_index=0,
            options=nn.LinearCrossEntropyOptions(batch_chunk_size=4)
        ),
    }


def batch_for(seed: int = 0) -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(seed)
    mask = (torch.rand(ROWS, TIME, generator=make) < 0.6).float()
    mask[:, 0] = 1.0
    mask[-1] = 1.0
    labels = torch.randint(CLASSES, (ROWS, TIME), generator=make)
    labels[:2, 2:] = 0
    return {
        "x": torch.randn(ROWS, TIME, WIDTH, generator=make),
        "labels": labels,
        "mask": mask,
        "other": torch.randint(CLASSES, (ROWS, TIME), generator=make),
        "wanted": torch.randn(ROWS, TIME, CLASSES, generator=make),
        "lengths": torch.tensor([1, 2, 1, 2, 2, 1, 2]),
        "items": torch.tensor(23),
        "number": 23,
    }


def full_batch(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The truth: one process, one batch, eager."""
    twin = copy.deepcopy(model)
    loss = twin(**batch)["loss"]
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in twin.named_parameters()}


def differences(model, batch, **options) -> list[str]:
    """What a pipeline over two stages does otherwise than the full batch, beyond rounding."""
    loss, gradients = full_batch(model, batch)
    pipe = pe.Pipeline(model, batch, num_stages=2, num_microbatches=4, costs="analytic", **options)
    ours = pipe.step(**batch)
    problems = (
        [] if torch.allclose(ours, loss, rtol=1e-5, atol=1e-6) else [f"loss {float(ours)}, full batch {float(loss)}"]
    )
    for name, p in pipe.named_parameters():
        expected = gradients[name]
        if not torch.allclose(p.grad, expected, rtol=0, atol=2e-5 * max(float(expected.abs().max()), 1e-6)):
            problems.append(f"gradient of {name}")
    with torch.no_grad():
        evaluated = pipe.evaluate(**batch)["loss"]
    if not torch.allclose(evaluated, loss, rtol=1e-5, atol=1e-6):
        problems.append(f"evaluated {float(evaluated)}, full batch {float(loss)}")
    return problems


@pytest.mark.filterwarnings("ignore:reduction. .mean. divides the total loss")
@pytest.mark.parametrize("way", LOSSES)
def test_loss_is_the_full_batchs(way):
    torch.manual_seed(1)
    assert not differences(Head(way), batch_for())


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_cache=False,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("items", [None, 29, torch.tensor(29)], ids=["mean", "number", "tensor"])
def test_hugging_face_loss_is_the_full_batchs(items):
    ids = torch.randint(32, (7, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:3, 4:] = -100
    batch = {"input_ids": ids, "labels": labels, **({} if items is None else {"num_items_in_batch": items})}
    assert not differences(llama(), batch)


def check(model, batch, weights: list[float]) -> str | None:
    parts = [
        {k: v.tensor_split(2)[i] if isinstance(v, torch.Tensor) and v.dim() else v for k, v in batch.items()}
        for i in range(2)
    ]
    return full_batch_loss_check(
        model, Inputs.of(batch), [Inputs.of(part) for part in parts], Weights(tuple(weights), ((), ()))
    )


def test_check_names_both_losses_and_the_way_out():
    model, batch = Head("square, summed"), batch_for()
    loss = float(model(**batch)["loss"].detach())
    assert check(model, batch, [1.0, 1.0]) is None
    message = check(model, batch, [0.5, 0.5])
    assert f"{loss:.6g}" in message and f"{loss / 2:.6g}" in message and "loss_weight=" in message


def test_check_sees_batch_norm_and_leaves_it_as_it_was():
    class Normal(nn.Module):
        def __init__(self):
            super().__init__()
            self.line, self.norm, self.drop = nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(self.norm(self.line(x))).sigmoid().pow(2).mean()

    model, batch = Normal(), {"x": torch.randn(8, WIDTH)}
    before = copy.deepcopy(model.state_dict())
    assert "batch norm" in check(model, batch, [0.5, 0.5])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.drop.training
    model.eval()
    assert check(model, batch, [0.5, 0.5]) is None
