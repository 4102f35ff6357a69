"""The workers of one pipeline: who they are, what they agree on, how values travel, how one failure becomes
everybody's."""

from pipeengine.distributed.activity import Activity, Unwatched
from pipeengine.distributed.buckets import Copies, deal
from pipeengine.distributed.connecting import connect
from pipeengine.distributed.failure import ConnectionLost, headline
from pipeengine.distributed.grad_norm import total_norm
from pipeengine.distributed.grid import Grid, ranks_of_mesh, ranks_of_world
from pipeengine.distributed.guard import GuardSettings
from pipeengine.distributed.local import LocalTransport, Transport
from pipeengine.distributed.outside import guarded_collectives
from pipeengine.distributed.sharded_tensors import check_rows, is_sharded, own_part, own_rows, put_whole, shard_like
from pipeengine.distributed.sharding import Sharding, held_elsewhere, reason_to_keep
from pipeengine.distributed.single_process import SingleProcess
from pipeengine.distributed.tied_parameters import NoTies, Tie, TiedParameters
from pipeengine.distributed.transport import DistributedTransport
from pipeengine.distributed.wishes import Wishes
from pipeengine.distributed.workers import ProcessGroupWorkers, Workers

__all__ = [
    "Activity",
    "ConnectionLost",
    "Copies",
    "DistributedTransport",
    "Grid",
    "GuardSettings",
    "LocalTransport",
    "NoTies",
    "ProcessGroupWorkers",
    "Sharding",
    "SingleProcess",
    "Tie",
    "TiedParameters",
    "Transport",
    "Unwatched",
    "Wishes",
    "Workers",
    "check_rows",
    "connect",
    "deal",
    "guarded_collectives",
    "headline",
    "held_elsewhere",
    "is_sharded",
    "own_part",
    "own_rows",
    "put_whole",
    "ranks_of_mesh",
    "ranks_of_world",
    "reason_to_keep",
    "shard_like",
    "total_norm",
]
