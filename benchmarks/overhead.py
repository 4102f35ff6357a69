"""What the engine itself costs: seconds per micro-batch and stage of a model that computes almost nothing.

    python benchmarks/overhead.py

Two stages, 1F1B, 32 micro-batches of one row; every process plays one worker alone, over transports that carry
nothing. Whole steps are timed, as a training loop pays them, in turns with torch.distributed.pipelining (its hand-cut
stage and its traced front end) on the same fake process group. The minimum counts: other load on the machine cannot
lower it.
"""
import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from time import perf_counter
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import pipeengine as pe
from partitioners.tables import format_table
from pipeengine import pipeline
from pipeengine.distributed import ProcessGroupWorkers, SingleProcess, groups, transport
from pipeengine.distributed.guard import Guard
from pipeengine.distributed.local import NullTransport
from pipeengine.runtime.executor import Executor
from pipeengine.stages.message import HEADER_BYTES, Layout

WIDTH, MICROBATCHES, STAGES = 16, 32, 2
OPTIONS = dict(loss_fn=F.mse_loss, num_microbatches=MICROBATCHES, schedule="1f1b")
WHAT = {"engine": "pipeengine, captured, transport that does nothing",
        "messages": "pipeengine, captured, messages packed and unpacked too",
        "manual": "torch.distributed.pipelining, cut by hand",
        "traced": "torch.distributed.pipelining, traced",
        "bare": "forward and backward of the stage alone"}


class Tiny(nn.Module):
    """One linear layer for each stage."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.second(self.first(x))


class OneOfMany(ProcessGroupWorkers):
    """A worker whose peers never answer: what they would share is given, what they would agree on is its own word.

    Worker 0's words at construction are that no search has found the plan, the plan it was given, and the plan that is
    run. The guard has nobody to meet; what a worker tells it is written all the same.
    """

    def __init__(self, size: int, plan: object):
        self._words = [None, plan, plan]
        with mock.patch.object(Guard, "connect", lambda *_: None):
            super().__init__(range(size), None)

    def broadcast_object(self, value: object, source: int = 0) -> object:
        return value if self.rank == source or not self._words else self._words.pop(0)


def engine(rank: int, x: torch.Tensor, y: torch.Tensor, *, messages: bool) -> Callable[[], object]:
    """A step of worker ``rank``; ``messages``: packed, posted and unpacked as if they were there at once."""
    with mock.patch.object(pipeline, "connect", lambda *_, **__: SingleProcess()):
        plan = pe.Pipeline(Tiny(), (x,), target=y, num_stages=STAGES, costs="analytic", **OPTIONS).plan
    with mock.patch.object(groups, "new_process_group", lambda *_: dist.group.WORLD), \
            mock.patch.object(pipeline, "connect", lambda *_, **__: OneOfMany(STAGES, plan.to_json())):
        pipe = pe.Pipeline(Tiny(), (x,), target=y, plan=plan, **OPTIONS)
    if not messages:
        pipe._runner.transport = NullTransport()
        pipe._runner.executor = Executor(pipe._runner.transport, pipe._assembly.rng)
    return lambda: pipe.step(x, target=y)


def manual(rank: int, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    """The peer's stage, cut by hand."""
    from torch.distributed.pipelining import PipelineStage
    model = Tiny()
    given, made = x[:1].clone().requires_grad_(rank > 0), x[:1].clone().requires_grad_()
    step = peer(PipelineStage(model.second if rank else model.first, rank, STAGES, torch.device("cpu"),
                              input_args=(given,), output_args=(made,)), rank, x, y)
    with mock.patch.object(dist, "recv", lambda vote, **_: vote.fill_(1)):      # the other one agrees to static shapes
        step()
    return step


def traced(rank: int, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    """The peer's traced front end."""
    from torch.distributed.pipelining import SplitPoint
    from torch.distributed.pipelining import pipeline as trace
    pipe = trace(Tiny(), mb_args=(x[:1],), split_spec={"second": SplitPoint.BEGINNING})
    return peer(pipe.build_stage(rank, torch.device("cpu")), rank, x, y)


def peer(stage: object, rank: int, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    from torch.distributed.pipelining import Schedule1F1B
    schedule = Schedule1F1B(stage, MICROBATCHES, loss_fn=F.mse_loss)
    if rank:
        return lambda: schedule.step(target=y, return_outputs=False)
    return lambda: schedule.step(x, return_outputs=False)


def bare(rank: int, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    """Nothing but the computation of the stage, once per micro-batch."""
    layer, ones = nn.Linear(WIDTH, WIDTH), torch.ones(1, WIDTH)

    def step() -> None:
        for row, goal in zip(x.split(1), y.split(1)):
            if rank:
                F.mse_loss(layer(row.detach().requires_grad_()), goal).backward()
            else:
                layer(row).backward(ones)
    return step


def best(steps: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Minimum seconds of each step, in turns."""
    found = dict.fromkeys(steps, float("inf"))
    stop = perf_counter() + seconds
    while perf_counter() < stop:
        for name, step in steps.items():
            for _ in range(5):
                start = perf_counter()
                step()
                found[name] = min(found[name], perf_counter() - start)
    return found


def worker(rank: int, seconds: float) -> dict[str, float]:
    """Microseconds per micro-batch of each contestant on worker ``rank``."""
    torch.set_num_threads(1)
    from torch.testing._internal.distributed import fake_pg  # registers the backend
    del fake_pg
    dist.init_process_group("fake", rank=rank, world_size=STAGES, store=dist.HashStore())
    x, y = torch.randn(MICROBATCHES, WIDTH), torch.randn(MICROBATCHES, WIDTH)
    with mock.patch.object(transport, "check_header", _read_header), \
            mock.patch.object(transport, "has_arrived", lambda buffer: True):
        steps = {"engine": engine(rank, x, y, messages=False), "messages": engine(rank, x, y, messages=True),
                 "manual": manual(rank, x, y), "traced": traced(rank, x, y), "bare": bare(rank, x, y)}
        found = best(steps, seconds)
    return {name: 1e6 * value / MICROBATCHES for name, value in found.items()}


def _read_header(buffer: torch.Tensor, layout: Layout, expected: bytes) -> tuple:
    """The work of the check without its verdict: nothing has arrived."""
    if buffer.numpy()[:HEADER_BYTES].tobytes() == expected:
        raise AssertionError("a message arrived")
    return layout.orders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="how long to measure each worker")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        warnings.simplefilter("ignore")
        print(json.dumps(worker(options.rank, options.seconds)))
        return
    command = [sys.executable, __file__, "--seconds", str(options.seconds), "--rank"]
    first, last = (json.loads(subprocess.run([*command, str(rank)], check=True, stdout=subprocess.PIPE).stdout)
                   for rank in range(STAGES))
    print(format_table(("us per micro-batch", "first worker", "last worker"), [
        (what, f"{first[name]:.1f}", f"{last[name]:.1f}") for name, what in WHAT.items()]))


if __name__ == "__main__":
    main()
