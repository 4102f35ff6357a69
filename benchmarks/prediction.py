"""The time of a step, predicted before it against measured.

    python benchmarks/prediction.py

The GPT of throughput.py on two workers, 1F1B, 8 micro-batches; costs measured by the pipeline itself when it is made.
The wall clock tells the truth on a machine that has nothing else to do; the processor's own time, printed beside it
per worker, is what the work took whatever else was running.
"""
import argparse
import json
import statistics
import warnings
from time import perf_counter, thread_time

import torch
import torch.distributed as dist
from throughput import LENGTH, MICROBATCHES, ROWS, TOKENS, model, run

import pipeengine as pe
from partitioners.tables import format_table
from partitioners.units import format_share


def worker(seconds: float) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(0)
    batch = {name: torch.randint(TOKENS, (ROWS, LENGTH), generator=generator) for name in ("tokens", "targets")}
    pipe = pe.Pipeline(model(), batch, num_microbatches=MICROBATCHES, schedule="1f1b")
    pipe.step(**batch)
    wall, processor = [], []
    going, start = torch.ones(1), perf_counter()
    while going:
        dist.barrier()
        begin, used = perf_counter(), thread_time()
        pipe.step(**batch)
        processor.append(thread_time() - used)
        dist.barrier()
        wall.append(perf_counter() - begin)
        going.fill_(perf_counter() - start < seconds)
        dist.broadcast(going, 0)
    own: list = [None] * dist.get_world_size()
    dist.all_gather_object(own, min(processor))
    if dist.get_rank() == 0:
        predicted = pipe.predicted_timeline()
        print(json.dumps({"predicted": predicted.makespan, "busy": predicted.busy.tolist(),
                          "wall": wall, "processor": own}))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30, help="how long to measure")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.seconds)
        return
    found = run(__file__, ["--seconds", str(options.seconds)])
    predicted = found["predicted"]
    rows = [("step, median", predicted, statistics.median(found["wall"])),
            ("step, fastest", predicted, min(found["wall"]))]
    rows += [(f"worker {rank}, processor", busy, used)
             for rank, (busy, used) in enumerate(zip(found["busy"], found["processor"]))]
    print(format_table(("", "predicted, s", "measured, s", "difference"), [
        (name, f"{expected:.3f}", f"{measured:.3f}", format_share(expected / measured - 1, signed=True))
        for name, expected, measured in rows]))


if __name__ == "__main__":
    main()
