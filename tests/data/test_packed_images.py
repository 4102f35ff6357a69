"""Images packed along dimension 0 go with the rows that they belong to; and the models that take them so."""

import pytest
import torch
import transformers
from reference import assert_same_step, gradients

import pipeengine as pe
from pipeengine.data.batching import take_apart
from pipeengine.data.packed_images import packed_entries
from pipeengine.tracing import Inputs

VOCAB, IMAGE, START, END = 97, 90, 92, 93


pytestmark = pytest.mark.usefixtures("quiet_and_seeded")


def grid(*sides: int) -> torch.Tensor:
    return torch.tensor([[1, side, side] for side in sides])


def types(*tokens: int) -> torch.Tensor:
    return torch.tensor([[1] * count + [0] * (30 - count) for count in tokens])


def test_every_row_has_as_many_images_where_nothing_says_otherwise():
    found = packed_entries(dict(pixel_values=torch.zeros(48, 3), image_grid_thw=grid(4, 2, 4, 2, 2, 2)), 3)
    assert found == {"image_grid_thw": (2, 2, 2), "pixel_values": (20, 20, 8)}


def test_image_tokens_say_whose_an_image_is():
    """Four patches a token: two images, none, one."""
    found = packed_entries(dict(pixel_values=torch.zeros(36, 3), image_grid_thw=grid(4, 2, 4),
                                mm_token_type_ids=types(5, 0, 4)), 3)
    assert found == {"image_grid_thw": (2, 0, 1), "pixel_values": (20, 0, 16)}


@pytest.mark.parametrize("batch", (
    dict(pixel_values=torch.zeros(36, 3)), dict(pixel_values=torch.zeros(35, 3), image_grid_thw=grid(4, 2, 4)),
    dict(pixel_values=torch.zeros(36, 3), image_grid_thw=grid(4, 2, 4), mm_token_type_ids=types(4, 1, 3)),
    dict(pixel_values=torch.zeros(20, 3), image_grid_thw=grid(4, 2))), ids=("no grid", "sum", "tokens", "rows"))
def test_what_does_not_fit_together_goes_whole(batch):
    assert packed_entries(batch, 3) == {}


def test_micro_batches_get_their_own_images():
    pixels = torch.arange(36.)[:, None]
    inputs = Inputs((), dict(pixel_values=pixels, input_ids=torch.zeros(3, 30), image_grid_thw=grid(4, 2, 4),
                             mm_token_type_ids=types(5, 0, 4)))
    batch = take_apart(inputs, names=(), batch_dims=None)
    first, second = (batch.again(tensors).kwargs for tensors in batch.split(2, torch.device("cpu")))
    assert batch.rows == 3 and batch.packed_sizes(2) == ((20, 2), (16, 1))
    assert torch.equal(first["pixel_values"], pixels[:20]) and torch.equal(second["pixel_values"], pixels[20:])
    assert len(first["image_grid_thw"]) == 2 and len(first["input_ids"]) == 2 and len(second["mm_token_type_ids"]) == 1


TEXT = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128,
            rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4})
VISION = dict(depth=2, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2, in_channels=3)
TOKENS = dict(image_token_id=IMAGE, video_token_id=91, vision_start_token_id=START, vision_end_token_id=END)


def qwen2_vl():
    return transformers.Qwen2VLForConditionalGeneration(transformers.Qwen2VLConfig(
        text_config=TEXT, vision_config=dict(VISION, embed_dim=16, hidden_size=32, mlp_ratio=2), **TOKENS))


def qwen2_5_vl():
    vision = dict(VISION, hidden_size=16, out_hidden_size=32, intermediate_size=24, window_size=16,
                  fullatt_block_indexes=[1])
    return transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(
        text_config=TEXT, vision_config=vision, **TOKENS))


def qwen3_vl():
    vision = dict(VISION, hidden_size=16, out_hidden_size=32, intermediate_size=24, num_position_embeddings=16,
                  deepstack_visual_indexes=[0])
    return transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig(
        text_config=dict(TEXT, head_dim=8), vision_config=vision, **TOKENS))


def glm4v():
    vision = dict(VISION, hidden_size=16, out_hidden_size=32, intermediate_size=24, image_size=16)
    tokens = dict(image_token_id=IMAGE, video_token_id=91, image_start_token_id=START, image_end_token_id=END)
    text = dict(TEXT, rope_parameters=dict(TEXT["rope_parameters"], partial_rotary_factor=1.0))
    return transformers.Glm4vForConditionalGeneration(transformers.Glm4vConfig(
        text_config=text, vision_config=vision, **tokens))


def chat(seed: int, sides: tuple[int, ...]) -> dict:
    """One image a row, of ``sides`` patches by as many; a token for four patches."""
    draws = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 80, (len(sides), 14), generator=draws)
    kinds = torch.zeros_like(ids)
    for row, side in enumerate(sides):
        count = side * side // 4
        ids[row, 1], ids[row, 2:2 + count], ids[row, 2 + count] = START, IMAGE, END
        kinds[row, 2:2 + count] = 1
    patches = torch.randn(sum(side * side for side in sides), 3 * 2 * 16, generator=draws)
    return dict(input_ids=ids, labels=ids.clone(), attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds,
                pixel_values=patches, image_grid_thw=grid(*sides))


def halves(batch: dict, sides: tuple[int, ...]) -> list[dict]:
    """Two micro-batches, by hand."""
    middle = len(sides) // 2
    first = sum(side * side for side in sides[:middle])
    at = {name: first if name == "pixel_values" else middle for name in batch}
    return [{name: value[:at[name]] for name, value in batch.items()},
            {name: value[at[name]:] for name, value in batch.items()}]


@pytest.mark.parametrize("num_microbatches", (1, 2, 4))
def test_joining_undoes_splitting(num_microbatches):
    batch = take_apart(Inputs((), chat(0, (4, 2, 4, 2))), names=(), batch_dims=None)
    assert batch.packed, "images of all rows stand one after another"
    parts = batch.split(num_microbatches, torch.device("cpu"))
    assert all(map(torch.equal, batch.join(parts), batch.tensors))


@pytest.mark.parametrize("make", (
    *(pytest.param(make, marks=pytest.mark.slow) for make in (qwen2_vl, qwen2_5_vl, glm4v)), qwen3_vl),
    ids=lambda make: make.__name__)
def test_a_vision_language_model_over_three_stages(make):
    """Loss and every gradient are those of one process; images of several sizes."""
    model, plain = make().train(), make().train()
    plain.load_state_dict(model.state_dict())
    kinds = ((4, 4, 4, 4), (4, 4, 2, 2))
    pipe = pe.Pipeline(model, chat(0, kinds[0]), num_stages=3, num_microbatches=2, costs="analytic", schedule="1f1b")
    for seed, sides in enumerate((*kinds, kinds[0])):
        batch = chat(seed, sides)
        model.zero_grad(), plain.zero_grad()
        total = torch.zeros(())
        for part in halves(batch, sides):
            loss = plain(**part).loss / 2
            loss.backward()
            total += loss.detach()
        assert_same_step((total, gradients(plain)), (pipe.step(**batch), gradients(model)), 1e-6, floor=1e-3)
