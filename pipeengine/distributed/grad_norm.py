"""The norm of all gradients of a pipeline, shared ones counted once."""
from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeengine.distributed.workers import Workers
from pipeengine.torch_private import foreach_norm


def total_norm(gradients: Sequence[torch.Tensor], norm_type: float, workers: Workers,
               device: torch.device) -> torch.Tensor:
    """The ``norm_type`` norm over the gradients of all workers, as a 0-dimensional float64 tensor on each of them.

    ``gradients`` are those that this worker counts: each gradient of the model is in the list of exactly one worker.
    """
    gradients = [gradient for gradient in gradients if gradient.numel()]        # a shard may have no rows
    norms = foreach_norm(gradients, norm_type) if gradients else []
    stacked = torch.stack([norm.double().to(device) for norm in norms]) if norms else \
        torch.zeros(1, dtype=torch.float64, device=device)
    if norm_type == float("inf"):
        return workers.all_reduce(stacked.max(), largest=True)
    return workers.all_reduce(stacked.pow(norm_type).sum()) ** (1 / norm_type)
