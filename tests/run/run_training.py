"""A small training under ``pe.Run``, as a script: any number of workers, killed and started again by tests.

    python run_training.py FOLDER STEPS [--save-every N] [--tracker NAME] [--die-after STEP] [--raise-at STEP] ...
"""
import argparse
import json
import os
import signal
import time

import torch
from torch import nn

import pipeengine as pe


class Net(nn.Module):
    """Embedding, six layers with dropout, a head: the loss depends on the numbers that steps are keyed by."""

    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(50, 16)
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.1), nn.Tanh()) for _ in range(6)))
        self.head = nn.Linear(16, 50)

    def forward(self, tokens):
        return nn.functional.cross_entropy(self.head(self.layers(self.token(tokens))).flatten(0, 1), tokens.flatten())


class Batches:
    """Batches by number; its state is one integer."""

    def __init__(self):
        self.number = 0

    def __next__(self):
        self.number += 1
        return {"tokens": torch.randint(50, (4, 6), generator=torch.Generator().manual_seed(self.number))}

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


def make(folder, *, num_stages=None, **options):
    """(run, pipe, optimizer, batches), ready for a loop."""
    torch.manual_seed(0)
    batches = Batches()
    pipe = pe.Pipeline(Net(), {"tokens": torch.zeros(4, 6, dtype=torch.int64)}, num_microbatches=2, costs="analytic",
                       schedule="1f1b", num_stages=num_stages)
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=1e-2)
    return pe.Run(folder, pipe, optimizer=optimizer, loader=batches, **options), pipe, optimizer, batches


def train_step(pipe, optimizer, batches):
    loss = pipe.step(**next(batches))
    pipe.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("steps", type=int)
    parser.add_argument("--save-every", type=int, default=4)
    parser.add_argument("--tracker", action="append", default=[])
    parser.add_argument("--kill-at", type=int, default=-1)
    parser.add_argument("--raise-at", type=int, default=-1)
    parser.add_argument("--pause", type=float, default=0.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    run, pipe, optimizer, batches = make(
        options.folder, num_stages=None if "RANK" in os.environ else 2, save_every=options.save_every,
        trackers=options.tracker, config=vars(options))
    print(json.dumps({"first_step": run.first_step, "id": run.id}), flush=True)
    for step in run.steps(options.steps):
        loss = train_step(pipe, optimizer, batches)
        run.log(loss=loss)
        if pipe.rank == pipe.num_workers - 1:
            run.log(last_worker=step)
        time.sleep(options.pause)
        if step == options.kill_at:
            run.checkpoints.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        if step == options.raise_at:
            raise RuntimeError("a user's error")


if __name__ == "__main__":
    main()
