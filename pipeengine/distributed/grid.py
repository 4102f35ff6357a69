"""Several pipelines side by side: who stands where."""
from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product

import torch.distributed as dist

from pipeengine.errors import InputError

PIPELINE, SHARDS = "pp", "dp_shard"
REPLICAS = ("dp_replicate", "dp", SHARDS)


@dataclass(frozen=True)
class Grid:
    """Where one worker stands: at ``place`` of the ``width`` workers of pipeline ``replica`` of ``num_replicas``.

    Workers are numbered through the replicas: worker 0 is at place 0 of replica 0, worker ``width`` at place 0 of
    replica 1.
    """

    num_replicas: int
    width: int
    replica: int
    place: int

    @classmethod
    def of(cls, worker: int, num_workers: int, num_replicas: int) -> Grid:
        """Where ``worker`` stands among ``num_workers`` in ``num_replicas`` pipelines of equal width."""
        width = num_workers // num_replicas
        return cls(num_replicas, width, *divmod(worker, width))

    def worker(self, place: int, replica: int | None = None) -> int:
        """The number of the worker at ``place`` of ``replica`` (this one's own, unless given)."""
        return (self.replica if replica is None else replica) * self.width + place

    @property
    def pipeline(self) -> range:
        """The workers of the own pipeline, by place."""
        return range(self.worker(0), self.worker(self.width))

    def everywhere(self, places: Collection[int]) -> tuple[int, ...]:
        """The workers at ``places`` of all replicas, ascending."""
        return tuple(self.worker(place, replica) for replica, place in product(range(self.num_replicas),
                                                                               sorted(places)))


def ranks_of_mesh(mesh: dist.DeviceMesh, num_replicas: int | None) -> tuple[tuple[int, ...], int]:
    """The ranks of all workers, numbered through the replicas, and the number of replicas.

    The mesh has a dimension "pp", and may have one "dp_replicate" (or "dp", or "dp_shard"), in any order; a mesh of one
    dimension is a pipeline whatever its name. Raises ``InputError`` for other dimensions, and in a process outside the
    mesh.
    """
    names, ranks = tuple(mesh.mesh_dim_names or ()), mesh.mesh
    if mesh.get_coordinate() is None:
        raise InputError(f"rank {dist.get_rank()} is not in the mesh, whose ranks are {ranks.flatten().tolist()}; make "
                         "the Pipeline in those processes only")
    if ranks.dim() == 1 and not set(names) & set(REPLICAS):
        names = (PIPELINE,)
    strange = [name for name in names if name not in (PIPELINE, *REPLICAS)]
    if SHARDS in names and len(set(names) & set(REPLICAS)) > 1:
        raise InputError(f"the mesh has the dimensions {names}; parameters are sharded over all replicas: give them "
                         'one dimension, "dp_shard"')
    if strange or len(names) != ranks.dim() or len(set(names) & set(REPLICAS)) > 1:
        raise InputError(f'the mesh has the dimensions {names or ranks.dim()}; give "pp" and, for several pipelines, '
                         f'"dp_replicate" (or "dp") or "dp_shard", such as mesh["pp", "dp_replicate"] or mesh["pp"]')
    across = next((names.index(name) for name in names if name in REPLICAS), None)
    rows = ranks.reshape(1, -1) if across is None else ranks.movedim(across, 0).reshape(ranks.shape[across], -1)
    if num_replicas not in (None, len(rows)):
        raise InputError(f"num_replicas is {num_replicas}, the mesh has {len(rows)} replicas; leave num_replicas out")
    return tuple(rows.flatten().tolist()), len(rows)


def ranks_of_world(num_processes: int, num_replicas: int | None) -> tuple[Sequence[int], int]:
    """All processes, the workers of a pipeline next to each other, and the number of replicas. Raises ``InputError``
    where they cannot be shared out."""
    count = num_replicas or 1
    if num_processes % count:
        raise InputError(f"{num_processes} processes cannot be shared out to {count} pipelines of equal length; start "
                         f"a multiple of {count} processes (plain Python is one)")
    return range(num_processes), count
