"""What a micro-batch costs over gloo when nothing is computed: two workers, beside torch.distributed.pipelining.

    python benchmarks/messages.py

The model and the settings of overhead.py (two linear layers, 1F1B, 32 micro-batches of one row), but over real
messages. Contestants take steps in turns in the same two processes. A step of a pipeline is a training loop's: it
agrees on the batch and shares the loss, which the peer does not.
"""
import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from time import perf_counter

import torch
import torch.distributed as dist
import torch.nn.functional as F
from overhead import MICROBATCHES, OPTIONS, WIDTH, Tiny
from throughput import run

import pipeengine as pe
from partitioners.tables import format_table


def peer(rank: int, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    """A step of torch.distributed.pipelining, cut by hand."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B
    model = Tiny()
    stage = PipelineStage(model.second if rank else model.first, rank, 2, torch.device("cpu"))
    schedule = Schedule1F1B(stage, MICROBATCHES, loss_fn=F.mse_loss)
    if rank:
        return lambda: schedule.step(target=y, return_outputs=False)
    return lambda: schedule.step(x, return_outputs=False)


def worker(seconds: float) -> None:
    """Measure on this worker; worker 0 prints seconds of the steps of each contestant as JSON."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    x, y = torch.randn(MICROBATCHES, WIDTH), torch.randn(MICROBATCHES, WIDTH)
    pipe = pe.Pipeline(Tiny(), (x,), target=y, costs="analytic", **OPTIONS)
    steps = {"pipeengine": lambda: pipe.step(x, target=y), "torch, cut by hand": peer(rank, x, y)}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    stop, going = perf_counter() + seconds, torch.ones(1)
    while going:
        for name, step in steps.items():
            for repetition in range(6):
                dist.barrier()
                start = perf_counter()
                step()
                dist.barrier()
                if repetition:                      # the first one finds the caches of another contestant
                    taken[name].append(perf_counter() - start)
        going.fill_(perf_counter() < stop)
        dist.broadcast(going, 0)
    if rank == 0:
        print(json.dumps(taken))
    pipe.close()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="how long to measure")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        warnings.simplefilter("ignore")
        worker(options.seconds)
        return
    taken = run(__file__, ["--seconds", str(options.seconds)])
    print(format_table((f"us per micro-batch, of {len(taken['pipeengine']):,} steps", "median", "minimum"), [
        (name, *(f"{1e6 * each / MICROBATCHES:.0f}" for each in (statistics.median(seconds), min(seconds))))
        for name, seconds in taken.items()]))


if __name__ == "__main__":
    main()
