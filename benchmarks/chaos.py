"""Faults at random over whole runs under `pipeengine launch` and torchrun: does every run end with the same weights?

    python benchmarks/chaos.py --faults 500                       # `make chaos`: an hour on a free machine, else more
    python benchmarks/chaos.py --faults 20 --launchers torchrun --workers 3 --kinds kill,fill

A run trains with dropout, AdamW, a schedule of rates and a shuffled loader, and saves every five steps. In each of its
attempts but the last some worker is killed, stopped, put to sleep, made to raise or to exit, or its disk is full: at an
action of a step, or (``timer``) at any moment from its start on, so also while it connects, captures, loads or saves.
Some attempts also have a worker that computes for seconds and holds Python's lock (``hold``), which must change
nothing. ``shrink`` is `pipeengine launch --workers 2:N`, whose restarts are used up soon, so that it goes on with fewer
workers. A run has recovered when it ends with status 0, when every tensor of its last checkpoint, moments included, has
the digest it has in one undisturbed run on two workers, and when every loss, those of repeated steps too, is that of
the undisturbed run, bit for bit.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pipeengine as pe
from partitioners.tables import format_table
from pipeengine.distributed.faults import Fault, inject

STEPS, EVERY, WIDTH, HOLDS = 100, 5, 32, 0.1        # HOLDS: share of attempts
KINDS = ("kill", "stop", "raise", "exit", "abort", "sleep", "deadlock", "fill", "timer")
LAUNCHERS: dict[str, Callable[[int, int], list[str]]] = {
    "launch": lambda workers, restarts: ["pipeengine", "launch", "--workers", str(workers), "--max-restarts",
                                         str(restarts)],
    "torchrun": lambda workers, restarts: ["torch.distributed.run", "--standalone", "--nproc_per_node", str(workers),
                                           "--max-restarts", str(restarts)],
    "shrink": lambda workers, restarts: ["pipeengine", "launch", "--workers", f"2:{workers}", "--max-restarts",
                                         str(restarts // (workers - 1))]}


def train(folder: Path, seed: int, num_faults: int, kinds: tuple[str, ...]) -> None:
    """One worker of one attempt."""
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    attempt = f"{size} {os.environ['TORCHELASTIC_RESTART_COUNT']}"
    draw = random.Random(f"{seed} {attempt}")

    def tell(kind: str) -> None:
        with open(folder / "happened", "a") as file:
            file.write(f"{kind} {time.time()}\n")
    faulty = len(_lines(folder / "happened")) < num_faults
    kind, victim = draw.choice(kinds), draw.randrange(size)
    if faulty and kind == "timer" and rank == victim:
        def kill() -> None:
            tell("timer")
            os.kill(os.getpid(), signal.SIGKILL)
        timer = threading.Timer(draw.uniform(0.0, 8.0), kill)
        timer.daemon = True
        timer.start()
    torch.manual_seed(0)
    x = torch.randn(96, WIDTH)
    data = TensorDataset(x, x.roll(1, 0))
    loader = pe.ResumableLoader(DataLoader(data, batch_size=8, sampler=pe.ShuffledSampler(data, seed=1)))
    model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2), nn.Tanh()) for _ in range(6)))
    pipe = pe.Pipeline(model, (x[:8],), target=x[:8], loss_fn=nn.functional.mse_loss, num_microbatches=4,
                       costs="analytic")
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    checkpoints = pe.Checkpoints(folder / "saved", pipe, every=EVERY, keep=2, optimizer=optimizer, scheduler=scheduler,
                                 loader=loader)
    start = checkpoints.load()

    def disturb(kind: str, victim: int, seconds: float = 3600.0) -> None:
        # In its first calls a worker may take ten minutes, to compile for example: those who stall do so later.
        first = 7 if kind in ("sleep", "deadlock") else 0
        fault = Fault(kind, victim, start + first + draw.randrange(2 * EVERY), draw.randrange(16), seconds)
        inject(pipe._workers.activity, rank, fault, lambda: tell(kind))
    if faulty and draw.random() < HOLDS:
        disturb("hold", draw.randrange(size), 4.0)
    if faulty and kind != "timer":
        disturb(kind, victim)
    batches = loader.endless()
    for step in range(start + 1, STEPS + 1):
        inputs, target = next(batches)
        loss = pipe.step(inputs, target=target)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if rank == 0:
            with open(folder / "losses", "a") as file:
                file.write(f"{step} {float(loss).hex()} {time.time()}\n")
        checkpoints.save(step)
    checkpoints.wait()
    pipe.close()


def run(launcher: str, workers: int, seed: int, num_faults: int, kinds: tuple[str, ...], limit: float) -> dict:
    """One run: its exit status, faults, losses by step, digests of its last checkpoint, and seconds to come back."""
    folder = Path(tempfile.mkdtemp(prefix="pipeengine-chaos-"))
    command = [sys.executable, "-m", *LAUNCHERS[launcher](workers, 2 * num_faults + 3), __file__,
               "--train", str(folder), "--seed", str(seed), "--per-run", str(num_faults), "--kinds", ",".join(kinds)]
    with open(folder / "output", "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        try:
            status = process.wait(limit)
        except BaseException as error:
            status = -1
            process.send_signal(signal.SIGINT)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
    happened = [line.split() for line in _lines(folder / "happened")]
    losses = [line.split() for line in _lines(folder / "losses")]
    steps = sorted(float(when) for _, _, when in losses)
    back = [min((s for s in steps if s > float(when)), default=float("inf")) - float(when) for _, when in happened]
    manifest = folder / "saved" / f"step-{STEPS:06}" / "manifest.json"
    found = {"launcher": launcher, "workers": workers, "seed": seed, "status": status,
             "faults": [kind for kind, _ in happened], "back": back,
             "losses": sorted({(int(step), value) for step, value, _ in losses}),
             "digests": _digests(json.loads(manifest.read_text())) if manifest.exists() else None,
             "output": (folder / "output").read_text(errors="replace")[-20000:]}
    shutil.rmtree(folder)
    return found


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _digests(manifest: dict) -> dict[str, str]:
    """Digests of all tensors, weights and moments; where they lie depends on the number of workers."""
    return {name: entry["digest"] for file in manifest["files"].values()
            for name, entry in file.get("tensors", {}).items()}


def campaign(args: argparse.Namespace, rows: list[dict]) -> None:
    """Runs, launchers and numbers of workers in turns, until there were faults enough; each is added to ``rows``."""
    until, kinds = time.monotonic() + 60 * args.minutes, tuple(args.kinds.split(","))
    clean = run("launch", 2, args.seed, 0, kinds, args.limit)
    assert clean["status"] == 0 and len(clean["losses"]) == STEPS, clean["output"]
    cases = [case for case in product(map(int, args.workers.split(",")), args.launchers.split(","))
             if case != (2, "shrink")]
    while sum(len(row["faults"]) for row in rows) < args.faults and time.monotonic() < until:
        workers, launcher = cases[len(rows) % len(cases)]
        found = run(launcher, workers, args.seed + len(rows), args.per_run, kinds, args.limit)
        found["equal"] = found["status"] == 0 and found["digests"] == clean["digests"] \
            and found["losses"] == clean["losses"]
        rows.append(found)
        print(f"run {len(rows)}, {launcher} with {workers} workers: status {found['status']}, {len(found['faults'])} "
              f"faults ({', '.join(found['faults'])}), {'bit-equal' if found['equal'] else 'NOT EQUAL'}", flush=True)
        if not found["equal"]:
            print(found["output"], flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(rows))


def tables(rows: list[dict]) -> str:
    """What happened, by launcher and by kind of fault."""
    good = [row for row in rows if row["equal"]]
    cases = sorted({(row["launcher"], row["workers"]) for row in rows})
    of = {case: [row for row in rows if (row["launcher"], row["workers"]) == case] for case in cases}
    first = [(launcher, str(workers), str(len(own)), str(sum(row["equal"] for row in own)),
              str(sum(len(row["faults"]) for row in own))) for (launcher, workers), own in of.items()]
    counts, back = Counter(kind for row in rows for kind in row["faults"]), {}
    for row in rows:
        for kind, seconds in zip(row["faults"], row["back"]):
            back.setdefault(kind, []).append(seconds)
    second = []
    for kind, count in counts.items():
        times = sorted(back[kind])
        second.append((kind, str(count), str(sum(row["faults"].count(kind) for row in good)),
                       f"{times[len(times) // 2]:.1f}", f"{times[-1]:.1f}"))
    return "\n\n".join((
        f"{len(rows)} runs, {len(good)} bit-equal, {sum(counts.values())} faults",
        format_table(("launcher", "workers", "runs", "bit-equal", "faults"), first, left=(0,)),
        format_table(("fault", "happened", "recovered", "s until the next step, median", "s, slowest"), second)))


def main() -> None:
    """Run the campaign and print tables, also when it is ended by Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=500, help="stop once so many have happened")
    parser.add_argument("--per-run", type=int, default=10, help="faults of one run")
    parser.add_argument("--workers", default="2,3,4")
    parser.add_argument("--launchers", default=",".join(LAUNCHERS))
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run after that")
    parser.add_argument("--limit", type=float, default=1800, help="seconds until a run counts as hung")
    parser.add_argument("--json", help="write every run there too")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        return train(Path(args.train), args.seed, args.per_run, tuple(args.kinds.split(",")))
    rows: list[dict] = []
    with suppress(KeyboardInterrupt):
        campaign(args, rows)
    print(tables(rows))


if __name__ == "__main__":
    main()
