"""Packed rows: nothing lost, nothing over the edge, and a model sees each sequence as if it were alone."""
import random
from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import pipeengine as pe


def sequences(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(1, 90) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def pieces_of(row: dict) -> list[tuple[int, ...]]:
    """The sequences of a row, by their segments."""
    segments = row["segment_ids"].tolist()
    return [tuple(row["input_ids"][[s == number for s in segments]].tolist()) for number in range(1, max(segments) + 1)]


@pytest.mark.parametrize("count, longest, length", ((1, 5, 8), (40, 16, 16), (200, 30, 32), (50, 70, 16)))
def test_every_token_stands_in_one_row(count, longest, length):
    data = sequences(count, longest)
    packed = pe.PackedDataset(data, length, segments=True)
    rows = [packed[i] for i in range(len(packed))]
    expected = Counter(tuple(s[at:at + length]) for s in data for at in range(0, len(s), length))
    assert Counter(piece for row in rows for piece in pieces_of(row)) == expected
    tokens = sum(map(len, data))
    assert len(rows) <= 11 / 9 * -(-tokens // length) + 1, "within what best fit promises"
    for row in rows:
        assert all(row[name].shape == (length,) for name in row if name != "attention_mask")
        starts = row["position_ids"] == 0
        assert (row["labels"] == torch.where(starts | (row["segment_ids"] == 0), -100, row["input_ids"])).all()
        assert starts.sum() == len(pieces_of(row)) + (row["segment_ids"] == 0).any()
    assert pe.PackedDataset(data, length, lengths=map(len, data))._pieces.tolist() == packed._pieces.tolist()


def test_own_labels_and_masks_come_along():
    data = [dict(input_ids=[5, 6, 7], labels=[-100, -100, 7]), dict(input_ids=[8, 9], labels=[8, 9])]
    (row,) = (pe.PackedDataset(data, 6, segments=True, pad=3)[0],)
    assert row["input_ids"].tolist() == [5, 6, 7, 8, 9, 3] and row["segment_ids"].tolist() == [1, 1, 1, 2, 2, 0]
    assert row["labels"].tolist() == [-100, -100, 7, -100, 9, -100]
    assert row["position_ids"].tolist() == [0, 1, 2, 0, 1, 0]
    assert row["attention_mask"][0].int().tolist() == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0],
                                                       [0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1]]


@pytest.mark.parametrize("mask", (False, True))
def test_a_pipeline_sees_every_sequence_as_if_it_were_alone(mask):
    """Loss and gradients of packed rows against each sequence by itself, in one plain process.

    Without a mask, models of Transformers look at the positions, but not when they fill a cache.
    """
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                         num_attention_heads=4, num_key_value_heads=2, use_cache=mask))
    data = [s for s in sequences(24, 14) if len(s) > 1]
    targets = sum(len(s) - 1 for s in data)
    for s in data:
        ids = torch.tensor([s])
        (model(input_ids=ids, labels=ids).loss * (len(s) - 1) / targets).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        loss = sum(float(model(input_ids=(ids := torch.tensor([s])), labels=ids).loss) * (len(s) - 1)
                   for s in data) / targets
    model.zero_grad()

    packed = pe.PackedDataset(data, 16, mask=mask)
    (batch,) = DataLoader(packed, batch_size=len(packed))
    assert ("attention_mask" in batch) == mask and "segment_ids" not in batch
    pipe = pe.Pipeline(model, batch, num_microbatches=3, num_stages=2, costs="analytic")
    assert float(pipe.step(**batch)) == pytest.approx(loss, abs=1e-5)
    for name, parameter in pipe.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_wrong_numbers_are_refused():
    with pytest.raises(pe.InputError, match="length is 1"):
        pe.PackedDataset([[1]], 1)
    with pytest.raises(pe.InputError, match="2 lengths for 1 sequences"):
        pe.PackedDataset([[1]], 4, lengths=[1, 2])
