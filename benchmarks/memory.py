"""Peak memory of every worker in one step, measured by the allocator's events, against what the plan predicts.

    python benchmarks/memory.py                 # the GPT of throughput.py and a tied Llama, two to four workers
    python benchmarks/memory.py --workers 3 --models gpt

Peak means live tensor bytes that the step adds to the weights: gradients, activations, messages and what operators
need for a moment. Also printed: the most micro-batches whose activations a worker held at once, counted in those of a
whole worker, and what is still alive when the step is over, beyond the gradients.
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
from partitioners.tables import format_table
from partitioners.units import format_share
from pipeengine.simulation.timeline import OPS


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


def most_held(pipe: pe.Pipeline, worker: int) -> float:
    """The most micro-batches that ``worker`` held between forward and the end of backward in the recorded step."""
    timeline = pipe.timeline()
    mine = timeline.worker == worker
    stages = len(set(timeline.stage[mine].tolist()))
    halved = "W" in (OPS[op] for op in timeline.op[mine])
    change = {"F": 1, "W" if halved else "B": -1}
    held = most = 0
    for op in timeline.op[mine][timeline.start[mine].argsort()]:
        held += change.get(OPS[op], 0)
        most = max(most, held)
    return most / stages


def gpt() -> tuple[torch.nn.Module, dict]:
    generator = torch.Generator().manual_seed(0)
    return model(), {name: torch.randint(TOKENS, (ROWS, LENGTH), generator=generator) for name in ("tokens", "targets")}


def llama() -> tuple[torch.nn.Module, dict]:
    """Twelve layers whose embedding is also the head."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=12, hidden_size=256, intermediate_size=688, num_attention_heads=8,
                         num_key_value_heads=4, vocab_size=4096, tie_word_embeddings=True)
    tokens = torch.randint(4096, (ROWS, LENGTH))
    return LlamaForCausalLM(config), {"input_ids": tokens, "labels": tokens}


MODELS = {"gpt": gpt, "llama": llama}
SCHEDULES = ("gpipe", "1f1b", "zb-h1", "interleaved-1f1b")


def measure(name: str, schedule: str) -> dict:
    """One worker's figures for the model ``name`` under ``schedule``."""
    rank = dist.get_rank()
    made, batch = MODELS[name]()
    stages = dist.get_world_size() * (2 if schedule.startswith("interleaved") else 1)
    pipe = pe.Pipeline(made, batch, num_microbatches=MICROBATCHES, schedule=schedule, num_stages=stages,
                       costs="analytic", check=False)
    pipe.step(**batch)                          # sets things up
    for parameter in pipe.parameters():
        parameter.grad = None
    gc.collect()
    most, left = peak(allocations(lambda: pipe.step(**batch)))
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in pipe.parameters())
    dist.barrier()
    found = {"model": name, "workers": dist.get_world_size(), "schedule": schedule, "worker": rank,
             "gradients": gradients, "predicted": pipe.predicted_timeline().peak_bytes[rank], "measured": most,
             "left": left - gradients, "held": most_held(pipe, rank)}
    pipe.close()
    return found


def worker(models: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = [measure(name, schedule) for name in models for schedule in SCHEDULES]
    rows: list = [None] * dist.get_world_size()
    dist.all_gather_object(rows, found)
    if dist.get_rank() == 0:
        print(json.dumps([row for own in rows for row in own]))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.models)
        return
    rows = [row for count in options.workers for row in run(__file__, ["--models", *options.models], num_workers=count)]
    rows.sort(key=lambda row: (row["model"], row["workers"], row["schedule"], row["worker"]))
    print(format_table(("model", "schedule", "worker", "gradients, MB", "predicted, MB", "measured, MB", "ratio",
                        "micro-batches held", "left over, bytes"), [
        (row["model"], row["schedule"], f"{row['worker']} of {row['workers']}",
         *(f"{row[name] / 1e6:.1f}" for name in ("gradients", "predicted", "measured")),
         f"{row['measured'] / row['predicted']:.2f}", f"{row['held']:.1f}", f"{row['left']:,d}") for row in rows],
        left=(0, 1)))
    worst = max(abs(row["measured"] / row["predicted"] - 1) for row in rows)
    print(f"furthest from predicted: {format_share(worst)}")
    sys.exit(any(row["schedule"] == "1f1b" and row["held"] > row["workers"] - row["worker"] for row in rows))


if __name__ == "__main__":
    main()
