"""Every schedule, run: the order it says, the numbers of one process, the messages of the plan, and nothing left
behind."""
import traceback
import warnings
from functools import cache

import pytest
import torch
import torch.distributed as dist
import zoo
from live import live
from reference import assert_same_step, reference_step
from workers import launch

import pipeengine as pe
from pipeengine.distributed.workers import SLOTS
from pipeengine.schedules.schedule import Schedule
from pipeengine.synthesis.registry import SCHEDULES, build

MOST = 12                               # micro-batches: a batch of k rows has k
LOSS_BYTES = 4                          # all that a step may leave behind
# DualPipe keeps two copies of the parameters: it is checked and simulated, not run.
RUN = tuple(name for name in SCHEDULES if name != "dualpipe")
VEE = ("zb-v", "v-half", "v-min", "dualpipe-v")
SEVERAL = ("interleaved-1f1b", "bfs", "interleaved-zb", *VEE)
CASES = {
    case.name: case
    for case in (zoo.hugging_face("gpt2"), *map(zoo.AWKWARD.get, ("LongSkips", "TiedThrice", "Classifier")))
}
NAMES = tuple(CASES)


def batch_of(name: str, rows: int) -> dict[str, torch.Tensor]:
    """The first batch of a case, cut or continued to so many rows."""
    return {key: torch.cat([value, value.flip(0)])[:rows] for key, value in CASES[name].batches[0].items()}


@cache
def order(schedule: str, num_workers: int, stages_per_worker: int, num_microbatches: int) -> Schedule | None:
    """What the workers are to do; None for numbers of micro-batches that the schedule is not made for."""
    try:
        return build(
            schedule, num_workers=num_workers, num_microbatches=num_microbatches, stages_per_worker=stages_per_worker
        )
    except pe.ScheduleError:
        return None


