"""The batches of several replicas as one: how micro-batches are numbered through them, and what each counts for.

The definition is one plain process that runs the micro-batches of replica 0, then of replica 1, and so on.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from pipeengine.distributed import Workers
from pipeengine.errors import InputError
from pipeengine.runtime.outputs import across, join_outputs
from pipeengine.runtime.tasks import Look, Prepared, TaskMaker
from pipeengine.stages import Shares, Totals, Weights, as_weights


@dataclass(frozen=True)
class Seen:
    """One replica's batch and its part in the whole, as far as it knows."""

    look: Look
    shares: Shares


@dataclass(frozen=True)
class Known:
    """What all replicas have told: the number of each one's first micro-batch and of the micro-batches in all, their
    ``totals``, whether some worker has new values for others, and the tokens (or rows) of all batches."""

    firsts: tuple[int, ...]
    num_microbatches: int
    totals: tuple[Totals, ...]
    is_stale: bool
    amount: int


class ReplicaBatches:
    """Numbers and weighs this replica's micro-batches among all."""

    def __init__(self, tasks: TaskMaker, workers: Workers):
        self._tasks, self._workers, self._grid = tasks, workers, workers.grid

    @property
    def replica(self) -> int:
        """The number of this replica."""
        return self._grid.replica

    def usual_firsts(self) -> tuple[int, ...]:
        """The number of each replica's first micro-batch when all have as many as was asked for."""
        return tuple(self._tasks.reader.num_microbatches * replica for replica in range(self._grid.num_replicas))

    def see(self, look: Look) -> Seen:
        """What this replica knows of its batch."""
        return Seen(look, self._tasks.shares(look))

    def tell(self, seen: Seen, is_stale: bool) -> tuple[int, ...]:
        """Five whole numbers for the other workers."""
        flags = is_stale + 2 * seen.look.training + 4 * (seen.look.chosen[0].recording.loss is not None)
        return len(seen.look.parts) << 3 | flags, *seen.shares.totals.to_words(), seen.look.batch.amount()[0]

    def read(self, everybody: Sequence[Sequence[int]]) -> Known:
        """What every worker has told. Raises ``InputError`` on all where one trains while another evaluates."""
        told = everybody[::self._grid.width]
        kinds = [words[0] & 6 for words in told]
        if len(set(kinds)) > 1:
            other = next(replica for replica, kind in enumerate(kinds) if kind != kinds[0])
            what = [f"{'step' if kind & 2 else 'evaluate'} with{'' if kind & 4 else 'out'} a loss"
                    for kind in (kinds[0], kinds[other])]
            raise InputError(f"replica 0 calls {what[0]}, replica {other} {what[1]}; all replicas make the same calls")
        counts = [words[0] >> 3 for words in told]
        return Known(tuple(accumulate(counts, initial=0))[:-1], sum(counts),
                     tuple(Totals.from_words(*words[1:4]) for words in told),
                     any(words[0] & 1 for words in everybody), sum(words[4] for words in told))

    def weigh(self, seen: Seen, known: Known) -> Weights:
        """What each of the own micro-batches counts for in the loss of all; every worker calls it."""
        weights = seen.shares.weigh(known.totals)
        if weights is not None:
            return weights
        everybody = self._gather_tensors(seen.look.batch.tensors)
        return self._workers.run_synchronized(lambda: self._weigh_whole(seen, known, everybody))

    def _weigh_whole(self, seen: Seen, known: Known, everybody: Sequence[Sequence[torch.Tensor]]) -> Weights:
        """By the whole batch, which every worker gets for this: a loss that is divided by something else than rows or
        targets. Replicas whose batches cannot be one (other lengths) leave the shares of rows."""
        batch, replica = seen.look.batch, self.replica
        shapes = {tuple((*tensor.shape[:dim], *tensor.shape[dim + 1:]) if dim is not None else tensor.shape
                        for tensor, dim in zip(theirs, batch.dims)) for theirs in everybody}
        if len(shapes) > 1:
            rows = sum(one.rows for one in known.totals)
            loss = [size / rows for size in seen.shares.sizes]
            return as_weights([(weight,) * max(1, n) for weight, n in zip(loss, seen.shares.num_terms)], loss)
        whole = batch.again([torch.cat([theirs[i] for theirs in everybody], dim) if dim is not None else
                             everybody[replica][i] for i, dim in enumerate(batch.dims)])
        return self._tasks.weigh_part(whole, seen.look, [batch.again(theirs) for theirs in everybody],
                                      known.firsts, replica)

    def _gather_tensors(self, own: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
        """Each replica's tensors, from its first worker."""
        grid, device = self._grid, self._tasks.reader.device
        forms = self._workers.all_gather_object([(list(tensor.shape), str(tensor.dtype)) for tensor in own])
        gathered = []
        for replica, first in enumerate(range(0, self._workers.size, grid.width)):
            alike = [torch.empty(shape, dtype=getattr(torch, dtype.partition(".")[2]), device=device)
                     for shape, dtype in forms[first]]
            mine = [tensor.to(device) for tensor in own] if replica == grid.replica else alike
            gathered.append([self._workers.broadcast(tensor, first) for tensor in mine])
        return gathered

    def gather(self, merged: Sequence[torch.Tensor] | None, prepared: Prepared, place: int) -> list[torch.Tensor]:
        """The outputs for all replicas' rows, one after the other, on every worker; ``merged`` are this replica's on
        the worker at ``place``."""
        grid, first, device = self._grid, prepared.specializations[0], self._tasks.reader.device
        own = merged if grid.place == place else None
        rows = sum(task.rows for task in prepared.tasks)
        outputs, everybody = [], []
        for replica in range(grid.num_replicas):
            arrived = self._workers.broadcast_object((own, rows), grid.worker(place, replica))
            outputs.append([tensor.to(device) for tensor in arrived[0] or ()])
            everybody.append(arrived[1])
        return join_outputs(first, outputs, across(prepared.joins, everybody, first.recording))
