"""The workers of one pipeline: who they are, what they agree on, how values travel, how one failure becomes
everybody's."""

from pipeengine.distributed.buckets import Copies, deal
from pipeengine.distributed.failure import headline
from pipeengine.distributed.grad_norm import total_norm
from pipeengine.distributed.grid import Grid
from pipeengine.distributed.local import LocalTransport, Transport
from pipeengine.distributed.tied_parameters import NoTies, Tie, TiedParameters
from pipeengine.distributed.transport import DistributedTransport
from pipeengine.distributed.workers import ProcessGroupWorkers, SingleProcess, Workers, connect

__all__ = [
    "Copies",
    "DistributedTransport",
    "Grid",
    "LocalTransport",
    "NoTies",
    "ProcessGroupWorkers",
    "SingleProcess",
    "Tie",
    "TiedParameters",
    "Transport",
    "Workers",
    "connect",
    "deal",
    "headline",
    "total_norm",
]
