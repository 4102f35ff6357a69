"""What travels is what the plan says and no more: one activation per micro-batch and boundary, one gradient back."""
import warnings
from functools import cache

import pytest
import torch.distributed as dist
import zoo
from workers import launch

import pipeengine as pe

MICROBATCHES = 4
CASES = {case.name: case for case in (
    zoo.hugging_face("gpt2"), zoo.hugging_face("gpt2", tied=False), zoo.hugging_face("llama"),
    *(zoo.AWKWARD[name] for name in (
        "LongSkips", "ThreeConsumers", "IntegerBoundary", "LateInput", "EncoderDecoder", "TiedThrice")))}
CHAINS = ("gpt2", "gpt2-untied", "llama")


# Messages do not depend on the schedule; the chains are tried under both.
PAIRS = [(name, schedule) for number, name in enumerate(CASES) for schedule in ("gpipe", "1f1b")
         if name in CHAINS or schedule == ("gpipe", "1f1b")[number % 2]]


def count(report) -> None:
    """Messages and bytes that this worker sends in each of two steps of the first batch, and in an evaluation of it."""
    warnings.simplefilter("ignore")
    for name in CASES:
        for schedule in [schedule for chosen, schedule in PAIRS if chosen == name]:
            batch = CASES[name].batches[0]
            pipe = pe.Pipeline(CASES[name].build(), batch, num_microbatches=MICROBATCHES, schedule=schedule,
                               costs="analytic")
            calls, seen = [lambda: pipe.step(**batch)] * 2 + [lambda: pipe.evaluate(**batch)], [(0, 0)]
            for call in calls:
                call()
                seen.append((pipe.messages, pipe.message_bytes))
            deltas = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(seen, seen[1:])]
            report((name, schedule), (pipe.plan.to_json(), deltas))
            pipe.close()
    report("done", dist.get_rank())


@cache
def sent(num_workers: int) -> list[dict]:
    return launch(num_workers, count, limit=100)


@pytest.mark.parametrize(("name", "schedule"), PAIRS)
@pytest.mark.parametrize("num_workers", (pytest.param(2, marks=pytest.mark.slow), 3))
def test_traffic_is_the_plans(num_workers, name, schedule):
    found = [worker[name, schedule] for worker in sent(num_workers)]
    plan = pe.Plan.from_json(found[0][0])
    for rank, (_, deltas) in enumerate(found):
        forward = [b for b in plan.boundaries if b.source == rank]
        back = [b for b in plan.boundaries if b.target == rank and b.gradients]
        step = (MICROBATCHES * (len(forward) + len(back)),
                MICROBATCHES * (sum(b.bytes for b in forward) + sum(b.gradient_bytes for b in back)))
        assert deltas[0] == deltas[1] == step, f"worker {rank} sent {deltas}, the plan says {step}"


@pytest.mark.parametrize("schedule", ("gpipe", "1f1b"))
@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("num_workers", (pytest.param(2, marks=pytest.mark.slow), 3))
def test_a_chain_of_blocks_sends_the_minimum(num_workers, name, schedule):
    """One hidden state of (rows, tokens, width) floats forward over each cut, its gradient back; nothing else."""
    found = [worker[name, schedule] for worker in sent(num_workers)]
    plan = pe.Plan.from_json(found[0][0])
    rows, tokens = CASES[name].batches[0]["input_ids"].shape
    hidden = rows // MICROBATCHES * tokens * 32 * 4
    assert [(b.source, b.target, b.bytes, b.gradient_bytes) for b in plan.boundaries] == \
        [(k, k + 1, hidden, hidden) for k in range(num_workers - 1)]
    for rank, (_, deltas) in enumerate(found):
        cuts = (rank < num_workers - 1) + (rank > 0)
        assert deltas[:2] == [(MICROBATCHES * cuts, MICROBATCHES * cuts * hidden)] * 2


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("num_workers", (pytest.param(2, marks=pytest.mark.slow), 3))
def test_an_evaluation_sends_activations_alone(num_workers, name):
    for rank, worker in enumerate(sent(num_workers)):
        assert worker[name, "1f1b"][1][2][0] == MICROBATCHES * (rank < num_workers - 1)
