"""Is the search's first choice the fastest that runs? Every configuration of two models on two workers, measured.

    python benchmarks/configurations.py [--quick]

A small GPT, and a GPT-2 whose embedding is its head too; two processes of one thread each, costs measured here. All
pipelines live in the same two processes and step in turns; the minimum counts. ``choice`` is the speed of what the
search puts first over the fastest measured; ``order`` the share of pairs of its first five that it has in order, of
those more than 5 % apart.
"""
import argparse
import itertools
import json
import sys
import tempfile
import warnings
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
from throughput import GPT, run
from torch import nn

import pipeengine as pe
from partitioners.tables import format_table

ROWS, LENGTH, TOKENS, ROUNDS = 16, 64, 1024, 5
LINK = dict(bandwidth=1e9, latency=5e-4)          # as a pipeline takes gloo on one machine to be
ONE, TWO = ("gpipe", "1f1b", "zb-h1"), ("interleaved-1f1b", "bfs", "interleaved-zb", "zb-v")
NOISE = 0.05


def gpt() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Four blocks of width 192."""
    tokens, targets = torch.randint(TOKENS, (2, ROWS, LENGTH))
    return GPT(blocks=4, width=192, heads=6, tokens=TOKENS), {"tokens": tokens, "targets": targets}


def tied() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A small GPT-2; wte.weight is the head's weight too."""
    from transformers import GPT2Config, GPT2LMHeadModel
    config = GPT2Config(n_embd=192, n_layer=4, n_head=6, vocab_size=TOKENS, n_positions=LENGTH, resid_pdrop=0.0,
                        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    tokens = torch.randint(TOKENS, (ROWS, LENGTH))
    return GPT2LMHeadModel(config), {"input_ids": tokens, "labels": tokens}


MODELS = {"GPT": gpt, "tied GPT-2": tied}


def spaces(quick: bool):
    """(name, fixed dimensions) of every configuration of two workers."""
    for rows in (2, 8) if quick else (1, 2, 4, 8):
        yield f"2 replicas, rows {rows}", dict(replicas=2, microbatch_rows=rows, shard=None)
        names = (("1f1b", 1), ("zb-h1", 1), ("interleaved-1f1b", 2)) if quick else (
            *itertools.product(ONE, (1,)), *itertools.product(TWO, (2,)))
        for name, several in names:
            yield f"{name}, rows {rows}", dict(replicas=1, microbatch_rows=rows, schedule=name,
                                               stages_per_worker=several)


def found_plans(make, folder: Path, quick: bool) -> dict[str, float]:
    """The best cut of every configuration in ``folder``, and the seconds that the search expects."""
    model, batch = make()
    graphs = {rows: pe.profile(model, batch, num_microbatches=ROWS // rows)
              for rows in {fixed["microbatch_rows"] for _, fixed in spaces(quick)}}
    expected = {}
    for name, fixed in spaces(quick):
        best = pe.search(graphs[fixed["microbatch_rows"]], num_devices=2, rows=ROWS, recompute="none", **LINK,
                         **fixed).best
        if best is not None:
            best.save(folder / f"{name}.json")
            expected[name] = best.seconds
    return expected


def worker(label: str, quick: bool) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    told: list = [None]
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        folder = Path(tempfile.mkdtemp())
        told = [(folder, found_plans(MODELS[label], folder, quick))]
    dist.broadcast_object_list(told)
    folder, expected = told[0]
    pipes, seconds = {}, {name: [] for name in expected}
    for name in expected:
        torch.manual_seed(0)
        model, batch = MODELS[label]()
        share = {key: value[:ROWS // 2] for key, value in batch.items()} if "replicas" in name else batch
        pipes[name] = pe.Pipeline(model, share, plan=folder / f"{name}.json", costs="analytic", check=False), share
    for number in range(ROUNDS + 1):
        for name, (pipe, share) in pipes.items():
            dist.barrier()
            start = perf_counter()
            pipe.step(**share)
            dist.barrier()
            if number:
                seconds[name].append(perf_counter() - start)
    if dist.get_rank() == 0:
        print(json.dumps({name: (expected[name], min(seconds[name])) for name in expected}))
    dist.barrier()
    dist.destroy_process_group()


def show(label: str, found: dict[str, tuple[float, float]]) -> None:
    ranked = sorted(found, key=lambda name: found[name][0])
    fastest = min(measured for _, measured in found.values())
    print(label, format_table(("configuration", "expected, s", "measured, s"), [
        (name, *(f"{seconds:.4f}" for seconds in found[name])) for name in ranked[:8]], indent="  "), sep="\n")
    pairs = [(a, b) for a, b in itertools.combinations(ranked[:5], 2)
             if abs(found[a][1] / found[b][1] - 1) > NOISE]
    right = sum(found[a][1] < found[b][1] for a, b in pairs)
    print(f"  of {len(found)}: choice {fastest / found[ranked[0]][1]:.3f} of the fastest measured, order {right} of "
          f"{len(pairs)} pairs", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="eight configurations of each model")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.model, options.quick)
        return
    for label in MODELS:
        show(label, run(__file__, ["--model", label, *(["--quick"] if options.quick else [])]))


if __name__ == "__main__":
    sys.exit(main())
