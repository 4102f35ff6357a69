"""Schedules that run: what they cost, and whether they do what was predicted.

    python benchmarks/execution.py overhead     the engine's time per action under every schedule, beside 1F1B
    python benchmarks/execution.py table        schedules x (equal, heavy head) x micro-batches, simulated and measured
    python benchmarks/execution.py table --svg docs/execution.svg       the same, drawn

The table is that of a GPT on two workers of one thread each over gloo, with costs that are measured once before; a
stage takes 5 ms and more. A heavy head is a vocabulary of 12,288 tokens, with equal numbers of blocks per stage as by
hand, and as planned. Printed is the fastest of many steps, taken in turns: other load on the machine can only make a
step slower.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from unittest import mock

import networkx
import torch
import torch.distributed as dist
import torch.nn.functional as F
from overhead import OneOfMany, best
from throughput import GPT, run
from torch import nn

import pipeengine as pe
from partitioners.graph.cost_graph import topological_order
from partitioners.plan.plan import Setting
from partitioners.pricing import build_plan
from partitioners.tables import format_table
from partitioners.units import format_seconds, format_share
from pipeengine import pipeline
from pipeengine.autograd.deferral import Deferral
from pipeengine.autograd.deferral import run as run_deferred
from pipeengine.distributed import SingleProcess, groups
from pipeengine.distributed.local import NullTransport
from pipeengine.runtime.executor import Executor
from pipeengine.synthesis.registry import SCHEDULES, build

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
    with mock.patch.object(pipeline, "connect", lambda *_, **__: SingleProcess()):
        plan = pe.Pipeline(model, (x,), target=y, costs="analytic", **options).plan
    with mock.patch.object(groups, "new_process_group", lambda *_: dist.group.WORLD), \
            mock.patch.object(pipeline, "connect", lambda *_, **__: OneOfMany(WORKERS, plan.to_json())):
        pipe = pe.Pipeline(model, (x,), target=y, plan=plan, **options)
    pipe._runner.transport = NullTransport()
    pipe._runner.executor = Executor(pipe._runner.transport, pipe._assembly.rng)
    pipe.step(x, target=y)
    return lambda: pipe.step(x, target=y), len(pipe._runner.executor.records)


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
    do = {"F": forward, "B": backward, "I": backward, "W": lambda *at: run_deferred(waiting.pop(at, deque()))}

    def step() -> None:
        for op, stage, k in actions:
            do[op](stage, k)
    return step


def overhead_worker(options: argparse.Namespace) -> dict[str, tuple[float, float, float, int]]:
    """Per schedule: seconds of a step of one worker, without an engine, without split backward either; its actions."""
    rank = options.rank
    from torch.testing._internal.distributed import fake_pg  # registers the backend
    del fake_pg
    dist.init_process_group("fake", rank=rank, world_size=WORKERS, store=dist.HashStore())
    steps, count = {}, {}
    for schedule in RUN:
        step, count[schedule] = alone(schedule, rank)
        steps |= {schedule: step, (schedule, "split"): bare(schedule, rank, split=True),
                  (schedule, "fused"): bare(schedule, rank, split=False)}
    found = best(steps, options.seconds)
    return {schedule: (found[schedule], found[schedule, "split"], found[schedule, "fused"], count[schedule])
            for schedule in RUN}


def overhead(options: argparse.Namespace) -> None:
    """Every process plays one worker alone; the minimum counts, which other load on the machine cannot lower."""
    found = [_again("overhead", "--seconds", str(options.seconds), "--rank", str(rank)) for rank in range(WORKERS)]
    table = {}
    for schedule in RUN:
        step, split, fused, actions = map(sum, zip(*(own[schedule] for own in found)))
        table[schedule] = [1e6 * seconds / actions for seconds in (step, step - split, split - fused, fused)]
    rows = [(schedule, f"{step:.1f}", f"{step / table['1f1b'][0]:.2f}", f"{engine:.1f}",
             f"{engine / table['1f1b'][1]:.2f}", f"{split:.1f}", f"{fused:.1f}")
            for schedule, (step, engine, split, fused) in table.items()]
    print(format_table(("us per action", "all", "of 1F1B's", "engine", "of 1F1B's", "split", "computation"), rows))


def _again(*arguments: str) -> object:
    """What this file prints, as JSON, when it is run with ``arguments``."""
    command = [sys.executable, __file__, *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


# -- simulated and measured -------------------------------------------------------------------------------------------

BLOCKS, LENGTH, ROWS_EACH = 8, 64, 2            # rows of a micro-batch
MODELS = {"equal": 256, "heavy head": 12288, "heavy head, planned": 12288}         # tokens of the vocabulary
COUNTS = (4, 8)


def gpt(kind: str) -> tuple[nn.Module, Callable[[int], dict]]:
    """The model, and a batch of so many micro-batches for it."""
    torch.manual_seed(0)
    tokens = MODELS[kind]

    def batch(count: int) -> dict:
        generator = torch.Generator().manual_seed(0)
        return {name: torch.randint(tokens, (count * ROWS_EACH, LENGTH), generator=generator)
                for name in ("tokens", "targets")}
    return GPT(blocks=BLOCKS, width=256, heads=8, tokens=tokens, length=LENGTH), batch


def by_hand(graph: networkx.DiGraph, stages: int, count: int) -> pe.Plan:
    """Equal numbers of blocks per stage; what comes before them on the first, what comes after on the last."""
    stage_of, stage = {}, 0
    for node in topological_order(graph):
        found = re.match(r"blocks\.(\d+)", str(node))
        stage = int(found[1]) * stages // BLOCKS if found else stage
        stage_of[node] = stages - 1 if re.match(r"norm|head|:cross", str(node)) else stage
    setting = Setting(stage_devices=(0,) * stages, num_microbatches=count)
    return build_plan(graph, stage_of, setting, lower_bound=0.0, proof="by hand")


def trained(kind: str, count: int, schedule: str, graph: networkx.DiGraph) -> tuple[Callable[[], object], pe.Pipeline]:
    model, batch = gpt(kind)
    inputs, stages = batch(count), stages_of(schedule)
    plan = None if "planned" in kind else by_hand(graph, stages, count)
    pipe = pe.Pipeline(model, inputs, num_microbatches=count, schedule=schedule, num_stages=stages,
                       costs=graph, plan=plan, check=False)
    return lambda: pipe.step(**inputs), pipe


def table_worker(options: argparse.Namespace) -> list[dict]:
    """Seconds of a step of every schedule, predicted before it and measured, fastest and median."""
    dist.init_process_group("gloo")
    rows = []
    for kind in options.kinds:
        model, batch = gpt(kind)
        graph = pe.profile(model, batch(4), num_microbatches=4)
        for count in options.counts:
            rows += [{"kind": kind, "count": count, **row} for row in contest(kind, count, graph, options.seconds)]
    dist.barrier()
    dist.destroy_process_group()
    return rows


def is_made_for(schedule: str, count: int) -> bool:
    with contextlib.suppress(pe.ScheduleError):
        return build(schedule, num_workers=WORKERS, num_microbatches=count) is not None
    return False


def contest(kind: str, count: int, graph: networkx.DiGraph, seconds: float) -> list[dict]:
    """All schedules that are made for ``count`` micro-batches, a step each in turns."""
    pipes = {}
    for schedule in RUN:
        if schedule == "auto" or is_made_for(schedule, count):
            pipes[schedule] = trained(kind, count, schedule, graph)
    taken: dict[str, list[float]] = {schedule: [] for schedule in pipes}
    going, begin = torch.ones(1), perf_counter()
    while going:
        for schedule, (step, pipe) in pipes.items():
            for parameter in pipe.parameters():
                parameter.grad = None
            dist.barrier()
            start = perf_counter()
            step()
            dist.barrier()
            taken[schedule].append(perf_counter() - start)
        going.fill_(perf_counter() - begin < seconds or len(taken["1f1b"]) < 4)
        dist.broadcast(going, 0)
    rows = []
    for schedule, (_, pipe) in pipes.items():
        timeline = pipe.predicted_timeline()
        stages = [stage.forward + stage.backward for stage in pipe.plan.stages]
        rows.append({"schedule": schedule, "predicted": timeline.makespan, "fastest": min(taken[schedule][1:]),
                     "median": statistics.median(taken[schedule][1:]), "stages": stages})
        pipe.close()
    return rows


def table(options: argparse.Namespace) -> None:
    """Printed per cell: simulated milliseconds, measured ones, and by how much they differ."""
    rows = json.loads(options.data.read_text()) if options.data and options.data.exists() else []
    missing = [(kind, count) for kind in options.kinds for count in options.counts
               if not any((row["kind"], row["count"]) == (kind, count) for row in rows)]
    for kind, count in missing:
        rows += run(__file__, ["table", "--seconds", str(options.seconds), "--kinds", kind, "--counts", str(count)])
    if options.data:
        options.data.write_text(json.dumps(rows, indent=1) + "\n")
    cells = {(row["kind"], row["count"], row["schedule"]): row for row in rows}
    for kind in options.kinds:
        print(f"\n{kind}: milliseconds of a step, simulated / measured (difference)")
        print(format_table(("", *(f"{count} micro-batches" for count in options.counts)), [
            (schedule, *(_cell(cells.get((kind, count, schedule))) for count in options.counts)) for schedule in RUN]))
    off = [row["fastest"] / row["predicted"] - 1 for row in rows]
    print(f"\nmeasured beside simulated: {format_share(min(off), signed=True)} to "
          f"{format_share(max(off), signed=True)}, median {format_share(statistics.median(off), signed=True)}; "
          f"stages take {format_seconds(min(min(row['stages']) for row in rows))} and more")
    if options.svg:
        options.svg.write_text(draw(cells, options.kinds, options.counts))


def _cell(row: dict | None) -> str:
    if row is None:
        return "-"
    return (f"{1e3 * row['predicted']:.0f} / {1e3 * row['fastest']:.0f} "
            f"({format_share(row['fastest'] / row['predicted'] - 1, 0, signed=True)})")


# -- the picture ------------------------------------------------------------------------------------------------------

NAMES, PANEL, ROW, TOP, GAP = 118, 330, 15, 54, 40      # pixels


def draw(cells: dict[tuple[str, int, str], dict], kinds: Sequence[str], counts: Sequence[int]) -> str:
    """Panels of bars: measured seconds, with a line where the simulation ended; the quickest schedule is dark."""
    height = len(RUN) * ROW + GAP
    width, whole = NAMES + len(counts) * PANEL + 12, TOP + len(kinds) * height
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {whole}" width="{width}" height="{whole}" '
             'font-family="Helvetica, Arial, sans-serif" font-size="11">',
             '<rect width="100%" height="100%" fill="white"/>',
             _text(12, 20, "Milliseconds of a step: bars measured (dark: within 1 % of the fastest), "
                   "black lines simulated before", size=14)]
    for row, kind in enumerate(kinds):
        for column, count in enumerate(counts):
            own = {schedule: cells[kind, count, schedule] for schedule in RUN if (kind, count, schedule) in cells}
            parts += _panel(NAMES + column * PANEL, TOP + row * height, f"{kind}, {count} micro-batches",
                            own, column == 0)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(left: int, top: int, title: str, cells: dict[str, dict], named: bool) -> list[str]:
    most = max(max(row["fastest"], row["predicted"]) for row in cells.values())
    least = min(row["fastest"] for row in cells.values())
    parts = [_text(left, top - 4, title, bold=True)]
    for number, schedule in enumerate(RUN):
        y = top + number * ROW + 2
        if named:
            parts.append(_text(left - 8, y + 9, schedule, anchor="end"))
        row = cells.get(schedule)
        if row is None:
            parts.append(_text(left + 2, y + 9, "not made for so few", color="#888"))
            continue
        scale = (PANEL - 70) / most
        color = "#1f4e79" if row["fastest"] <= 1.01 * least else "#9dc3e6"
        x = left + row["predicted"] * scale
        parts += [f'<rect x="{left}" y="{y}" width="{row["fastest"] * scale:.1f}" height="{ROW - 4}" fill="{color}"/>',
                  f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 1}" y2="{y + ROW - 3}" stroke="black" stroke-width="2"/>',
                  _text(left + max(row["fastest"], row["predicted"]) * scale + 5, y + 9, f"{1e3 * row['fastest']:.0f}")]
    return parts


def _text(x: float, y: float, text: str, *, size: int = 11, anchor: str = "start",
          color: str = "black", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{color}"{weight}>{text}</text>'


COMMANDS = {"overhead": (overhead, overhead_worker), "table": (table, table_worker)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--seconds", type=float, default=None,
                        help="how long to measure: each process, or each cell of nine")
    parser.add_argument("--data", type=Path, help="JSON file to read the table's figures from, or to write them to")
    parser.add_argument("--kinds", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--counts", nargs="+", type=int, choices=COUNTS, default=list(COUNTS))
    parser.add_argument("--svg", type=Path, help="draw the table")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.seconds = options.seconds or {"overhead": 20, "table": 8}[options.what]
    command, worker = COMMANDS[options.what]
    if options.rank is None and not options.worker:
        command(options)
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = worker(options)
    if options.rank is not None or os.environ["RANK"] == "0":
        print(json.dumps(found))


if __name__ == "__main__":
    main()