@cache
def truth(name: str, rows: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    case = CASES[name]
    inputs, target = case.split_target(batch_of(name, rows))
    return reference_step(case.build(), inputs, MOST, loss_fn=case.loss_fn, target=target)


def make(name: str, schedule: str, num_stages: int, plan: pe.Plan | None = None) -> tuple[torch.nn.Module, pe.Pipeline]:
    case = CASES[name]
    model = case.build()
    example, target = case.split_target(batch_of(name, MOST))
    return model, pe.Pipeline(
        model,
        example,
        target=target,
        loss_fn=case.loss_fn,
        num_microbatches=MOST,
        schedule=schedule,
        num_stages=num_stages,
        costs="analytic",
        check=False,
        plan=plan,
    )


def step(pipe: pe.Pipeline, name: str, rows: int) -> torch.Tensor:
    inputs, target = CASES[name].split_target(batch_of(name, rows))
    return pipe.step(**inputs, target=target)


def run(pipe: pe.Pipeline, name: str, rows: int) -> tuple:
    """One step from no gradients: loss, gradients of this worker, messages, and what it did in which order."""
    for parameter in pipe.parameters():
        parameter.grad = None
    before = pipe.messages
    loss = step(pipe, name, rows)
    return (loss, {n: p.grad.clone() for n, p in pipe.named_parameters() if p.grad is not None}, pipe.messages - before,
            [record[:3] for record in pipe._runner.executor.records])


def tolerance(name: str, plan: pe.Plan) -> float:
    """Bit for bit, unless gradients of one value or one parameter meet from several stages and are added in another
    order."""
    values = [value for boundary in plan.boundaries for value in boundary.gradients]
    skips = any(boundary.target != boundary.source + 1 for boundary in plan.boundaries)
    return 1e-6 if plan.ties or skips or len(values) != len(set(values)) or name == "LongSkips" else 0.0


def predicted_messages(plan: pe.Plan, worker_of: tuple[int, ...], worker: int, rows: int) -> int:
    """One per micro-batch and boundary to another worker, and one back where a gradient is wanted."""
    away = [b for b in plan.boundaries if worker_of[b.source] != worker_of[b.target]]
    return rows * (sum(bool(b.values) for b in away if worker_of[b.source] == worker)
                   + sum(bool(b.gradients) for b in away if worker_of[b.target] == worker))


pytestmark = pytest.mark.usefixtures("quiet")


# -- all stages in one process ----------------------------------------------------------------------------------------

STAGES = 4


@cache
def local_plan(name: str) -> pe.Plan:
    return make(name, "gpipe", STAGES)[1].plan


@pytest.mark.parametrize(
    ("schedule", "name"),
    [
        pytest.param(schedule, name, marks=[] if name == NAMES[i % 4] and schedule != "auto" else pytest.mark.slow)
        for i, schedule in enumerate(RUN)
        for name in CASES
    ],
)
def test_one_process(schedule, name):
    """Four stages and every number of micro-batches, in the order of four workers, or of two where the stages lie in a
    V."""
    workers = STAGES // 2 if schedule in VEE else STAGES
    model, pipe = make(name, schedule, STAGES, local_plan(name))
    made_for = 0
    for rows in range(1, MOST + 1):
        loss, grads, _, did = run(pipe, name, rows)
        assert_same_step(truth(name, rows), (loss, grads), tolerance(name, pipe.plan))
        expected = order(schedule, workers, STAGES // workers, rows)
        if expected is not None and schedule != "auto":         # which follows the plan's costs
            made_for += 1
            held = map(expected.topology.stages_of, range(workers))
            assert [[a for a in did if a[1] in own] for own in held] == list(map(expected.actions, range(workers)))
    assert made_for >= 6 or schedule == "auto"
    assert live(lambda: step(pipe, name, MOST)).left == LOSS_BYTES


def test_auto_in_one_process():
    """Made for the plan's costs, at a few numbers of micro-batches (making it takes its time)."""
    model, pipe = make("TiedThrice", "auto", STAGES, local_plan("TiedThrice"))
    for rows in (1, 7, MOST):
        assert_same_step(
            truth("TiedThrice", rows), run(pipe, "TiedThrice", rows)[:2], tolerance("TiedThrice", pipe.plan)
        )


# -- workers ----------------------------------------------------------------------------------------------------------


def grid(num_workers: int, whole: bool) -> list[tuple[str, str, tuple[int, ...]]]:
    """(schedule, model, numbers of micro-batches): all of them, or one model and a few numbers per schedule; half
    of the schedules over four workers, and none over three."""
    found = []
    for i, schedule in enumerate(RUN):
        if not whole and (num_workers == 3 or num_workers == 4 and i % 2):
            continue
        made_for = [k for k in range(1, MOST + 1) if order(schedule, num_workers, per_worker(schedule), k) is not None]
        found += [(schedule, name, tuple(made_for if whole else {made_for[0], made_for[len(made_for) // 2], MOST}))
                  for name in (NAMES if whole else [NAMES[(i + num_workers) % len(NAMES)]])]
    return found


def per_worker(schedule: str) -> int:
    return 2 if schedule in SEVERAL else 1


def train(report, work) -> None:
    """On every worker. A case that fails is told and does not end the others."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for schedule, name, counts in work:
        try:
            model, pipe = make(name, schedule, dist.get_world_size() * per_worker(schedule))
            report(
                (schedule, name),
                (pipe.plan.to_json(), {rows: run(pipe, name, rows) for rows in counts}, left_over(pipe, name)),
            )
            pipe.close()
        except Exception:
            report((schedule, name), traceback.format_exc())


def left_over(pipe: pe.Pipeline, name: str) -> int:
    """Bytes that one more step leaves behind, less what the profiler cannot know.

    It sees one thread: when a thread of gloo lets go of a collective's tensors last, they seem to stay.
    """
    found = live(lambda: step(pipe, name, MOST)).left
    executor, transport = pipe._runner.executor, pipe._runner.transport
    assert not any((executor._saved, executor._waiting, executor._ready, transport._posted, transport._sent,
                    transport._local._held))
    agreement = 8 * SLOTS * (1 + dist.get_world_size())
    return found - agreement - sum(tie.bytes for tie in pipe.plan.ties)


@cache
def spread(num_workers: int, whole: bool) -> list[dict]:
    return launch(num_workers, train, grid(num_workers, whole), limit=900 if whole else 150)


@pytest.mark.parametrize(("num_workers", "schedule", "name", "whole"), [
    # Two workers run many models in tests/test_parity.py.
    pytest.param(num_workers, schedule, name, whole, marks=[pytest.mark.slow] * (whole or num_workers == 2))
    for whole in (False, True) for num_workers in (2, 3, 4) for schedule, name, _ in grid(num_workers, whole)])
def test_workers(num_workers, schedule, name, whole):
    found = [worker.get((schedule, name), "this worker never got here") for worker in spread(num_workers, whole)]
    assert not any(isinstance(one, str) for one in found), "\n".join(map(str, found))
    plan = pe.Plan.from_json(found[0][0])
    assert not [left for *_, left in found if left > LOSS_BYTES]
    for rows in found[0][1]:
        expected = order(schedule, num_workers, per_worker(schedule), rows)
        merged: dict[str, torch.Tensor] = {}
        for worker, (_, steps, _) in enumerate(found):
            loss, grads, messages, did = steps[rows]
            assert torch.equal(loss, found[0][1][rows][0]), "one loss on every worker"
            assert all(torch.equal(merged[n], grad) for n, grad in grads.items() if n in merged), "copies differ"
            assert messages == predicted_messages(plan, expected.topology.worker_of, worker, rows)
            assert did == expected.actions(worker) or schedule == "auto"
            merged |= grads
        assert_same_step(truth(name, rows), (loss, merged), tolerance(name, plan))
