"""What a parameter costs while training, besides itself: gradients and the optimizer's state. Bytes.

Everything that the search knows about the memory of training state stands here.
"""
from __future__ import annotations

from partitioners.graph import OPTIMIZER_STATES, parameter_factor
from pipeengine.errors import InputError

_MASTER = "-master"     # weights and moments in float32 beside weights of two bytes
OPTIMIZERS = (*OPTIMIZER_STATES, "adamw-master")
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
    if optimizer.removesuffix(_MASTER) not in OPTIMIZER_STATES:
        raise InputError(f"optimizer {optimizer!r} is none of {', '.join(OPTIMIZERS)}")
    master = optimizer.endswith(_MASTER)
    return parameter_factor(optimizer.removesuffix(_MASTER), bytes_per_weight=2.0, master_weights=master) - 2.0
