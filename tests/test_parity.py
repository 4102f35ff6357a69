"""A pipeline is invisible: loss and every gradient are those of one plain process."""
import copy
import traceback
import warnings
from functools import cache

import pytest
import torch
import zoo
from reference import assert_same_step, gradients, reference_step
from workers import launch

import pipeengine as pe

NAMED = ("gpt2", "llama", "bert", "t5", "vit")
CASES = {case.name: case for case in (*zoo.AWKWARD.values(), *zoo.hugging_face_cases())}
SPREAD = [name for name in CASES if name in zoo.AWKWARD or name.split("-")[0] in NAMED]
MICROBATCHES = 4
SCHEDULES = ("gpipe", "1f1b")
# Attention does not depend on the bias of its keys: the exact gradient is 0, what is computed is rounding alone.
NOISE = {"bart": 1e-3, "whisper": 1e-3}


def pairs(num_workers: int, rest: bool = False) -> list[tuple[str, str]]:
    """(model, schedule) to try on so many workers. ``rest`` are those left for when there is time.

    Two workers: half of the awkward models and those that everybody uses. Four: a sixth, and two that everybody uses.
    The other awkward ones run in one process, with three stages.
    """
    usual = [(name, schedule) for number, name in enumerate(SPREAD) for schedule in SCHEDULES
             if schedule == SCHEDULES[(num_workers + (name not in zoo.AWKWARD)) % 2]
             and num_workers != 3
             and (number % (2 * num_workers - 2) == 0 if name in zoo.AWKWARD
                  else num_workers == 2 and name in NAMED or name in ("gpt2", "vit"))]
    return [pair for pair in ((name, s) for name in SPREAD for s in SCHEDULES) if pair not in usual] if rest else usual


def make(name: str, schedule: str, num_stages: int | None = None) -> tuple[torch.nn.Module, pe.Pipeline]:
    case = CASES[name]
    model = case.build()
    example, target = case.split_target(case.batches[0])
    return model, pe.Pipeline(model, example, target=target, loss_fn=case.loss_fn, num_microbatches=MICROBATCHES,
                              schedule=schedule, num_stages=num_stages, costs="analytic")


def step(pipe: pe.Pipeline, name: str, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One step from no gradients: the loss, and the gradients that this worker holds."""
    for parameter in pipe.parameters():
        parameter.grad = None
    inputs, target = CASES[name].split_target(copy.deepcopy(batch))
    loss = pipe.step(**inputs, target=target) if isinstance(inputs, dict) else pipe.step(*inputs, target=target)
    return loss, {n: p.grad.clone() for n, p in pipe.named_parameters() if p.grad is not None}


def train(report, chosen) -> None:
    """On every worker: each model under its schedule, all batches. One that fails does not end the others."""
    warnings.simplefilter("ignore")
    for name, schedule in chosen:
        try:
            model, pipe = make(name, schedule)
            report((name, schedule), (pipe.plan.to_json(), [n for n, _ in pipe.named_parameters()],
                                      [step(pipe, name, batch) for batch in CASES[name].batches]))
            pipe.close()
        except Exception:
            report((name, schedule), traceback.format_exc())


@cache
def spread(num_workers: int, rest: bool) -> list[dict]:
    return launch(num_workers, train, pairs(num_workers, rest), limit=400)


@cache
def truth(name: str) -> list[tuple]:
    case, found = CASES[name], []
    model = case.build()
    for batch in case.batches:
        inputs, target = case.split_target(copy.deepcopy(batch))
        loss, grads = reference_step(model, inputs, MICROBATCHES, loss_fn=case.loss_fn, target=target)
        found.append((loss, {n: grad.clone() for n, grad in grads.items()}))
    return found


@cache
def graph_of(name: str):
    case = CASES[name]
    example, target = case.split_target(case.batches[0])
    return pe.profile(case.build(), example, num_microbatches=MICROBATCHES, costs="analytic",
                      loss_fn=case.loss_fn, target=target)


def tolerance(plan: pe.Plan, name: str) -> float:
    """Bit for bit, unless gradients of one value meet from several stages: they are added in another order.

    The value's own stage is one of them, if a node there reads it that runs after a reader on a later stage.
    """
    gradients = [value for boundary in plan.boundaries for value in boundary.gradients]
    skips = any(boundary.target != boundary.source + 1 for boundary in plan.boundaries)
    return 1e-6 if plan.ties or skips or len(gradients) != len(set(gradients)) or turns_back(plan, name) else 0.0


def turns_back(plan: pe.Plan, name: str) -> bool:
    """Whether some value is read on a later stage first, and then on an earlier one."""
    graph = graph_of(name)
    order = graph.nodes(data="order")
    readers = ([plan.stage_of[reader] for reader in sorted(graph.successors(node), key=order.__getitem__)]
               for node, wanted in graph.nodes(data="gradient") if wanted)
    return any(stages != sorted(stages) for stages in readers)


pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize(("rest", "num_workers", "name", "schedule"), [
    # Four workers run the schedules in tests/runtime/test_execution.py.
    pytest.param(rest, num_workers, name, schedule, marks=[pytest.mark.slow] * (rest or num_workers == 4))
    for rest in (False, True) for num_workers in (2, 3, 4)
    for name, schedule in pairs(num_workers, rest) if not CASES[name].random])
def test_workers_are_invisible(rest, num_workers, name, schedule):
    found = [worker.get((name, schedule), "this worker never got here") for worker in spread(num_workers, rest)]
    assert not any(isinstance(one, str) for one in found), "\n".join(map(str, found))
    plan = pe.Plan.from_json(found[0][0])
    assert all(pe.Plan.from_json(other[0]) == plan for other in found)
    assert all(held for _, held, _ in found), "every worker holds a stage"
    assert {n for _, held, _ in found for n in held} == {n for n, _ in CASES[name].build().named_parameters()}
    for number, expected in enumerate(truth(name)):
        merged: dict[str, torch.Tensor] = {}
        for _, _, steps in found:
            loss, grads = steps[number]
            assert torch.equal(loss, found[0][2][number][0]), "one loss on every worker"
            assert all(torch.equal(merged[n], grad) for n, grad in grads.items() if n in merged), "copies differ"
            merged |= grads
        assert_same_step(expected, (loss, merged), tolerance(plan, name))


OTHERS = [name for name in CASES if not CASES[name].random and name not in SPREAD]


@pytest.mark.parametrize(("name", "num_stages"), [
    pytest.param(name, num_stages, marks=[pytest.mark.slow] * (number % 2 == (num_stages == 4)))
    for number, name in enumerate(OTHERS) for num_stages in (2, 4)]
    + [(name, 3) for name in SPREAD if (name, SCHEDULES[0]) not in pairs(2) and not CASES[name].random
       and name in zoo.AWKWARD])
def test_one_process_is_invisible(name, num_stages):
    """The other architectures, and the awkward models that no two workers have run, all stages in one process."""
    model, pipe = make(name, "1f1b", num_stages)
    for batch, expected in zip(CASES[name].batches, truth(name), strict=True):
        found = step(pipe, name, batch)
        assert found[1].keys() == gradients(model).keys()
        assert_same_step(expected, found, max(tolerance(pipe.plan, name), 1e-6 if name in NOISE else 0),
                         NOISE.get(name, 0.0))
