"""What a device must show, wherever there is one: pipelines on it are one process on it."""
import half_precision
import pytest
import torch
import zoo
from reference import assert_same_step, gradients, reference_step

import pipeengine as pe

DEVICE = torch.accelerator.current_accelerator(check_available=True)
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(DEVICE is None, reason="needs an accelerator"),
              pytest.mark.usefixtures("quiet")]
SCHEDULES = ("gpipe", "1f1b", "zb-h1", "interleaved-1f1b")


def on_device(batch: dict) -> dict:
    return {name: value.to(DEVICE) for name, value in batch.items()}


def make(name: str, **options) -> tuple[torch.nn.Module, pe.Pipeline, dict]:
    case = zoo.hugging_face(name)
    model, batch = case.build().to(DEVICE), on_device(case.batches[0])
    options = {"num_microbatches": 4, "num_stages": 4, "costs": "analytic", "check": False, **options}
    return model, pe.Pipeline(model, batch, **options), batch


def step(name: str, **options) -> tuple:
    model, pipe, batch = make(name, **options)
    return pipe.step(**batch), gradients(model)


def truth(name: str, num_microbatches: int = 4) -> tuple:
    case = zoo.hugging_face(name)
    return reference_step(case.build().to(DEVICE), on_device(case.batches[0]), num_microbatches)


@pytest.mark.parametrize("name", ("gpt2", "llama", "t5"))
def test_capture_agrees_with_eager(name):
    """The recording is compared with eager execution on the device, and measured there."""
    model, pipe, batch = make(name, check=True, costs="measured")
    assert pipe.step(**batch).device.type == DEVICE.type
    assert all(parameter.device.type == DEVICE.type for parameter in pipe.parameters())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ("gpt2", "llama", "t5"))
def test_every_gradient_is_that_of_one_process(name, schedule):
    assert_same_step(truth(name), step(name, schedule=schedule), 1e-5, floor=1e-3)


def test_compiled_stages():
    assert_same_step(truth("llama"), step("llama", compile=True), 1e-4, floor=1e-3)


def test_half_precision_with_a_scaler():
    model, pipe, batch = make("gpt2")
    optimizer, scaler = torch.optim.AdamW(pipe.parameters(), lr=1e-3), torch.amp.GradScaler(DEVICE.type, 2.0 ** 30)
    losses, scales = half_precision.train(pipe, batch, optimizer, scaler, 40, DEVICE.type)
    assert scales[-1] < 2.0 ** 30 and losses[-1] < losses[0], "overflows are skipped, then it learns"


def test_memory_is_let_go_and_the_timeline_is_whole():
    model, pipe, batch = make("llama")
    pipe.step(**batch)
    torch.accelerator.synchronize()
    before = torch.accelerator.memory_allocated()
    for _ in range(3):
        pipe.step(**batch)
    torch.accelerator.synchronize()
    assert torch.accelerator.memory_allocated() <= before, "a step leaves nothing behind"
    timeline = pipe.timeline()
    assert timeline is not None and timeline.makespan > 0 and len(timeline.start) == 2 * 4 * 4
