"""A model of one's own: two inputs, a skip over half of it, a shared module, a loss outside.

    torchrun --standalone --nproc_per_node 2 examples/own_model.py
    python examples/own_model.py                                    # both stages in this process

Nothing in it knows of stages. What crosses a cut (here the skip too) travels by itself; the shared module has one
summed gradient.
"""
import os
import sys

import torch
from torch import nn

import pipeengine as pe


class TwoTowers(nn.Module):
    """A picture of what was measured and a vector of settings become one prediction."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.signal = nn.Sequential(nn.Conv1d(1, width, 5, padding=2), nn.GELU(), nn.AdaptiveAvgPool1d(16))
        self.settings = nn.Linear(4, width)
        self.mix = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.shared = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)

    def forward(self, signal, settings):
        hidden = self.signal(signal[:, None]).transpose(1, 2) + self.settings(settings)[:, None]
        skip = hidden
        for layer in self.mix:
            hidden = hidden + torch.tanh(layer(self.shared(hidden)))
        return self.head(self.shared(hidden + skip)).mean(1)


def main(steps: int) -> None:
    torch.manual_seed(0)
    batch = dict(signal=torch.randn(32, 64), settings=torch.randn(32, 4))
    target = batch["settings"].sum(1, keepdim=True)
    pipe = pe.Pipeline(TwoTowers(), batch, num_microbatches=4, loss_fn=nn.functional.mse_loss, target=target,
                       costs="analytic", num_stages=None if "RANK" in os.environ else 2)
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=3e-3)
    for step in range(steps):
        loss = pipe.step(**batch, target=target)
        optimizer.step()
        optimizer.zero_grad()
        if pipe.is_first_worker:
            print(f"step {step}  loss {float(loss):.4f}", flush=True)
    if pipe.is_first_worker:
        print(pipe.report())


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
