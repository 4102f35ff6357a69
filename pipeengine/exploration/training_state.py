"""What a parameter costs while training, besides itself: gradients and the optimizer's state. Bytes.

Everything that the search knows about the memory of training state stands here.
"""
from __future__ import annotations

from partitioners import PartitionError
from partitioners.graph import MASTER, OPTIMIZER_STATES, parameter_factor
from pipeengine.errors import InputError

OPTIMIZERS = (*OPTIMIZER_STATES, "adamw" + MASTER)
_TOUCHED = 2.0          # times that an update reads or writes each byte of weights and state, gradients once


def state_factor(optimizer: str, num_replicas: int = 1, shard: str | None = None, *,
                 bytes_per_weight: float = 2.0) -> float:
    """Bytes per byte of weights that a worker keeps all the time, gradients apart: weights and optimizer state.

    ``shard="optimizer"`` leaves each of ``num_replicas`` its part of the state, ``"parameters"`` of weights too, which
    are whole besides while a step runs; master weights are counted for weights of ``bytes_per_weight``. Raises
    ``InputError``.
    """
    own = _state(optimizer, bytes_per_weight) + (1.0 if shard == "parameters" and num_replicas > 1 else 0.0)
    return 1.0 + own / (num_replicas if shard else 1)


def update_bytes(optimizer: str, num_replicas: int = 1, shard: str | None = None, *,
                 bytes_per_weight: float = 2.0) -> float:
    """Bytes per byte of weights that the optimizer's step moves through a device's memory."""
    whole = _TOUCHED * (1.0 + _state(optimizer, bytes_per_weight)) + 1.0
    return whole / (num_replicas if shard else 1)


def _state(optimizer: str, bytes_per_weight: float) -> float:
    try:
        return parameter_factor(optimizer, bytes_per_weight=bytes_per_weight) - 2.0
    except PartitionError as error:
        raise InputError(f"optimizer {optimizer!r} is none of {', '.join(OPTIMIZERS)}") from error
