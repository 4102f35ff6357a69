"""What a step is said to add to memory, beside the allocator's own events."""
import dataclasses

import numpy as np
import pytest
import torch
import zoo
from live import live, mark

import pipeengine as pe
from partitioners.plan.plan import StageCost
from pipeengine.report.memory import most_added, step_bytes
from pipeengine.synthesis.registry import build

ROWS, LENGTH = 6, 32


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def planned(name: str, schedule: str, num_stages: int) -> tuple[pe.Pipeline, dict]:
    tokens = torch.randint(3, zoo.VOCAB, (ROWS, LENGTH))
    batch = dict(input_ids=tokens, labels=tokens)
    model = zoo.hugging_face(name).build()
    return pe.Pipeline(model, batch, num_microbatches=ROWS, num_stages=num_stages, schedule=schedule, costs="analytic",
                       check=False), batch


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1"])
def test_the_peak_of_a_step_is_as_predicted(name, schedule):
    """Within a tenth, from no gradients at all; no messages in one process."""
    pipe, batch = planned(name, schedule, 1)
    pipe.step(**batch)
    for parameter in pipe.parameters():
        parameter.grad = None
    measured = live(lambda: pipe.step(**batch)).peak
    assert measured == pytest.approx(pipe.predicted_timeline().peak_bytes[0], rel=0.1)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_less_stays_between_the_halves_than_before(name):
    """Weight gradients that wait keep no more than the activations were: M_W <= M_B, measured."""
    pipe, batch = planned(name, "zb-h1", 1)
    batch = {key: value[:1] for key, value in batch.items()}
    for _ in range(2):
        pipe.step(**batch)
    do = pipe._runner.executor._do
    for op in "FI":
        def marked(*action: int, act=do[op], op=op) -> None:
            mark("before " + op)
            act(*action)
            mark("after " + op)
        do[op] = marked
    marks = live(lambda: pipe.step(**batch)).marks
    activations, kept = (marks["after " + op] - marks["before F"] for op in "FI")
    assert 0.2 * activations < kept <= activations
    stage, = pipe.plan.stages
    assert (activations, kept) == pytest.approx((stage.activation_bytes, stage.kept_bytes), rel=0.1)


def stage(**sizes: float) -> StageCost:
    return StageCost(forward=1, backward=2, communication=0, load=3, memory_bytes=0, sent_bytes=0, num_nodes=1, **sizes)


def test_gradients_grow_while_activations_go():
    """One stage of 10 bytes per micro-batch and 4 of gradients; scratch of 3 at the head of backward."""
    pipe, _ = planned("gpt2", "gpipe", 1)
    one = stage(param_bytes=4, activation_bytes=10, kept_bytes=6, workspace_bytes=3, first_workspace_bytes=5)
    plan = dataclasses.replace(pipe.plan, stages=(one,), ties=(), boundaries=())

    def peak(text: str) -> float:
        op = np.array(["FBIW".index(op) for op, _ in text.split()])
        return most_added(plan, op, np.zeros(len(op), int))
    assert peak("F0 F1 B0 B1") == 25                    # the first backward, on top of two
    assert peak("F0 B0 F1 B1") == 4 + 10 + 3            # later the gradients are there
    assert peak("F0 I0 F1 I1 W0 W1") == 6 + 10 + 3
    assert peak("F0 I0 W0 F1 I1 W1") == 4 + 10 + 3
    assert step_bytes(plan, build("gpipe", num_workers=1, num_microbatches=2)) == (25,)
