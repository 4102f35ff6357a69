"""What compiling gains: a step of the GPT of `make train`, eager and compiled, over stages and in one plain process.

    OMP_NUM_THREADS=1 python benchmarks/compiled.py

All run in this process, a step of each in turns; a step is the forward and backward of a batch in micro-batches,
without the optimizer. Costs are estimated, so that the same cut is timed each time. The minimum counts: other load on
the machine cannot lower it. Gradients are compared as well.
"""
import argparse
import copy
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

import pipeengine as pe

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from train_gpt import GPT  # noqa: E402

VOCABULARY = 8_192


def plain(model: torch.nn.Module, batch: dict, num_microbatches: int, compiled: bool) -> Callable[[], torch.Tensor]:
    """One process that adds gradients up over the micro-batches."""
    run = torch.compile(model) if compiled else model
    parts = [dict(zip(batch, part)) for part in zip(*(one.tensor_split(num_microbatches) for one in batch.values()))]

    def step() -> torch.Tensor:
        total = torch.zeros(())
        for part in parts:
            loss = run(**part) / num_microbatches
            loss.backward()
            total += loss.detach()
        return total
    return step


def pipelined(model: torch.nn.Module, batch: dict, num_microbatches: int, compiled: bool, options: argparse.Namespace
              ) -> Callable[[], torch.Tensor]:
    """The same over stages."""
    pipe = pe.Pipeline(model, batch, num_microbatches=num_microbatches, num_stages=options.stages, compile=compiled,
                       schedule=options.schedule, costs="analytic", check=False)
    return lambda: pipe.step(**batch)


def timed(step: Callable[[], torch.Tensor], model: torch.nn.Module) -> tuple[float, torch.Tensor]:
    """Seconds of a step, from no gradients, and its loss."""
    model.zero_grad()
    start = perf_counter()
    loss = step()
    return perf_counter() - start, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--schedule", default="1f1b")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="as one line of JSON")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = GPT(VOCABULARY, options.width, options.blocks, heads=options.width // 32, length=options.length)
    tokens = torch.randint(VOCABULARY, (options.rows, options.length + 1))
    batch = dict(tokens=tokens[:, :-1].contiguous(), targets=tokens[:, 1:].contiguous())
    steps, models = {}, {}
    for name, make in (("plain", plain), ("pipelined", lambda *given: pipelined(*given, options))):
        for compiled in (False, True):
            key = f"{name}, {'compiled' if compiled else 'eager'}"
            models[key] = copy.deepcopy(model)
            steps[key] = make(models[key], batch, options.microbatches, compiled)
    first = {key: timed(step, models[key]) for key, step in steps.items()}
    taken: dict[str, list[float]] = {key: [] for key in steps}
    for _ in range(options.repeats):
        for key, step in steps.items():
            taken[key].append(timed(step, models[key])[0])
    report(options, first, taken, {key: difference(models[key], models["plain, eager"]) for key in models})


def difference(model: torch.nn.Module, other: torch.nn.Module) -> float:
    """The largest difference of any gradient, as a share of the largest entry of its tensor."""
    return max(float((mine.grad - theirs.grad).abs().max() / theirs.grad.abs().max())
               for mine, theirs in zip(model.parameters(), other.parameters(), strict=True))


def report(options: argparse.Namespace, first: dict, taken: dict, gradients: dict) -> None:
    rows = {key: dict(seconds=min(seconds), median=median(seconds), first_step=first[key][0], loss=float(first[key][1]),
                      gradient=gradients[key]) for key, seconds in taken.items()}
    gain = {name: rows[f"{name}, eager"]["seconds"] / rows[f"{name}, compiled"]["seconds"]
            for name in ("plain", "pipelined")}
    if options.json:
        print(json.dumps(dict(rows=rows, gain=gain, options=vars(options))))
        return
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for key, row in rows.items():
        print(f"{key:20}  {row['seconds']:.3f} s at the least, median {row['median']:.3f} s, first step "
              f"{row['first_step']:.1f} s, loss {row['loss']:.6f}, gradients within {row['gradient']:.1e}")
    print(", ".join(f"{name} gains {value:.2f} times" for name, value in gain.items()))


if __name__ == "__main__":
    main()
