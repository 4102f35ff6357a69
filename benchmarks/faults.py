"""Kill, stop or stall a worker at every action of a step: who notices, when, and whom they name.

    python benchmarks/faults.py --workers 4 --microbatches 4                 # kill -9 at every action of every worker
    python benchmarks/faults.py --random 500 --seed 1 --kinds kill,stop,raise,exit,sleep

Every fault is one run of its own in processes of this machine, which share a fork server that has torch loaded.
"""
from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress

import torch
import torch.distributed as dist
from torch import nn

import pipeengine as pe
from pipeengine.distributed.faults import Fault, inject

STEP, LIMIT = 8, 60.0           # the step of a fault (late enough that pauses have been learnt), seconds until a hang


def make(workers: int, microbatches: int) -> tuple[pe.Pipeline, torch.Tensor]:
    """A small pipeline and its batch."""
    torch.manual_seed(0)
    x = torch.randn(4 * microbatches, 32)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.1)) for _ in range(2 * workers)))
    return pe.Pipeline(model, (x,), target=x, loss_fn=nn.functional.mse_loss, num_microbatches=microbatches,
                       schedule="1f1b", costs="analytic"), x


def work(rank: int, workers: int, microbatches: int, port: int, fault: Fault, messages) -> None:
    """A worker: steps until something happens; tells (what, seconds on the common clock, text)."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=workers)
    pipe, x = make(workers, microbatches)
    inject(pipe._workers.activity, rank, fault, lambda: messages.send(("fault", time.monotonic(), "")))
    with suppress(SystemExit):
        try:
            for _ in range(STEP + 2):
                pipe.step(x, target=x)
        except pe.WorkerError as error:
            messages.send(("raised", time.monotonic(), str(error).splitlines()[0]))
            raise SystemExit(3) from None
        messages.send(("done", time.monotonic(), ""))


def one(context, workers: int, microbatches: int, fault: Fault) -> dict:
    """One run: seconds from the fault until each survivor raised and all had gone, and who was named."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes = [context.Pipe(duplex=False) for _ in range(workers)]
    processes = [context.Process(target=work, args=(rank, workers, microbatches, store.port, fault, pipes[rank][1]))
                 for rank in range(workers)]
    for process in processes:
        process.start()
    told: dict[str, dict[int, tuple[float, str]]] = {"fault": {}, "raised": {}, "done": {}}
    survivors = [rank for rank in range(workers) if rank != fault.worker]
    deadline, gone = time.monotonic() + LIMIT, 0.0
    while time.monotonic() < deadline:
        for rank, (messages, _) in enumerate(pipes):
            with suppress(EOFError, OSError):
                while messages.poll():
                    what, when, text = messages.recv()
                    told[what][rank] = when, text
        if not any(processes[rank].is_alive() for rank in survivors):
            gone = gone or time.monotonic()
            if not any(messages.poll() for messages, _ in pipes):
                break
        time.sleep(0.005)
    hung = sum(processes[rank].is_alive() for rank in survivors)
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
    start = told["fault"].get(fault.worker, (None, ""))[0]
    raised = [told["raised"][rank] for rank in survivors if rank in told["raised"]]
    return {"happened": start is not None, "hung": hung, "raised": [when - start for when, _ in raised if start],
            "right": sum(text.startswith(f"worker {fault.worker} ") for _, text in raised), "survivors": len(survivors),
            "gone": gone - start if start and gone else None, "texts": [text for _, text in raised]}


def faults(args: argparse.Namespace) -> Iterator[Fault]:
    """Those that were asked for."""
    actions = 6 * args.microbatches
    kinds = tuple(args.kinds.split(","))
    if args.random:
        for seed in range(args.seed, args.seed + args.random):
            yield Fault.draw(seed, kinds, args.workers, STEP, actions)
        return
    for kind in kinds:
        for worker in range(args.workers):
            for action in range(0, actions, args.every):
                yield Fault(kind, worker, STEP, action)


def main() -> None:
    """Run the faults and print a table, one line per kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--kinds", default="kill")
    parser.add_argument("--every", type=int, default=1, help="only every so many-th action")
    parser.add_argument("--random", type=int, default=0, help="so many faults at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after that")
    args = parser.parse_args()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "pipeengine.pipeline"])
    rows: dict[str, list[dict]] = {}
    until = time.monotonic() + 60 * args.minutes
    for fault in faults(args):
        if time.monotonic() > until:
            break
        result = one(context, args.workers, args.microbatches, fault)
        if result["happened"]:
            rows.setdefault(fault.kind, []).append(result)
            if result["right"] < result["survivors"]:
                print(fault, result, flush=True)
    print(f"{'fault':10} {'runs':>5} {'hung':>5} {'raised, median':>15} {'slowest':>8} {'all gone, slowest':>18} "
          f"{'culprit named':>14}")
    for kind, results in rows.items():
        times = sorted(seconds for result in results for seconds in result["raised"])
        gone = [result["gone"] for result in results if result["gone"] is not None]
        named, all_ = sum(r["right"] for r in results), sum(r["survivors"] for r in results)
        print(f"{kind:10} {len(results):5} {sum(r['hung'] for r in results):5} "
              f"{statistics.median(times) if times else float('nan'):13.2f} s {max(times, default=0):6.2f} s "
              f"{max(gone, default=0):16.2f} s {f'{named} of {all_}':>14}")


if __name__ == "__main__":
    main()
