"""Process groups with names of their own.

torch numbers the groups of a process by how many it has made. Two pipelines on disjoint processes, which never hear of
each other, would then have groups of one name and meet in the store. Here the members alone make a group, and its name
is new.
"""
from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from pipeengine.torch_private import default_store, new_process_group


def first_group(ranks: Sequence[int], timeout: timedelta | None) -> dist.ProcessGroup:
    """A gloo group of ``ranks``, numbered in this order, made by them alone.

    The store counts for each process how many groups of these members it has made: the next one is the same for all.
    """
    members = "-".join(map(str, ranks))
    number = default_store().add(f"pipeengine/groups/{members}/{dist.get_rank()}", 1)
    return new_process_group(ranks, "gloo", f"pipeengine/{members}/{number}", timeout)


class GroupMaker:
    """Makes the groups of one job; ``name`` is the job's, known to its members alone."""

    def __init__(self, name: str, timeout: timedelta | None):
        self._name, self._timeout = name, timeout

    def make(self, ranks: Sequence[int], backend: str, purpose: str) -> dist.ProcessGroup:
        """A group of ``ranks``, numbered in this order; each of them calls it, and no other.

        ``purpose`` tells groups of the same members apart.
        """
        return new_process_group(ranks, backend, f"pipeengine/{self._name}/{purpose}/{'-'.join(map(str, ranks))}",
                                 self._timeout)
