"""The workers of one pipeline: who they are, what they agree on, how values travel, how one failure becomes
everybody's."""

from pipeengine.distributed.failure import headline
from pipeengine.distributed.grad_norm import total_norm
from pipeengine.distributed.local import LocalTransport, Transport
from pipeengine.distributed.tied_parameters import NoTies, Tie, TiedParameters
from pipeengine.distributed.transport import DistributedTransport
from pipeengine.distributed.wishes import Wishes
from pipeengine.distributed.workers import ProcessGroupWorkers, SingleProcess, Workers, connect

__all__ = [
    "DistributedTransport",
    "LocalTransport",
    "NoTies",
    "ProcessGroupWorkers",
    "SingleProcess",
    "Tie",
    "TiedParameters",
    "Transport",
    "Wishes",
    "Workers",
    "connect",
    "headline",
    "total_norm",
]
