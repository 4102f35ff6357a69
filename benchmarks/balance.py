"""What a plan promises, kept? The busiest stage and the speed over equal layers, predicted against measured.

    python benchmarks/balance.py

The GPT that `make train` trains, and a GPT-2 from Hugging Face whose embedding is also its head (tied, so both stages
hold it); two workers of one thread each, 1F1B with 8 micro-batches. Two pipelines in the same two processes take ten
steps each in turns: one runs the planner's cut, the other has as many blocks on each worker, embeddings first and
head last. Both are priced by the same measured costs.
"""
import argparse
import json
import statistics
import sys
import warnings
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
from throughput import run
from torch import nn

import pipeengine as pe
from partitioners.pricing import build_plan
from partitioners.tables import format_table
from partitioners.units import format_share

MICROBATCHES, ROWS, LENGTH, TOKENS = 8, 16, 128, 8192


def gpt() -> tuple[nn.Module, dict[str, torch.Tensor], str]:
    """The model of examples/train_gpt.py."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    from train_gpt import GPT
    tokens, targets = torch.randint(TOKENS, (2, ROWS, LENGTH))
    return GPT(TOKENS, 256, 8, heads=8, length=LENGTH), {"tokens": tokens, "targets": targets}, "blocks."


def tied_gpt2() -> tuple[nn.Module, dict[str, torch.Tensor], str]:
    """A small GPT-2; wte.weight is the head's weight too."""
    from transformers import GPT2Config, GPT2LMHeadModel
    config = GPT2Config(n_embd=384, n_layer=10, n_head=6, vocab_size=TOKENS, n_positions=LENGTH,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    tokens = torch.randint(TOKENS, (ROWS, LENGTH))
    return GPT2LMHeadModel(config), {"input_ids": tokens, "labels": tokens}, "transformer.h."


MODELS = {"GPT of make train": gpt, "tied GPT-2": tied_gpt2}


def equal_layers(plan: pe.Plan, graph, prefix: str) -> pe.Plan:
    """As many blocks on each stage; what stands between blocks stays with the block before it."""
    numbers = {name: int(name.removeprefix(prefix).partition(":")[0].partition(".")[0])
               for name in plan.stage_of if name.startswith(prefix)}
    blocks, stage, stage_of = max(numbers.values()) + 1, 0, {}
    for name in plan.stage_of:
        stage = max(stage, numbers.get(name, 0) * plan.num_stages // blocks)
        stage_of[name] = stage
    return build_plan(graph, stage_of, plan.setting, lower_bound=plan.lower_bound, proof=plan.proof)


def ten_steps(pipe: pe.Pipeline, batch: dict[str, torch.Tensor]) -> tuple[list[float], list[float]]:
    """Seconds of ten steps, and the busy seconds of each worker in the last of them."""
    seconds = []
    for _ in range(10):
        dist.barrier()
        start = perf_counter()
        pipe.step(**batch)
        dist.barrier()
        seconds.append(perf_counter() - start)
        for parameter in pipe.parameters():
            parameter.grad.zero_()
    return seconds, pipe.timeline().busy.tolist()


def worker(name: str, rounds: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model, batch, prefix = MODELS[name]()
    options = {"num_microbatches": MICROBATCHES, "schedule": "1f1b"}
    graph = pe.profile(model, batch, num_microbatches=MICROBATCHES)
    dist.barrier()
    planned = pe.Pipeline(model, batch, costs=graph, **options)
    other, _, _ = MODELS[name]()
    equal = pe.Pipeline(other, batch, costs=graph, plan=equal_layers(planned.plan, graph, prefix), **options)
    pipes, found = {"planned": planned, "equal": equal}, {}
    for pipe in pipes.values():
        pipe.step(**batch)
    for _ in range(rounds):
        for label, pipe in pipes.items():
            seconds, busy = ten_steps(pipe, batch)
            entry = found.setdefault(label, {"seconds": [], "busy": []})
            entry["seconds"] += seconds
            entry["busy"].append(busy)
    if dist.get_rank() == 0:
        for label, pipe in pipes.items():
            predicted = pipe.predicted_timeline()
            found[label] |= {"predicted": predicted.makespan, "predicted_busy": predicted.busy.tolist()}
        print(planned.plan, file=sys.stderr)
        print(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def show(name: str, found: dict) -> None:
    rows = []
    for label, entry in found.items():
        busy = [statistics.median(each) for each in zip(*entry["busy"])]
        heaviest = max(range(len(busy)), key=entry["predicted_busy"].__getitem__)
        rows += [(f"{label}: busy, worker {heaviest}, s", entry["predicted_busy"][heaviest], busy[heaviest]),
                 (f"{label}: step, s", entry["predicted"], statistics.median(entry["seconds"]))]
    rows.append(("speed over equal layers", found["equal"]["predicted"] / found["planned"]["predicted"],
                 statistics.median(found["equal"]["seconds"]) / statistics.median(found["planned"]["seconds"])))
    print(name, format_table(("", "predicted", "measured", "difference"), [
        (what, f"{expected:.3f}", f"{measured:.3f}", format_share(expected / measured - 1, signed=True))
        for what, expected, measured in rows], indent="  "), sep="\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="times ten steps of each pipeline")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.model, options.rounds)
        return
    for name in MODELS:
        show(name, run(__file__, ["--rounds", str(options.rounds), "--model", name]))


if __name__ == "__main__":
    main()
