"""Kill, stop or stall a worker at every action of a step: who notices, when, and whom they name.

    python benchmarks/faults.py --workers 4 --microbatches 4 --json matrix.json     # kill -9, everywhere
    python benchmarks/faults.py --kinds stop,sleep,deadlock --places step --every 6
    python benchmarks/faults.py --random 500 --seed 1 --kinds kill,stop,raise,exit,sleep

Every fault is one run of its own in processes of this machine, which share a fork server that has made a pipeline
before. Places: at an action of a step, between steps, at a call of the operating system in a save or a load.
"""
from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import pipeengine as pe
from partitioners.tables import format_table
from pipeengine.distributed.faults import FAULTS, Fault, inject

STEP, LIMIT = 8, 90.0           # the step of a fault (late enough that pauses have been learnt), seconds until a hang
PROMISED = {"kill": 1.0, "terminate": 1.0, "abort": 1.0, "exit": 1.0, "raise": 1.0}     # seconds; of others 4
CALLS = ("open", "write", "fsync", "close", "rename", "replace", "unlink", "mkdir", "read")
MARK = "PIPEENGINE_FAULT_RUN"


def make(workers: int, microbatches: int) -> tuple[pe.Pipeline, torch.Tensor]:
    """A small pipeline and its batch."""
    torch.manual_seed(0)
    x = torch.randn(4 * microbatches, 32)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.1)) for _ in range(2 * workers)))
    return pe.Pipeline(model, (x,), target=x, loss_fn=nn.functional.mse_loss, num_microbatches=microbatches,
                       schedule="1f1b", costs="analytic"), x


def at_call(number: int, happen: Callable[[], None]) -> None:
    """From now on ``happen()`` comes before the ``number``-th call of this process that reads or changes the disk."""
    left = [number]

    def wrap(name: str) -> Callable:
        real = getattr(os, name)

        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == -1:
                happen()
            return real(*args, **kwargs)
        return call
    for name in CALLS:
        setattr(os, name, wrap(name))


def work(rank: int, workers: int, microbatches: int, port: int, place: str, fault: Fault, folder: str, messages
         ) -> None:
    """A worker: steps, saves and loads until something happens; tells (what, seconds on the common clock, text)."""
    torch.set_num_threads(1)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", MARK: folder}
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=workers)

    def happen() -> None:
        messages.send(("fault", time.monotonic(), ""))
        FAULTS[fault.kind](fault.seconds)

    def here(what: str) -> None:
        if place == what and rank == fault.worker:
            happen() if what == "between" else at_call(fault.action, happen)
    pipe, x = make(workers, microbatches)
    if place == "step":
        inject(pipe._workers.activity, rank, fault, lambda: messages.send(("fault", time.monotonic(), "")))
    checkpoints = pe.Checkpoints(folder, pipe) if place in ("save", "load") else None
    with suppress(SystemExit):
        try:
            for step in range(STEP + 3):
                pipe.step(x, target=x)
                if step == STEP:
                    run(checkpoints, step, here)
            messages.send(("done", time.monotonic(), ""))
        except pe.WorkerError as error:
            messages.send(("raised", time.monotonic(), str(error).splitlines()[0]))
            raise SystemExit(3) from None


def run(checkpoints: pe.Checkpoints | None, step: int, here: Callable[[str], None]) -> None:
    """What comes between two steps."""
    here("between")
    if checkpoints is not None:
        here("save")
        checkpoints.save(step)
        checkpoints.wait()
        here("load")
        checkpoints.load()


def one(context, workers: int, microbatches: int, place: str, fault: Fault) -> dict:
    """One run: seconds from the fault until each survivor raised and all had gone, and who was named."""
    folder = tempfile.mkdtemp(prefix=f"{PREFIX}-")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes = [context.Pipe(duplex=False) for _ in range(workers)]
    processes = [context.Process(target=work, args=(rank, workers, microbatches, store.port, place, fault, folder,
                                                    pipes[rank][1])) for rank in range(workers)]
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
            with suppress(ProcessLookupError):      # it may end by itself meanwhile
                os.kill(process.pid, signal.SIGKILL)
        process.join()
    shutil.rmtree(folder, ignore_errors=True)
    start = told["fault"].get(fault.worker, (None, ""))[0]
    raised = [told["raised"][rank] for rank in survivors if rank in told["raised"]]
    return {"happened": start is not None, "hung": hung, "raised": [when - start for when, _ in raised if start],
            "right": sum(text.startswith(f"worker {fault.worker} ") for _, text in raised), "survivors": len(survivors),
            "gone": gone - start if start and gone else None, "texts": [text for _, text in raised],
            "done": len(told["done"])}


