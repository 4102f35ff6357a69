"""A forward that swaps its own modules, as BigBird does for short batches: recorded, and the model stays as it was."""

import pytest
import torch
import transformers
from reference import assert_same_step, gradients, reference_step

import pipeengine as pe

VOCAB = 97


pytestmark = pytest.mark.usefixtures("quiet_and_seeded")


def big_bird(dropout: float):
    return transformers.BigBirdForMaskedLM(transformers.BigBirdConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=128, block_size=4, num_random_blocks=1, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout)).train()


def big_bird_pegasus(dropout: float):
    return transformers.BigBirdPegasusForConditionalGeneration(transformers.BigBirdPegasusConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=128, block_size=4,
        num_random_blocks=1, dropout=dropout, attention_dropout=dropout, activation_dropout=dropout)).train()


def words(seed: int, length: int = 16) -> dict:
    draws = torch.Generator().manual_seed(seed)
    return {name: torch.randint(3, VOCAB, (4, length), generator=draws) for name in ("input_ids", "labels")}


def picture(model) -> list:
    return [(path, type(module), id(module), getattr(module, "attention_type", None))
            for path, module in model.named_modules()]


@pytest.mark.parametrize("make", (big_bird, big_bird_pegasus), ids=lambda make: make.__name__)
def test_short_batches_take_full_attention(make):
    model, plain = make(0.0), make(0.0)
    plain.load_state_dict(model.state_dict())
    before = picture(model)
    pipe = pe.Pipeline(model, words(0), num_stages=3, num_microbatches=2, costs="analytic")
    assert picture(model) == before
    for seed in (0, 1):
        model.zero_grad()
        expected = reference_step(plain, words(seed), 2)
        assert_same_step(expected, (pipe.step(**words(seed)), gradients(model)), 1e-6, floor=1e-3)


def test_with_dropout_any_cut_drops_the_same():
    state, losses = big_bird_pegasus(0.1).state_dict(), []
    for num_stages in (1, 3):
        model = big_bird_pegasus(0.1)
        model.load_state_dict(state)
        pipe = pe.Pipeline(model, words(0), num_stages=num_stages, num_microbatches=2, costs="analytic")
        losses.append(pipe.step(**words(0)))
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
