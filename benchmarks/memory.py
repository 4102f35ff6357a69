"""Peak memory of every worker in one step, measured by the allocator's events, against what the plan predicts.

    python benchmarks/memory.py                 # the GPT of throughput.py, three workers, 1F1B and GPipe

Peak means live tensor bytes that the step adds to the weights: gradients, activations, messages and what operators need for a
moment. Also printed: the most micro-batches whose activations a worker held at once (1F1B allows stages - rank), and what is
still alive when the step is over, beyond the gradients.
"""
import argparse
import gc
import json
import sys
import warnings

import torch
import torch.distributed as dist
from throughput import LENGTH, MICROBATCHES, ROWS, TOKENS, model, run
from torch.profiler import ProfilerActivity, profile

import pipeengine as pe


def allocations(step) -> list[int]:
    """What each allocation (positive) and release (negative) of ``step`` was, in bytes, in order of time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
        gc.collect()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def peak(changes: list[int]) -> tuple[int, int]:
    """The most that is alive at once, and what is alive in the end."""
    total = most = 0
    for change in changes:
        total += change
        most = max(most, total)
    return most, total


def most_held(pipe: pe.Pipeline, worker: int) -> int:
    """The most micro-batches that ``worker`` held between their forward and their backward in the recorded step."""
    timeline = pipe.timeline()
    mine = timeline.worker == worker
    change = {"F": 1, "B": -1}
    names = "FB"
    held = most = 0
    for op in timeline.op[mine][timeline.start[mine].argsort()]:
        held += change.get(names[op], 0)
        most = max(most, held)
    return most


def measure(schedule: str) -> dict:
    """One worker's figures under ``schedule``."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    batch = {name: torch.randint(TOKENS, (ROWS, LENGTH), generator=generator) for name in ("tokens", "targets")}
    pipe = pe.Pipeline(model(), batch, num_microbatches=MICROBATCHES, schedule=schedule, costs="analytic")
    pipe.step(**batch)                          # sets things up
    for parameter in pipe.parameters():
        parameter.grad = None
    gc.collect()
    most, left = peak(allocations(lambda: pipe.step(**batch)))
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in pipe.parameters())
    dist.barrier()
    found = {"schedule": schedule, "worker": rank, "predicted": gradients + activations(pipe, rank), "measured": most,
             "left": left - gradients, "held": most_held(pipe, rank)}
    pipe.close()
    return found


def activations(pipe: pe.Pipeline, stage: int) -> float:
    """Bytes that the plan predicts for ``stage``, which has a worker of its own, without weights, gradients and optimizer."""
    cost, setting = pipe.plan.stages[stage], pipe.plan.setting
    in_flight = setting.memory_model.in_flight(stage, pipe.plan.num_stages, setting.num_microbatches)
    workspace = cost.memory_bytes - setting.memory_model.parameter_factor * cost.param_bytes - in_flight * cost.activation_bytes
    return pipe.predicted_timeline().peak_bytes[stage] + workspace


def worker() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = [measure(schedule) for schedule in ("1f1b", "gpipe")]
    rows: list = [None] * dist.get_world_size()
    dist.all_gather_object(rows, found)
    if dist.get_rank() == 0:
        print(json.dumps([row for own in rows for row in own]))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker()
        return
    rows = run(__file__, [], num_workers=options.workers)
    print("schedule  worker  predicted MB  measured MB  ratio  micro-batches held  left over, bytes")
    for row in sorted(rows, key=lambda row: (row["schedule"], row["worker"])):
        print(f"{row['schedule']:8s} {row['worker']:7d} {row['predicted'] / 1e6:13.1f} {row['measured'] / 1e6:12.1f} "
              f"{row['measured'] / row['predicted']:6.2f} {row['held']:19d} {row['left']:17,d}")
    sys.exit(any(row["schedule"] == "1f1b" and row["held"] > options.workers - row["worker"] for row in rows))


if __name__ == "__main__":
    main()
