"""Faults at random over whole runs under `pipeengine launch` or torchrun: does every run end with the same weights?

    python benchmarks/chaos.py --faults 500                       # `make chaos`: hours
    python benchmarks/chaos.py --faults 20 --launcher torchrun --workers 3

A run trains with dropout, AdamW, a schedule of rates and a shuffled loader, and saves every five steps. In each of its
attempts but the last some worker is killed, stopped, put to sleep, made to raise or to exit: at an action of a step, or
(``timer``) at any moment from its start on, so also while it connects, captures, loads or saves. A run has recovered
when it ends with status 0, when every tensor of its last checkpoint, moments included, has the digest it has in the
undisturbed run, and when every loss, those of repeated steps too, is that of the undisturbed run, bit for bit.
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
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pipeengine as pe
from partitioners.tables import format_table
from pipeengine.distributed.faults import Fault, inject

STEPS, EVERY, WIDTH = 60, 5, 32
KINDS = ("kill", "stop", "raise", "exit", "sleep", "deadlock", "timer")
LAUNCHERS = {"launch": ["-m", "pipeengine", "launch", "--workers"],
             "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]}


def train(folder: Path, seed: int, num_faults: int, kinds: tuple[str, ...]) -> None:
    """One worker of one attempt."""
    torch.set_num_threads(1)
    attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    draw = random.Random(f"{seed} {attempt}")
    kind, victim = draw.choice(kinds), draw.randrange(int(os.environ["WORLD_SIZE"]))
    faulty = attempt < num_faults

    def tell(text: str) -> None:
        with open(folder / "happened", "a") as file:
            file.write(text + "\n")
    if faulty and kind == "timer" and rank == victim:
        def kill() -> None:
            tell(f"timer {time.time()}")
            os.kill(os.getpid(), signal.SIGKILL)
        timer = threading.Timer(draw.uniform(0.0, 10.0), kill)
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
    if faulty and kind != "timer":
        # In its first calls a worker may take ten minutes, to compile for example: those who stall do so later.
        first = 7 if kind in ("sleep", "deadlock") else 0
        fault = Fault(kind, victim, start + first + draw.randrange(2 * EVERY), draw.randrange(16))
        inject(pipe._workers.activity, rank, fault, lambda: tell(f"{kind} {time.time()}"))
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
    command = [sys.executable, *LAUNCHERS[launcher], str(workers), "--max-restarts", str(num_faults + 3), __file__,
               "--train", str(folder), "--seed", str(seed), "--per-run", str(num_faults), "--kinds", ",".join(kinds)]
    with open(folder / "output", "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = -1
            process.send_signal(signal.SIGINT)
            process.wait()
    happened = [line.split() for line in _lines(folder / "happened")]
    losses = [line.split() for line in _lines(folder / "losses")]
    steps = sorted(float(when) for _, _, when in losses)
    back = [min((s for s in steps if s > float(when)), default=float("inf")) - float(when) for _, when in happened]
    manifest = folder / "saved" / f"step-{STEPS:06}" / "manifest.json"
    found = {"status": status, "faults": [kind for kind, _ in happened], "back": back,
             "losses": sorted({(int(step), value) for step, value, _ in losses}),
             "digests": _digests(json.loads(manifest.read_text())) if manifest.exists() else None,
             "output": (folder / "output").read_text(errors="replace")[-4000:]}
    shutil.rmtree(folder)
    return found


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _digests(manifest: dict) -> dict[str, str]:
    """Digests of all tensors, weights and moments."""
    return {name: json.dumps(entry, sort_keys=True) for file in manifest["files"].values()
            for name, entry in file.get("tensors", {}).items()}


def campaign(args: argparse.Namespace) -> list[dict]:
    """Runs until there were faults enough; each is compared with one that is undisturbed."""
    until, rows, seed, faults = time.monotonic() + 60 * args.minutes, [], args.seed, 0
    kinds = tuple(args.kinds.split(","))
    clean = run(args.launcher, args.workers, args.seed, 0, kinds, args.limit)
    assert clean["status"] == 0 and len(clean["losses"]) == STEPS, clean["output"]
    while faults < args.faults and time.monotonic() < until:
        found = run(args.launcher, args.workers, seed, args.per_run, kinds, args.limit)
        faults += len(found["faults"])
        found["equal"] = found["digests"] == clean["digests"] and found["losses"] == clean["losses"]
        rows.append(found)
        seed += 1
        print(f"run {len(rows)}: status {found['status']}, {len(found['faults'])} faults "
              f"({', '.join(found['faults'])}), {'bit-equal' if found['equal'] else 'NOT EQUAL'}", flush=True)
        if found["status"] or not found["equal"]:
            print(found["output"], flush=True)
    return rows


def main() -> None:
    """Run the campaign and print a table, one line per kind of fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=500, help="stop once so many have happened")
    parser.add_argument("--per-run", type=int, default=8, help="attempts of a run that are disturbed")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--launcher", choices=LAUNCHERS, default="launch")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run after that")
    parser.add_argument("--limit", type=float, default=1200, help="seconds until a run counts as hung")
    parser.add_argument("--json", help="write every run there too")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        return train(Path(args.train), args.seed, args.per_run, tuple(args.kinds.split(",")))
    rows = campaign(args)
    good = [row for row in rows if row["status"] == 0]
    print(f"{len(rows)} runs, {len(good)} ended with status 0, {sum(row['equal'] for row in rows)} bit-equal")
    counts, back = Counter(kind for row in rows for kind in row["faults"]), {}
    for row in rows:
        for kind, seconds in zip(row["faults"], row["back"]):
            back.setdefault(kind, []).append(seconds)
    table = []
    for kind, count in counts.items():
        recovered = sum(row["faults"].count(kind) for row in rows if row["equal"])
        times = sorted(back[kind])
        table.append((kind, str(count), str(recovered), f"{times[len(times) // 2]:.1f}", f"{times[-1]:.1f}"))
    print(format_table(("fault", "happened", "recovered", "s until the next step, median", "s, slowest"), table))
    if args.json:
        Path(args.json).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
