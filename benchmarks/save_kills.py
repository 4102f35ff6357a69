"""Kill a save at a random moment, again and again: is what is on the disk always one whole checkpoint, old or new?

    python benchmarks/save_kills.py --kills 2000

One folder, from save to save, so that what one kill leaves behind meets the next save. A forked process saves the next
step, as one worker or three, in the background or not; it dies before a call of the operating system drawn at random
(for a write in its middle), or by SIGKILL after a time drawn at random. Then one worker loads: every byte is compared
with its digest, every number of weights and moments with the step's, and the step must be the old one or the new.
"""
from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import pipeengine as pe
from partitioners.tables import format_table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "checkpoint"))
import kills
import threads

CALLS = 120             # of the operating system in a save of three workers, about


def save(folder: Path, size: int, step: int, background: bool) -> None:
    """Workers that hold ``step`` everywhere save as ``step``."""
    def work(workers: threads.ThreadWorkers) -> None:
        fake = threads.Fake(threads.model(float(step)), threads.owners(size), workers)
        optimizer = torch.optim.SGD(fake.parameters(), lr=0.1, momentum=0.9)
        for parameter in fake.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, float(step))
        fake.numbers["step"] = step
        checkpoints = pe.Checkpoints(folder, fake, keep=1, background=background, optimizer=optimizer)
        checkpoints.save(step)
        checkpoints.wait()
    threads.as_threads(size, work)


def load(folder: Path) -> tuple[int, bool]:
    """The step that one worker loads, and whether every number is that step's."""
    def work(workers: threads.ThreadWorkers) -> tuple[int, bool]:
        fake = threads.Fake(threads.model(-1.0), threads.owners(1), workers)
        optimizer = torch.optim.SGD(fake.parameters(), lr=0.1, momentum=0.9)
        step = pe.Checkpoints(folder, fake, optimizer=optimizer).load()
        whole = all(bool((parameter == step).all() and (optimizer.state[parameter]["momentum_buffer"] == step).all())
                    for parameter in fake.parameters())
        return step, whole and fake.numbers["step"] == step
    return threads.as_threads(1, work)[0]


def killed(folder: Path, step: int, draw: random.Random, seconds: float) -> tuple[str, bool]:
    """Save in a forked process that is killed; how, and whether it had ended by itself before."""
    how, size, background = draw.choice(["call", "time"]), draw.choice([1, 3]), draw.random() < 0.5
    number, delay = draw.randrange(1, CALLS if size == 3 else CALLS // 3), draw.uniform(0, seconds)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        if how == "call":
            kills.die_at(number)
        try:
            save(folder, size, step, background)
        finally:
            os._exit(0)
    if how == "time":
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return f"{how}, {size} worker{'s' if size > 1 else ''}{', background' if background else ''}", status == 0


def main() -> None:
    """Kill and load; print one line per kind of kill. The exit status is 1 where a load gave anything else."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=2000)
    parser.add_argument("--folder", help="where to save; in memory (/dev/shm) kills come faster")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    draw, rows, wrong = random.Random(args.seed), {}, []
    with tempfile.TemporaryDirectory(prefix="pipeengine-kills-", dir=args.folder) as name:
        folder, old, step = Path(name) / "run", 1, 1
        save(folder, 1, 1, False)           # here, so that no forked process must import what a save needs
        for _ in range(3):
            start = time.perf_counter()
            kills.in_fork(lambda: save(folder, 3, 1, True))
            seconds = time.perf_counter() - start
        while sum(sum(row[found] for found in ("old", "new", "wrong")) for row in rows.values()) < args.kills:
            step += 1
            kind, ended = killed(folder, step, draw, seconds)
            found, whole = load(folder)
            what = "wrong" if not whole or found not in (old, step) else "not killed" if ended else \
                "new" if found == step else "old"
            rows.setdefault(kind, Counter())[what] += 1
            if what == "wrong":
                wrong.append((step, kind, found))
                print(f"step {step}, killed by {kind}: loaded {found}, the one before is {old}", flush=True)
            old = found
    columns = ("old", "new", "wrong", "not killed")
    print(format_table(("killed at a", *columns), [
        *((kind, *(str(row[column]) for column in columns)) for kind, row in sorted(rows.items())), (),
        ("all", *(str(sum(row[column] for row in rows.values())) for column in columns))]))
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
