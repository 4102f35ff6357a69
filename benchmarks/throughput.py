"""Training a GPT on two workers against one process, and against torch.distributed.pipelining cut by hand anywhere.

    python benchmarks/throughput.py

A GPT of 8 blocks, width 384 and 8,192 tokens of vocabulary; 16 sequences of 128; two workers of one thread each; 1F1B
with 8 micro-batches. All contestants run in the same two processes, a step each in turns, so that they share what the
machine is doing. Printed is the ratio of medians to one process with one thread; a step is loss and gradients,
without the optimizer.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from time import perf_counter

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import pipeengine as pe
from partitioners.tables import format_table

BLOCKS, WIDTH, HEADS, TOKENS, ROWS, LENGTH, MICROBATCHES = 8, 384, 12, 8192, 16, 128, 8


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        split = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                 for part in self.query_key_value(self.norm_1(x)).chunk(3, dim=-1)]
        attended = F.scaled_dot_product_attention(*split, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """The contestants' model. ``targets`` make it return its loss."""

    def __init__(self, blocks: int = BLOCKS, width: int = WIDTH, heads: int = HEADS, tokens: int = TOKENS,
                 length: int = LENGTH):
        super().__init__()
        self.token, self.position = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens, bias=False)

    def forward(self, tokens, targets):
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class HandCut(nn.Module):
    """One of two stages for the peer: the first ``cut`` blocks with the embeddings, or the rest with the head."""

    def __init__(self, model: GPT, cut: int, rank: int):
        super().__init__()
        self.is_first = rank == 0
        self.blocks = model.blocks[:cut] if self.is_first else model.blocks[cut:]
        self.ends = nn.ModuleList([model.token, model.position] if self.is_first else [model.norm, model.head])

    def forward(self, x):
        if self.is_first:
            x = self.ends[0](x) + self.ends[1](torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            x = block(x)
        return x if self.is_first else self.ends[1](self.ends[0](x))


def model() -> GPT:
    torch.manual_seed(0)
    return GPT()


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def peer(rank: int, cut: int, batch: dict[str, torch.Tensor]) -> tuple[Callable[[], object], nn.Module]:
    """A step of torch.distributed.pipelining with ``cut`` blocks on the first worker."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B
    part = HandCut(model(), cut, rank)
    schedule = Schedule1F1B(PipelineStage(part, rank, 2, torch.device("cpu")), MICROBATCHES, loss_fn=cross_entropy)
    if rank == 0:
        return lambda: schedule.step(batch["tokens"], return_outputs=False), part
    return lambda: schedule.step(target=batch["targets"], return_outputs=False), part


def alone(rank: int, batch: dict[str, torch.Tensor], num_microbatches: int) -> tuple[Callable[[], object], nn.Module]:
    """A step of one plain process with one thread; the other worker does nothing meanwhile."""
    whole = model()

    def step() -> None:
        if rank == 0:
            for tokens, targets in zip(*(batch[name].chunk(num_microbatches) for name in ("tokens", "targets"))):
                (whole(tokens, targets) / num_microbatches).backward()
    return step, whole


def seconds_of(step: Callable[[], object], owner: nn.Module) -> float:
    """Seconds of one step from the moment that all are ready until all are done."""
    for parameter in owner.parameters():
        parameter.grad = None
    dist.barrier()
    start = perf_counter()
    step()
    dist.barrier()
    return perf_counter() - start


def worker(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    batch = {name: torch.randint(TOKENS, (ROWS, LENGTH), generator=generator) for name in ("tokens", "targets")}
    own = model()
    pipe = pe.Pipeline(own, batch, num_microbatches=MICROBATCHES, schedule="1f1b")
    contestants = {"pipeengine": (lambda: pipe.step(**batch), own), "one process": alone(rank, batch, 1),
                   "one process, 8 micro-batches": alone(rank, batch, MICROBATCHES)}
    contestants |= {f"torch, {cut} + {BLOCKS - cut} blocks": peer(rank, cut, batch) for cut in options.cuts}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    stop = perf_counter() + options.seconds
    going, round_number = torch.ones(1), 0
    while going:
        for name, (step, owner) in contestants.items():
            taken = seconds_of(step, owner)
            if round_number:                        # the first one sets things up
                seconds[name].append(taken)
        round_number += 1
        going.fill_(perf_counter() < stop or round_number < 3)
        dist.broadcast(going, 0)
    if rank == 0:
        print(pipe.plan, file=sys.stderr)
        print(pipe.report(), file=sys.stderr)
        predicted, measured = pipe.predicted_timeline().makespan, statistics.median(seconds["pipeengine"])
        print(json.dumps({"seconds": seconds, "predicted": predicted, "measured": measured}))
    dist.barrier()
    dist.destroy_process_group()


def run(script: str, arguments: list[str], num_workers: int = 2) -> dict:
    """What worker 0 prints as JSON."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_workers),
               script, "--worker", *arguments]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}).stdout
    return json.loads(text.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90, help="how long to measure")
    parser.add_argument("--cuts", type=int, nargs="*", default=[4, 5, 6], help="blocks on the peer's first worker")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        warnings.simplefilter("ignore")
        worker(options)
        return
    found = run(__file__, ["--seconds", str(options.seconds), "--cuts", *map(str, options.cuts)])
    seconds = found["seconds"]
    reference = statistics.median(seconds["one process"])
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    print(format_table((f"{len(seconds['one process'])} rounds", "median, s", "minimum, s", "speed", "tokens/s"), [
        (name, f"{median:.3f}", f"{min(seconds[name]):.3f}", f"{reference / median:.2f}",
         f"{ROWS * LENGTH / median:,.0f}") for name, median in medians.items()]))


if __name__ == "__main__":
    main()
