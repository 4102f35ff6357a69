"""Objects in a model's output, key-value caches above all: returned as one process returns them, or refused by name."""

import inspect
import logging

import pytest
import torch
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import pipeengine as pe

SIZES = dict(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, max_position_embeddings=32, bos_token_id=1, eos_token_id=2)


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def gemma():
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4, layer_types=kinds)).eval()


def token_ids(rows=5, length=6):
    return torch.randint(3, 50, (rows, length), generator=torch.Generator().manual_seed(1))


def pipeline_of(model):
    ids = token_ids()
    return pe.Pipeline(model, {"input_ids": ids, "labels": ids}, costs="analytic",
                       num_stages=2, num_microbatches=2)


def assert_alike(found, expected, where):
    """The same types down to the last attribute, with the same numbers."""
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, where
        torch.testing.assert_close(found, expected, msg=lambda text: f"{where}: {text}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for number, pair in enumerate(zip(found, expected)):
            assert_alike(*pair, f"{where}[{number}]")
    elif isinstance(expected, dict):
        assert list(found) == list(expected), where
        for name in expected:
            assert_alike(found[name], expected[name], f"{where}[{name!r}]")
    elif hasattr(expected, "__dict__") and not isinstance(expected, type):
        assert vars(found).keys() == vars(expected).keys(), where
        for name in vars(expected):
            assert_alike(getattr(found, name), getattr(expected, name), f"{where}.{name}")
    else:
        assert found == expected, where


@pytest.fixture(scope="module")
def shared():
    """One model and its pipeline for all tests that change nothing."""
    model = llama()
    return model, pipeline_of(model)


def cache_of(output):
    return next(value for value in output.values() if type(value).__name__ == "DynamicCache")


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_a_cache_is_that_of_one_process(kind, shared):
    model, pipe = shared
    if kind == "sliding":
        model = gemma()
        pipe = pipeline_of(model)
    ids = token_ids()
    with torch.no_grad():
        expected = model(ids, use_cache=True)
    found = pipe.evaluate(input_ids=ids, use_cache=True)
    assert list(found) == list(expected)
    assert_alike(cache_of(found), cache_of(expected), "cache")
    torch.testing.assert_close(found.logits, expected.logits)


def test_a_model_goes_on_from_the_cache(shared):
    model, pipe = shared
    ids = token_ids()
    name = next(name for name in ("cache", "past_key_values") if name in inspect.signature(model.forward).parameters)
    cache = cache_of(pipe.evaluate(input_ids=ids[:, :4], use_cache=True))
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:, 4:], **{name: cache}).logits, model(ids).logits[:, 4:])


def test_two_calls_share_nothing(shared):
    _, pipe = shared
    first, second = (cache_of(pipe.evaluate(input_ids=token_ids(), use_cache=True)) for _ in range(2))
    assert first.layers is not second.layers
    assert first.layers[0] is not second.layers[0]


def test_a_cache_that_nobody_asked_for_is_left_out_and_said_so_once(shared, caplog):
    pipe = pipeline_of(shared[0])           # a new one, which has said nothing yet
    with caplog.at_level(logging.WARNING, logger="pipeengine.evaluate"):
        outputs = [pipe.evaluate(input_ids=token_ids()) for _ in range(2)]
    assert [list(output) for output in outputs] == [["logits"]] * 2
    assert len(caplog.messages) == 1
    assert "(DynamicCache)" in caplog.messages[0] and "use_cache=True" in caplog.messages[0]


def test_no_word_where_no_cache_is_made(shared, caplog):
    _, pipe = shared
    with caplog.at_level(logging.WARNING, logger="pipeengine.evaluate"):
        pipe.evaluate(input_ids=token_ids(), use_cache=False)
    assert caplog.messages == []


def test_a_layer_kept_whole_keeps_its_part_of_a_cache():
    model = llama()
    model.model.layers[1].register_forward_hook(lambda *_: None)
    pipe = pipeline_of(model)
    with pytest.raises(pe.InputError, match=r"DynamicCache.*module model\.layers\.1 is kept whole.*use_cache=False"):
        pipe.evaluate(input_ids=token_ids(), use_cache=True)
    assert pipe.evaluate(input_ids=token_ids(), use_cache=False).logits.shape == (5, 6, 50), "it is still usable"


def test_a_cache_as_an_input_is_refused_and_not_written_to(shared):
    _, pipe = shared
    ids = token_ids()
    cache = cache_of(pipe.evaluate(input_ids=ids, use_cache=True))
    before = cache.layers[0].keys.clone()
    with pytest.raises(pe.InputError, match=r"input \w+ is a cache \(DynamicCache\)"):
        pipe.evaluate(input_ids=ids, past_key_values=cache)
    assert torch.equal(cache.layers[0].keys, before)
    assert torch.isfinite(pipe.step(input_ids=ids, labels=ids))


class Spread:
    """What a model may return: tensors and numbers under names."""

    def __init__(self, mean, scale):
        self.mean, self.scale, self.kind = mean, {"of all": scale}, "normal"


class Counted(Spread):
    def __init__(self, mean, scale):
        super().__init__(mean, scale)
        self.rows = len(mean)


class Slotted:
    __slots__ = ("mean",)

    def __init__(self, mean, scale):
        self.mean = mean


class Circular(Spread):
    def __init__(self, mean, scale):
        super().__init__(mean, scale)
        self.me = self


class Answers(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.below, self.above, self.kind = nn.Linear(6, 8), nn.Linear(8, 3), kind

    def forward(self, x):
        out = self.above(self.below(x))
        return {"loss": out.square().mean(), "spread": self.kind(out, self.below.weight.exp())}


def answers_of(kind, num_microbatches=2):
    torch.manual_seed(0)
    model, batch = Answers(kind), {"x": torch.randn(4, 6)}
    return model, batch, pe.Pipeline(model, batch, num_stages=2, num_microbatches=num_microbatches, costs="analytic")


def test_an_object_is_made_again():
    model, batch, pipe = answers_of(Spread)
    with torch.no_grad():
        expected = model(**batch)
    assert_alike(pipe.evaluate(**batch)["spread"], expected["spread"], "spread")


@pytest.mark.parametrize("num_microbatches", [1, 2])
@pytest.mark.parametrize(("kind", "why"), [(Slotted, "it is no plain object"), (Circular, "it holds itself")])
def test_an_object_that_cannot_be_made_again_is_refused_by_name(kind, why, num_microbatches):
    _, batch, pipe = answers_of(kind, num_microbatches)
    with pytest.raises(pe.InputError, match=f"output spread, a {kind.__name__}, cannot be returned: {why}"):
        pipe.evaluate(**batch)
    assert torch.isfinite(pipe.step(**batch)), "training does not ask for it"


def test_a_number_of_rows_inside_an_object_is_refused_by_name():
    _, batch, pipe = answers_of(Counted)
    with pytest.raises(pe.InputError, match="output spread.* is 2 for the rows of a micro-batch and 4 for twice"):
        pipe.evaluate(**batch)