PREFIX = f"pipeengine-faults-{secrets.token_hex(4)}"


def orphans() -> list[int]:
    """Processes that runs have left behind, guards among them, once those had time to end."""
    deadline = time.monotonic() + 5
    while found := [int(path.name) for path in Path("/proc").glob("[0-9]*") if _is_of_a_run(path)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return found


def _is_of_a_run(process: Path) -> bool:
    with suppress(OSError):
        return f"{MARK}=".encode() in (text := (process / "environ").read_bytes()) and PREFIX.encode() in text
    return False


def faults(args: argparse.Namespace) -> Iterator[tuple[str, Fault]]:
    """Those that were asked for; an answer of False ends the actions of a place, since there are no more."""
    kinds = tuple(args.kinds.split(","))
    if args.random:
        for seed in range(args.seed, args.seed + args.random):
            yield "step", Fault.draw(seed, kinds, args.workers, STEP, 6 * args.microbatches)
        return
    for kind in kinds:
        for place in args.places.split(","):
            for worker in range(args.workers):
                for action in range(0, 1 if place == "between" else 1000, args.every):
                    if (yield place, Fault(kind, worker, STEP, action)) is False:
                        break


def collect(args: argparse.Namespace) -> dict[tuple[str, str], list[dict]]:
    """All runs, by kind and place. What falls short is printed as it comes."""
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    context.set_forkserver_preload(["torch.distributed", "warm"])
    rows: dict[tuple[str, str], list[dict]] = {}
    until, todo, answer = time.monotonic() + 60 * args.minutes, faults(args), None
    with suppress(StopIteration):
        while time.monotonic() < until:
            place, fault = todo.send(answer)
            result = one(context, args.workers, args.microbatches, place, fault)
            answer = result["happened"]
            if answer:
                late = max(result["raised"], default=0) > PROMISED.get(fault.kind, 4.0)
                rows.setdefault((fault.kind, place), []).append({**result, **asdict(fault), "late": late})
            if (answer and (late or result["right"] < result["survivors"])) or result["hung"]:
                print(place, fault, result, flush=True)
    return rows


def summary(results: list[dict]) -> dict[str, float]:
    """One line of the table."""
    times = sorted(seconds for result in results for seconds in result["raised"])
    gone = [result["gone"] for result in results if result["gone"] is not None]
    return {"runs": len(results), "hung": sum(result["hung"] for result in results),
            "raised_median": statistics.median(times) if times else float("nan"),
            "raised_slowest": max(times, default=float("nan")), "gone_slowest": max(gone, default=float("nan")),
            "late": sum(result["late"] for result in results), "named": sum(result["right"] for result in results),
            "survivors": sum(result["survivors"] for result in results)}


def main() -> None:
    """Run the faults and print a table, one line per kind and place."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--kinds", default="kill", help=f"of {', '.join(FAULTS)}")
    parser.add_argument("--places", default="step,between,save,load")
    parser.add_argument("--every", type=int, default=1, help="only every so many-th action")
    parser.add_argument("--random", type=int, default=0, help="so many faults at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after that")
    parser.add_argument("--json", help="write every run there too")
    args = parser.parse_args()
    rows = collect(args)
    told = {case: summary(results) for case, results in rows.items()}
    print(format_table(("fault", "where", "runs", "hung", "s until raised, median", "slowest",
                        "s until all gone, slowest", "late", "culprit named"), [
        (*case, str(s["runs"]), str(s["hung"]), *(f"{s[name]:.2f}" for name in (
            "raised_median", "raised_slowest", "gone_slowest")), str(s["late"]), f"{s['named']} of {s['survivors']}")
        for case, s in told.items()], left=(0, 1)))
    left = orphans()
    print(f"orphans: {len(left)}")
    if args.json:
        Path(args.json).write_text(json.dumps({
            "orphans": len(left), "table": [{"kind": kind, "place": place, **summary(results)}
                                            for (kind, place), results in rows.items()],
            "runs": [{"place": place, **result} for (_, place), results in rows.items() for result in results]}))


if __name__ == "__main__":
    main()
