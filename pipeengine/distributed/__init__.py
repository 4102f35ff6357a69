"""The workers of one pipeline: who they are, what they agree on, how values travel, how one failure becomes everybody's."""
from pipeengine.distributed.local import LocalTransport
from pipeengine.distributed.tied_parameters import Shared, SharedParameters
from pipeengine.distributed.transport import DistributedTransport
from pipeengine.distributed.workers import ProcessGroupWorkers, SingleProcess, connect

__all__ = ["SingleProcess", "DistributedTransport", "LocalTransport", "Shared", "SharedParameters", "ProcessGroupWorkers", "connect"]
