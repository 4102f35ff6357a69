"""A plan that recomputes is run as it says: the blocks it names, the memory and the numbers it promises."""
import json
from functools import cache

import pytest
import torch

import pipeengine as pe
from partitioners import MemoryModel, verify
from tests import zoo
from tests.live import live
from tests.reference import gradients, worst_difference

CASE = zoo.hugging_face("gpt2")
TOKENS = torch.randint(3, zoo.VOCAB, (8, 48), generator=torch.Generator().manual_seed(0))
BATCH = dict(input_ids=TOKENS, labels=TOKENS)


@cache
def graph():
    return pe.profile(CASE.build(), BATCH, num_microbatches=8, costs="analytic")


@cache
def whole_bytes(num_stages: int) -> int:
    """What the fullest stage of the plan without a limit needs."""
    loose = pe.partition(graph(), num_stages, num_microbatches=8, memory_model=MemoryModel(2.0, "gpipe"))
    return max(stage.memory_bytes for stage in loose.stages)


@cache
def planned(num_stages: int, share: float) -> pe.Plan:
    """A plan for a device with ``share`` of the memory that the plan without a limit needs."""
    memory = share * whole_bytes(num_stages)
    plan = pe.partition(graph(), num_stages, num_microbatches=8, memory_model=MemoryModel(2.0, "gpipe"), memory=memory,
                        recompute=True)
    verify(plan, graph())
    return plan


def pipeline(plan: pe.Plan | None, num_stages: int) -> pe.Pipeline:
    return pe.Pipeline(CASE.build(), BATCH, num_microbatches=8, num_stages=num_stages, schedule="gpipe",
                       costs="analytic", check=False, plan=plan)


def test_blocks_are_modules_and_what_they_read_is_counted_once():
    made = graph()
    labels = {data["block"] for _, data in made.nodes(data=True) if "block" in data}
    assert labels == {path for path, _ in CASE.build().named_modules() if path.count(".") == 2 and ".h." in path}
    for label in labels:
        data = [data for _, data in made.nodes(data=True) if data.get("block") == label]
        assert sum(each.get("block_bytes", 0) for each in data) == 48 * CASE.build().config.n_embd * 4, "hidden states"


@pytest.mark.parametrize("share", [1.0, 0.8, 0.5])
def test_memory_is_what_the_plan_says(share):
    plan = planned(1, share)
    assert bool(plan.stages[0].recomputed) == (share < 1)
    pipe = pipeline(plan, 1)
    for _ in range(2):
        pipe.step(**BATCH)
    measured = live(lambda: pipe.step(**BATCH)).peak
    kept = 8 * plan.stages[0].activation_bytes + plan.stages[0].workspace_bytes
    assert measured == pytest.approx(kept, rel=0.1)
    assert pipe.predicted_timeline().peak_bytes[0] == pytest.approx(measured, rel=0.1)


def test_less_memory_costs_seconds_as_it_is_printed():
    plans = [planned(2, share) for share in (1.0, 0.8, 0.6)]
    counts = [sum(len(stage.recomputed) for stage in plan.stages) for plan in plans]
    assert counts[0] == 0 < counts[1] <= counts[2]
    spans = [pipeline(plan, 2).predicted_timeline().makespan for plan in plans]
    assert spans[0] < spans[1] <= spans[2]
    assert all(pe.Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan for plan in plans)


def test_numbers_are_the_same_bits():
    plan = planned(2, 0.6)
    steps = []
    for one in (None, plan):
        pipe = pipeline(one if one else pe.Plan.from_json(plan.to_json() | {"stages": [
            stage | {"recomputed": []} for stage in plan.to_json()["stages"]]}), 2)
        loss = pipe.step(**BATCH)
        steps.append((loss, dict(gradients(pipe._model))))
    assert torch.equal(steps[0][0], steps[1][0]) and worst_difference(steps[0][1], steps[1][1])[0] == 0


def test_a_plan_that_recomputes_what_there_is_not_is_refused():
    data = planned(2, 0.6).to_json()
    stages = [stage | {"recomputed": ("transformer.h.99",)} for stage in data["stages"]]
    with pytest.raises(pe.PlanError, match="recomputes 'transformer.h.99', which is no module of the model"):
        pipeline(pe.Plan.from_json(data | {"stages": stages}), 2)
