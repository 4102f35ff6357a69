"""A Llama of which only adapters (LoRA) are trained: memory as planned, and no traffic for what is frozen."""
import pytest
import torch
from workers import launch

import pipeengine as pe
from pipeengine.report import RunReport

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

WIDTH, LAYERS = 128, 6


def adapted(trained: tuple[int, ...] = tuple(range(LAYERS))) -> torch.nn.Module:
    """With adapters on the layers ``trained``."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(num_hidden_layers=LAYERS, hidden_size=WIDTH, intermediate_size=2 * WIDTH,
                                      num_attention_heads=4, num_key_value_heads=2, vocab_size=256)
    return peft.get_peft_model(transformers.LlamaForCausalLM(config), peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], layers_to_transform=list(trained),
        task_type="CAUSAL_LM"))


def pipeline(model: torch.nn.Module, schedule: str, num_stages: int | None) -> tuple[pe.Pipeline, dict]:
    tokens = torch.randint(256, (8, 64), generator=torch.Generator().manual_seed(0))
    batch = dict(input_ids=tokens, labels=tokens)
    return pe.Pipeline(model, batch, num_microbatches=4, num_stages=num_stages, schedule=schedule, costs="analytic",
                       check=False), batch


def counted(schedule: str, num_stages: int | None = None) -> RunReport:
    """After a counted step that began without gradients."""
    torch.set_num_threads(1)
    pipe, batch = pipeline(adapted(), schedule, num_stages)
    pipe.step(**batch)
    for parameter in pipe.parameters():
        parameter.grad = None
    pipe.count_memory()
    pipe.step(**batch)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()         # all have published what they counted
    return pipe.run_report()


@pytest.mark.parametrize(("schedule", "num_stages"), [("gpipe", 2), ("1f1b", 3)])
def test_each_stage_needs_what_was_planned(schedule, num_stages):
    """What a stage receives is its own memory, also where one process runs all stages; frozen weights hide nothing."""
    rows = counted(schedule, num_stages).rows
    assert len(rows) == num_stages
    for row in rows:
        assert row.measured_bytes == pytest.approx(row.predicted_bytes, rel=0.05)


def count_on_workers(report, schedule: str) -> None:
    report("told", [(row.measured_bytes, row.predicted_bytes) for row in counted(schedule).rows])


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [2, 3])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_each_worker_needs_what_was_planned(schedule, num_workers):
    """Messages that wait and travel included."""
    for measured, predicted in launch(num_workers, count_on_workers, schedule)[0]["told"]:
        assert measured == pytest.approx(predicted, rel=0.05)


def test_nothing_comes_back_below_the_first_adapter():
    """Only the last layer is trained: stages below have no backward to pay for and are sent no gradient."""
    pipe, batch = pipeline(adapted((LAYERS - 1,)), "1f1b", 3)
    plan = pipe.plan
    first = next(number for number, cost in enumerate(plan.stages) if cost.param_bytes > cost.frozen_bytes)
    assert first > 0
    for boundary in plan.boundaries:
        if boundary.source < first:
            assert boundary.gradients == () and boundary.gradient_bytes == 0
    assert [cost.backward for cost in plan.stages[:first]] == [0.0] * first
    pipe.step(**batch)
    returned = sum(b.gradient_bytes for b in plan.boundaries)
    sent = sum(row.sent_bytes for row in pipe.run_report().rows)
    assert sent == 4 * (sum(b.bytes for b in plan.boundaries) + returned)
    assert {name for name, p in pipe.named_parameters() if p.grad is not None} == \
        {name for name, p in pipe.named_parameters() if p.requires_grad}
