"""Schedules that run: what they cost, and whether they do what was predicted.

    python benchmarks/execution.py overhead     the engine's time per action under every schedule, beside 1F1B
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Callable
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from overhead import OneOfMany, best
from torch import nn

import pipeengine as pe
from pipeengine import pipeline
from pipeengine.deferral import Deferral, run
from pipeengine.executor import Executor
from pipeengine.schedules import SCHEDULES, build
from pipeengine.transport import NullTransport
from pipeengine.world import Alone

RUN = tuple(name for name in SCHEDULES if name != "dualpipe")       # two copies of the parameters: simulated only
SEVERAL = ("interleaved-1f1b", "bfs", "interleaved-zb", "zb-v", "v-half", "v-min", "dualpipe-v")
WORKERS = 2


def stages_of(schedule: str, num_workers: int = WORKERS) -> int:
    return num_workers * (2 if schedule in SEVERAL else 1)


# -- overhead ---------------------------------------------------------------------------------------------------------

WIDTH, MICROBATCHES = 16, 32


class Tiny(nn.Module):
    """Four linear layers, so that a stage has one or two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))

    def forward(self, x):
        return self.layers(x)


def alone(schedule: str, rank: int) -> tuple[Callable[[], object], int]:
    """A step of worker ``rank`` whose messages go nowhere, and how many actions it has.

    Every stage is one layer, so that the actions of every schedule compute alike.
    """
    x, y = torch.randn(MICROBATCHES, WIDTH), torch.randn(MICROBATCHES, WIDTH)
    stages = stages_of(schedule)
    model = Tiny()
    model.layers = model.layers[:stages]
    options = dict(loss_fn=F.mse_loss, num_microbatches=MICROBATCHES, schedule=schedule, num_stages=stages, check=False)
    with mock.patch.object(pipeline, "connect", lambda *_: Alone()):
        plan = pe.Pipeline(model, (x,), target=y, costs="analytic", **options).plan
    with mock.patch.object(dist, "new_group", lambda *_, **__: dist.group.WORLD), \
            mock.patch.object(pipeline, "connect", lambda *_: OneOfMany(WORKERS, plan.to_json())):
        pipe = pe.Pipeline(model, (x,), target=y, plan=plan, **options)
    pipe._transport = NullTransport()
    pipe._executor = Executor(pipe._transport, pipe._draw)
    pipe.step(x, target=y)
    return lambda: pipe.step(x, target=y), len(pipe._executor.records)


def bare(schedule: str, rank: int, *, split: bool) -> Callable[[], object]:
    """What worker ``rank`` computes in a step, in the same order and without an engine.

    With ``split`` weight gradients wait as the schedule says; else W does nothing and backward is torch's own.
    """
    order = build(schedule, num_workers=WORKERS, num_microbatches=MICROBATCHES)
    actions, last = order.actions(rank), order.topology.num_stages - 1
    halved = {(stage, k) for op, stage, k in actions if op == "I" and split}
    layers = {stage: nn.Linear(WIDTH, WIDTH) for stage in order.topology.stages_of(rank)}
    row, ones, deferral = torch.randn(1, WIDTH), torch.ones(1, WIDTH), Deferral()
    made, waiting = {}, {}

    def forward(stage: int, k: int) -> None:
        x, layer = row.detach().requires_grad_(stage > 0), layers[stage]
        if (stage, k) in halved:
            waiting[stage, k] = deferral.begin()
            out = deferral.linear(x, layer.weight, layer.bias)
        else:
            out = layer(x)
        made[stage, k] = F.mse_loss(out, ones) if stage == last else out

    def backward(stage: int, k: int) -> None:
        made.pop((stage, k)).backward(None if stage == last else ones)
    do = {"F": forward, "B": backward, "I": backward, "W": lambda *at: run(waiting.pop(at, deque()))}

    def step() -> None:
        for op, stage, k in actions:
            do[op](stage, k)
    return step


def overhead_worker(rank: int, seconds: float) -> dict[str, tuple[float, float, float, int]]:
    """Per schedule: seconds of a step of worker ``rank``, without an engine, without split backward either; its actions."""
    from torch.testing._internal.distributed import fake_pg     # registers the backend
    del fake_pg
    dist.init_process_group("fake", rank=rank, world_size=WORKERS, store=dist.HashStore())
    steps, count = {}, {}
    for schedule in RUN:
        step, count[schedule] = alone(schedule, rank)
        steps |= {schedule: step, (schedule, "split"): bare(schedule, rank, split=True),
                  (schedule, "fused"): bare(schedule, rank, split=False)}
    found = best(steps, seconds)
    return {schedule: (found[schedule], found[schedule, "split"], found[schedule, "fused"], count[schedule]) for schedule in RUN}


def overhead(options: argparse.Namespace) -> None:
    """Every process plays one worker alone; the minimum counts, which other load on the machine cannot lower."""
    found = [_again("overhead", "--seconds", str(options.seconds), "--rank", str(rank)) for rank in range(WORKERS)]
    table = {}
    for schedule in RUN:
        step, split, fused, actions = map(sum, zip(*(own[schedule] for own in found)))
        table[schedule] = [1e6 * seconds / actions for seconds in (step, step - split, split - fused, fused)]
    print("microseconds per action     all (1F1B = 1)  engine (1F1B = 1)  split  computation")
    for schedule, (step, engine, split, fused) in table.items():
        print(f"{schedule:24s} {step:6.1f} {step / table['1f1b'][0]:11.2f} {engine:7.1f} {engine / table['1f1b'][1]:10.2f} "
              f"{split:6.1f} {fused:12.1f}")


def _again(*arguments: str) -> object:
    """What this file prints, as JSON, when it is run with ``arguments``."""
    command = [sys.executable, __file__, *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


COMMANDS = {"overhead": (overhead, overhead_worker)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--seconds", type=float, default=20, help="how long each process measures")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    command, worker = COMMANDS[options.what]
    if options.rank is None:
        command(options)
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(json.dumps(worker(options.rank, options.seconds)))


if __name__ == "__main__":
    main()
