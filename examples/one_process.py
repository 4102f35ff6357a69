"""All stages in one ordinary Python process: for notebooks, debuggers and machines with one device.

    python examples/one_process.py

Trains the same network twice, in plain PyTorch and cut into three stages with four micro-batches, and prints both
losses: they are equal to the last digit.
"""
import argparse
import copy

import torch
import torch.nn.functional as F
from torch import nn

import pipeengine as pe


class Mixer(nn.Module):
    """Blocks with a long skip: the first block's output is read again at the end."""

    def __init__(self, width: int, num_blocks: int):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(),
                                                  nn.Linear(width, width)) for _ in range(num_blocks))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        first = x = x + self.blocks[0](x)
        for block in self.blocks[1:]:
            x = x + block(x)
        return self.head(x * torch.sigmoid(first))


def plain_step(model, batch, target, num_microbatches):
    """One step as one process would do it, micro-batch by micro-batch."""
    total = torch.zeros(())
    for x, y in zip(batch.tensor_split(num_microbatches), target.tensor_split(num_microbatches), strict=True):
        loss = F.cross_entropy(model(x), y) * (len(x) / len(batch))
        loss.backward()
        total += loss.detach()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--stages", type=int, default=3)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = Mixer(width=64, num_blocks=6)
    plain = copy.deepcopy(model)
    x, y = torch.randn(32, 64), torch.randint(0, 10, (32,))

    pipe = pe.Pipeline(model, (x,), num_microbatches=4, num_stages=options.stages, loss_fn=F.cross_entropy, target=y)
    ours = torch.optim.AdamW(pipe.parameters(), lr=1e-3)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    for step in range(options.steps):
        loss = pipe.step(x, target=y)
        expected = plain_step(plain, x, y, num_microbatches=4)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        print(f"step {step:3d}   pipeline {loss.item():.9f}   plain {expected.item():.9f}")
    print(pipe.plan)


if __name__ == "__main__":
    main()
