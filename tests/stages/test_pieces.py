"""Compiled stages compute what they did, alike blocks are compiled once, and what is compiled is told."""
import logging

import pytest
import torch
import zoo
from reference import assert_same_step, gradients

import pipeengine as pe
from pipeengine.stages import Pieces
from pipeengine.stages.pieces import find_pieces

pytestmark = pytest.mark.usefixtures("quiet")
AOT = {"backend": "aot_eager"}


def step(case: zoo.Case, compile: object, schedule: str, num_batches: int = 1) -> tuple[pe.Pipeline, list[tuple]]:
    """(loss, gradients) of each batch."""
    model = case.build()
    example, target = case.split_target(case.batches[0])
    pipe = pe.Pipeline(model, example, target=target, loss_fn=case.loss_fn, num_microbatches=4, num_stages=2,
                       costs="analytic", check=False, schedule=schedule, compile=compile)
    seen = []
    for batch in case.batches[:num_batches]:
        model.zero_grad()
        inputs, target = case.split_target(batch)
        loss = pipe.step(target=target, **inputs)
        seen.append((loss, {name: grad.clone() for name, grad in gradients(model).items()}))
    return pipe, seen


def assert_compiled_is_eager(case: zoo.Case, compile: object, schedule: str, num_batches: int) -> pe.Pipeline:
    pipe, found = step(case, compile, schedule, num_batches)
    for expected, one in zip(step(case, False, schedule, num_batches)[1], found, strict=True):
        assert_same_step(expected, one, 2e-6, floor=1e-3)
    return pipe


def test_weight_gradients_wait_and_masks_are_the_same(caplog):
    """Dropout, a schedule that splits backward: what is left between the linear layers is compiled, and told."""
    with caplog.at_level(logging.INFO, logger="pipeengine.compile"):
        pipe = assert_compiled_is_eager(zoo.hugging_face("llama", dropout=0.1), AOT, "zb-h1", 1)
    assert "graphs compiled" in caplog.text and "in parts" not in caplog.text
    assert pipe._assembly.programs.splits_backward


def test_alike_blocks_are_compiled_once():
    case = zoo.AWKWARD["LongSkips"]
    pieces = Pieces(AOT)
    source = "def piece(v0, m0):\n    return (m0(v0).exp(), )\n"
    one, other = pieces.compile(source, "piece", {}), pieces.compile(source, "piece", {})
    assert one is other and pieces.compile(source, "piece", {"c": case}) is not one
    layer, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    assert torch.equal(one(x, layer)[0], layer(x).exp())


class Attention(torch.nn.Module):
    """What GPTs are written with: ``unflatten``, and attention whose dropout is a number."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.mix, self.dropout = torch.nn.Linear(8, 24), dropout

    def forward(self, x):
        split = [part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.mix(x).chunk(3, dim=-1)]
        mixed = torch.nn.functional.scaled_dot_product_attention(*split, dropout_p=self.dropout)
        return x + mixed.transpose(1, 2).flatten(2)


class Attentions(torch.nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Attention(dropout) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


@pytest.mark.parametrize("most", (1, 20, 32, 128))
def test_pieces_end_where_blocks_do(monkeypatch, most):
    """As many whole blocks as fit; entering a piece for each small block used to cost what compiling gained."""
    monkeypatch.setattr("pipeengine.stages.pieces._MOST", most)
    torch.manual_seed(0)
    model, batch = Attentions(), {"x": torch.randn(4, 6, 8)}
    recording = pe.capture(model, batch)
    nodes = list(enumerate(recording.nodes))
    pieces = find_pieces(recording, nodes, model, lambda node: False)
    assert [node for piece in pieces for node in piece] == list(recording.nodes)
    block = sum(node.name.startswith("blocks.0") for node in recording.nodes)
    rest = len(nodes) - 3 * block
    sizes = {1: [block] * 3 + [rest], 20: [block, block, block + rest], 32: [2 * block, block + rest],
             128: [3 * block + rest]}[most]
    assert [len(piece) for piece in pieces] == sizes
    apart = find_pieces(recording, nodes, model, lambda node: node is recording.nodes[block + 2])
    assert recording.nodes[block + 2] not in [node for piece in apart for node in piece]


def test_a_block_with_attention_is_one_piece(caplog):
    """Attention without dropout used to count as random and to end a piece, ``unflatten`` broke its graph."""
    torch.manual_seed(0)
    model, batch = Attentions(), {"x": torch.randn(4, 6, 8)}
    recording = pe.capture(model, batch)
    nodes = [(index, node) for index, node in enumerate(recording.nodes) if node.name.startswith("blocks.0")]
    assert [len(piece) for piece in find_pieces(recording, nodes, model, lambda node: False)] == [len(nodes)]
    assert any(node.random for node in pe.capture(Attentions(0.1), batch).nodes)
    with caplog.at_level(logging.INFO, logger="pipeengine.compile"):
        pipe = pe.Pipeline(model, batch, num_microbatches=2, costs="analytic", check=False, compile=AOT)
        pipe.step(**batch)
    assert "graphs compiled" in caplog.text and "in parts" not in caplog.text
    found = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    expected = model(**batch)
    expected.backward()
    assert_same_step((expected.detach(), gradients(model)), (pipe.loss, found), 2e-6, floor=1e-3)


def test_unknown_options_are_refused():
    case = zoo.AWKWARD["LongSkips"]
    for wrong in ("yes", {"speed": "fast"}):
        with pytest.raises(pe.InputError, match="backend"):
            step(case, wrong, "1f1b")


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ("1f1b", "zb-h1"))
@pytest.mark.parametrize("name", ("gpt2", "llama", "bert", "t5", "vit"))
def test_five_architectures(name, schedule):
    """With dropout and two shapes of batch."""
    if name != "vit":
        assert_compiled_is_eager(zoo.hugging_face(name, dropout=0.1), AOT, schedule, 2)
    else:
        assert_compiled_is_eager(zoo.hugging_face(name), AOT, schedule, 2)


@pytest.mark.slow
def test_inductor():
    assert_compiled_is_eager(zoo.hugging_face("gpt2"), True, "1f1b", 1)
