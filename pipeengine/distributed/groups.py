"""Process groups with names of their own.

torch numbers the groups of a process by how many it has made. Two pipelines on disjoint processes, which never hear of
each other, would then have groups of one name and meet in the store. Here the members alone make a group, and its name
is new.
"""
from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from pipeengine.distributed.failure import ConnectionLost
from pipeengine.distributed.waiting import Waiter
from pipeengine.errors import PipeEngineError
from pipeengine.torch_private import new_process_group


class GroupMaker:
    """Makes the groups of one job; ``name`` is the job's, and no other job of this store has it."""

    def __init__(self, name: str, timeout: timedelta | None, waiter: Waiter):
        self._name, self._timeout, self._waiter = name, timeout, waiter

    def make(self, ranks: Sequence[int], backend: str, purpose: str) -> dist.ProcessGroup:
        """A group of ``ranks``, numbered in this order; each of them calls it, and no other.

        ``purpose`` tells groups of the same members apart. Gloo connects to all peers at once, and one of them may die
        meanwhile, which raises ``ConnectionLost``; NCCL connects later.
        """
        def make() -> dist.ProcessGroup:
            return new_process_group(ranks, backend, f"{self._name}/{purpose}/{'-'.join(map(str, ranks))}",
                                     self._timeout)
        if backend != "gloo":
            return make()
        try:
            return self._waiter.run(make)
        except (RuntimeError, dist.DistError) as error:
            raise error if isinstance(error, PipeEngineError) else ConnectionLost(str(error)) from error
