"""Weights that are not trained cost what they are: no gradient, no optimizer, nothing put off."""
import pytest
import torch

import pipeengine as pe
from tests import zoo
from tests.live import live

CASE = zoo.hugging_face("gpt2")
TOKENS = torch.randint(3, zoo.VOCAB, (8, 48), generator=torch.Generator().manual_seed(0))
BATCH = dict(input_ids=TOKENS, labels=TOKENS)


def model(trained: str):
    built = CASE.build()
    for name, parameter in built.named_parameters():
        parameter.requires_grad_(trained in name)
    return built


@pytest.mark.parametrize("trained", ["", "mlp.c_fc", "ln_", "wte"])
def test_bytes_by_what_is_trained(trained):
    built = model(trained)
    plan = pe.partition(pe.profile(built, BATCH, num_microbatches=4, costs="analytic"), 1)
    whole = 4 * sum(p.numel() for p in built.parameters())
    frozen = 4 * sum(p.numel() for p in built.parameters() if not p.requires_grad)
    cost = plan.stages[0]
    assert cost.param_bytes - cost.frozen_bytes == whole - frozen
    assert 0 <= cost.frozen_bytes - frozen < 0.1 * whole, "buffers count among the frozen"


@pytest.mark.parametrize("trained", ["mlp.c_fc", "ln_", "lm_head"])
def test_the_peak_is_as_predicted(trained):
    built = model(trained) if trained != "lm_head" else CASE.build()
    pipe = pe.Pipeline(built, BATCH, num_microbatches=4, num_stages=1, schedule="gpipe", costs="analytic", check=False)
    pipe.step(**BATCH)
    for parameter in pipe.parameters():
        parameter.grad = None
    measured = live(lambda: pipe.step(**BATCH)).peak
    assert measured == pytest.approx(pipe.predicted_timeline().peak_bytes[0], rel=0.1)
