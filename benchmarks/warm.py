"""Imported by a fork server: whatever making a pipeline loads, so that the processes it forks have it already.

Nothing is computed backward here: autograd's threads would not survive a fork.
"""
import gc

import torch
from torch import nn

import pipeengine as pe


def main() -> None:
    """Make one small pipeline and forget it."""
    torch.set_num_threads(1)
    x = torch.zeros(4, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.Linear(8, 8))
    pe.Pipeline(model, (x,), target=x, loss_fn=nn.functional.mse_loss, num_microbatches=2, num_stages=2,
                costs="analytic").close()
    gc.collect()
    gc.freeze()


main()
