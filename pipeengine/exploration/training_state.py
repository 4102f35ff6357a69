"""What a parameter costs while training, besides itself: gradients and the optimizer's state. Bytes.

Everything that the search knows about the memory of training state stands here.
"""
from __future__ import annotations

from pipeengine.errors import InputError

# Bytes of optimizer state per byte of weights, in the weights' precision, as torch's optimizers keep it; "-master" adds
# weights and moments in float32 beside weights in half precision.
OPTIMIZERS = {"adamw": 2.0, "adam": 2.0, "adamw-master": 6.0, "momentum": 1.0, "sgd": 0.0}
_TOUCHED = 2.0          # times that an update reads or writes each byte of weights and state, gradients once


def state_factor(optimizer: str, num_replicas: int = 1, shard: str | None = None) -> float:
    """Bytes per byte of weights that a worker keeps all the time, gradients apart: weights and optimizer state.

    ``shard="optimizer"`` leaves each of ``num_replicas`` its part of the state. Raises ``InputError``.
    """
    return 1.0 + _state(optimizer) / (num_replicas if shard == "optimizer" else 1)


def update_bytes(optimizer: str, num_replicas: int = 1, shard: str | None = None) -> float:
    """Bytes per byte of weights that the optimizer's step moves through a device's memory."""
    return (_TOUCHED * (1.0 + _state(optimizer)) + 1.0) / (num_replicas if shard == "optimizer" else 1)


def _state(optimizer: str) -> float:
    if optimizer not in OPTIMIZERS:
        raise InputError(f"optimizer {optimizer!r} is none of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[optimizer]
