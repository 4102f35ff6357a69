"""The workers of one job: who they are, what they agree on, and how one failure becomes everybody's.

Three things travel here besides the data: one small gather before a step (do all workers have the same batch, and can
all of them run it?), the loss after it, and, when something breaks, its cause.
"""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import cache
from typing import Protocol, TypeVar, cast

import torch
import torch.distributed as dist

from pipeengine.distributed.activity import Unwatched
from pipeengine.distributed.board import Board, StoreBoard
from pipeengine.distributed.buckets import Copies
from pipeengine.distributed.codec import decode_or_raise, encode_or_tell
from pipeengine.distributed.failure import ConnectionLost, Description, start
from pipeengine.distributed.grid import Grid
from pipeengine.distributed.groups import GroupMaker
from pipeengine.distributed.guard import Guard, GuardSettings, Told
from pipeengine.distributed.local import Transport
from pipeengine.distributed.outside import leave_outside, watch_outside
from pipeengine.distributed.replicas import ReplicatedParameters
from pipeengine.distributed.sharded_parameters import ShardedParameters
from pipeengine.distributed.sharding import Sharding
from pipeengine.distributed.tied_parameters import NoTies, Tie, TiedParameters
from pipeengine.distributed.transport import DistributedTransport
from pipeengine.distributed.waiting import Waiter, give_up
from pipeengine.distributed.wishes import Wishes
from pipeengine.errors import InputError, PipeEngineError, WorkerError
from pipeengine.torch_private import default_store

SLOTS = 13          # of eight bytes, in the record that every call begins with
_VERDICT_SECONDS = 5.0      # until the guard has said who is to blame; on a busy machine two were too few
EVERYWHERE = 2      # of the facts that are agreed on: alike in all replicas, the others inside each
T = TypeVar("T")
Explain = Callable[[str], Mapping[str, str]]
"""What a worker tells about a fact, by name, so that an error can say what is behind it."""


class Workers(Protocol):
    """The workers of one pipeline, or of several replicas of it, seen from worker ``rank`` of ``size``.

    ``grid`` says which replica it is in, and where. Every method but ``publish`` and ``published`` is called by all.
    """

    rank: int
    size: int
    grid: Grid
    wishes: Wishes

    @property
    def backend(self) -> str | None:
        """What carries values between stages; None inside one process."""

    def arrange(self, num_replicas: int) -> None:
        """Stand in so many pipelines of equal length, before anything is made that rests on ``grid``."""

    @property
    def activity(self) -> Unwatched:
        """Where this worker says what it is doing."""

    @property
    def board(self) -> Board:
        """Where workers leave notes for each other."""

    def run_synchronized(self, what: Callable[[], T]) -> T:
        """Do something that needs no other worker, on all of them; if it fails on one, raise its error on all."""

    def agree(self, facts: Sequence[int], problem: PipeEngineError | None, names: Sequence[str],
              told: Sequence[int] = (), explain: Explain | None = None) -> Sequence[Sequence[int]]:
        """The same ``facts`` everywhere (the first two) and in each replica (the others), and nobody has a ``problem``;
        else the same error everywhere, which names the first entry of ``explain(name)`` that differs, where one does.
        Returns what each worker has ``told`` where there are replicas."""

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """``source``'s ``value`` on every worker."""

    def all_gather_object(self, value: T) -> list[T]:
        """Every worker's ``value``, in order of rank."""

    def broadcast(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """A tensor of ``source`` on every worker; all pass one of the same shape and dtype."""

    def send_to_first(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """A tensor of ``source`` on worker 0; only these two call it, and both pass one of the same shape and dtype."""

    def all_reduce(self, tensor: torch.Tensor, largest: bool = False) -> torch.Tensor:
        """Sum (or maximum) over all workers."""

    def connect_stages(self, worker_of: Sequence[int], device: torch.device) -> Transport:
        """What carries values between stages, ``worker_of[stage]`` being the worker that holds it."""

    def tie(self, ties: Sequence[Tie], tensors: Mapping[str, torch.Tensor], device: torch.device
            ) -> TiedParameters | NoTies:
        """What keeps copies of shared parameters equal; they have the owner's value afterwards."""

    def replicate(self, copies: Sequence[Copies], tensors: Mapping[str, torch.Tensor],
                  owner: Mapping[str, int] | None, sharding: Sharding | None = None) -> NoTies:
        """The same where there are replicas; with ``owner`` each parameter is updated by one worker, with ``sharding``
        each worker holds and updates rows of those that it names."""

    def fail(self, error: BaseException, where: str) -> BaseException:
        """Tell the others of ``error``, and return what this worker is to raise."""

    def publish(self, text: str) -> None:
        """Leave a text for the others to find; nobody waits."""

    def published(self) -> dict[int, str]:
        """What each worker has left last, for those that have."""

    def close(self) -> None:
        """Give the connections up."""


class ProcessGroupWorkers:
    """The processes of ``num_replicas`` pipelines, on a control group of their own."""

    def __init__(self, ranks: Sequence[int], timeout: timedelta, backend: str = "gloo",
                 settings: GuardSettings | None = None, num_replicas: int = 1):
        self.ranks, self.backend = tuple(ranks), backend
        self.rank, self.size = self.ranks.index(dist.get_rank()), len(self.ranks)
        self.grid = Grid.of(self.rank, self.size, num_replicas)
        self.timeout = timeout
        self.wishes = Wishes()
        self._group: dist.ProcessGroup | None = None
        self._guard = Guard(self.rank, self.size, settings or GuardSettings())
        self.activity = self._guard.activity
        self.waiter = Waiter(self._guard.interrupted, waits=self._guard.activity.wait)
        name = "pipeengine/" + "-".join(map(str, self.ranks))
        try:
            with self.activity.section("construction", takes_long=True):
                name += f"/{self._guard.connect(dist.PrefixStore(name, default_store()), self.waiter.run)}"
                self._store = dist.PrefixStore(name, default_store())
                self.board = StoreBoard(dist.PrefixStore("board", self._store))
                self._groups = GroupMaker(name, timeout, self.waiter)
                self._group = self._groups.make(self.ranks, "gloo", "control")
            watch_outside(self)
        except BaseException as error:
            failure = self.fail(error, "while connecting")
            self.close()
            raise failure from None

    def arrange(self, num_replicas: int) -> None:
        """Stand in so many pipelines; the number of workers is a multiple of theirs."""
        self.grid = Grid.of(self.rank, self.size, num_replicas)

    def connect_stages(self, worker_of: Sequence[int], device: torch.device) -> Transport:
        """A transport with groups of its own; every worker calls it."""
        own = [self.ranks[worker] for worker in self.grid.pipeline]
        return DistributedTransport(worker_of, self.grid.place, own, device, self.backend, self._groups, self.waiter)

    def tie(self, ties: Sequence[Tie], tensors: Mapping[str, torch.Tensor], device: torch.device) -> TiedParameters:
        """The copies of shared tensors, on groups of their own, equal from the start; every worker calls it."""
        tied = TiedParameters(ties, {tie.name: tensors[tie.name] for tie in ties if self.rank in tie.workers},
                              self.rank, self.ranks, self.backend, self._groups, self.waiter)
        tied.equalise()
        return tied

    def replicate(self, copies: Sequence[Copies], tensors: Mapping[str, torch.Tensor],
                  owner: Mapping[str, int] | None, sharding: Sharding | None = None
                  ) -> ReplicatedParameters | ShardedParameters:
        """The copies of tensors in all replicas, on groups of their own, equal from the start; every worker calls
        it."""
        dealt = {} if sharding is None else sharding.slots
        replicated = ReplicatedParameters([one for one in copies if one.name not in dealt], tensors, self.rank,
                                          self.ranks, self.backend, self._groups, self.waiter, owner)
        replicated.equalise()
        own = [one for one in copies if one.name in dealt and self.rank in one.workers]
        if sharding is None or not own:
            return replicated
        return ShardedParameters(own, tensors, sharding, replicated, self.rank, self.ranks, self.backend, self._groups,
                                 self.waiter)

    # -- collectives ------------------------------------------------------------------------------------------------

    def _wait(self, work: dist.Work) -> None:
        try:
            self.waiter.wait(work)
        finally:
            del work

    def all_gather_object(self, value: T) -> list[T]:
        """Every worker's ``value``, in order of rank."""
        data = encode_or_tell(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in self.ranks]
        self._wait(start(dist.all_gather, sizes, torch.tensor([data.numel()]), group=self._group, async_op=True))
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[:data.numel()] = data
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in self.ranks]
        self._wait(start(dist.all_gather, parts, padded, group=self._group, async_op=True))
        return [cast(T, decode_or_raise(part[:int(size)], rank))
                for rank, (part, size) in enumerate(zip(parts, sizes))]

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """``source``'s ``value`` on every worker."""
        data = encode_or_tell(value) if self.rank == source else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([data.numel()])
        self._wait(start(dist.broadcast, size, self.ranks[source], group=self._group, async_op=True))
        if self.rank != source:
            data = torch.empty(int(size), dtype=torch.uint8)
        self._wait(start(dist.broadcast, data, self.ranks[source], group=self._group, async_op=True))
        arrived = cast(T, decode_or_raise(data, source))
        return value if self.rank == source else arrived

    def broadcast(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """A small tensor of ``source`` on every worker; all pass one of the same shape and dtype."""
        moved = tensor.detach().cpu().contiguous()
        self._wait(start(dist.broadcast, moved, self.ranks[source], group=self._group, async_op=True))
        return moved.to(tensor.device)

    def send_to_first(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """A tensor of ``source`` on worker 0; only these two call it, and both pass one of the same shape and dtype."""
        moved = tensor.detach().cpu().contiguous()
        if source == 0:
            return moved
        operation, peer = (dist.irecv, source) if self.rank == 0 else (dist.isend, 0)
        self._wait(start(operation, moved, self.ranks[peer], group=self._group))
        return moved

    def all_reduce(self, tensor: torch.Tensor, largest: bool = False) -> torch.Tensor:
        """Sum (or maximum) over all workers."""
        if tensor.dim() == 0 and tensor.dtype == torch.float64:     # in the record that says which call this is
            mine = self._record()
            mine[-1:].view(torch.float64)[0] = tensor
            parts = torch.stack([row[-1:].view(torch.float64)[0] for row in self._exchange(mine)])
            return (parts.max() if largest else parts.sum()).to(tensor.device)
        moved = tensor.detach().cpu()
        kind = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
        self._wait(start(dist.all_reduce, moved, kind, group=self._group, async_op=True))
        return moved.to(tensor.device)

    def _record(self, *numbers: int) -> torch.Tensor:
        """What every call begins with: which call it is, then ``numbers``; the last slot is free."""
        mine = torch.zeros(SLOTS, dtype=torch.int64)
        filled = torch.tensor([fact & (1 << 63) - 1 for fact in (_number(self.activity.call), *numbers)])
        mine[:len(filled)] = filled
        return mine

    def _exchange(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """Every worker's record. Raises ``InputError`` on every worker where they are in different calls: all records
        have one size and shape, so that no two kinds of collective meet."""
        rows = [torch.empty_like(mine) for _ in self.ranks]
        self._wait(start(dist.all_gather, rows, mine, group=self._group, async_op=True))
        if any(int(row[0]) != int(mine[0]) for row in rows):
            calls = self.all_gather_object(self.activity.call)
            odd = next(rank for rank, call in enumerate(calls) if call != calls[0])
            raise InputError(f"workers make different calls: worker 0 calls {calls[0]}, worker {odd} {calls[odd]}; "
                             "every worker must make the same calls in the same order (is one of them inside an "
                             "'if rank == 0'?)")
        return rows

    # -- records ----------------------------------------------------------------------------------------------------

    def publish(self, text: str) -> None:
        """Leave a text for the others to find; nobody waits. Where the store is gone, nobody finds it."""
        with suppress(RuntimeError, dist.DistError):
            self.waiter.run(lambda: self._store.set(f"records/{self.rank}", text))

    def published(self) -> dict[int, str]:
        """What each worker has left last, for those that have."""
        keys = {rank: f"records/{rank}" for rank in range(self.size)}
        return {rank: self._store.get(key).decode() for rank, key in keys.items() if self._store.check([key])}

    # -- agreement --------------------------------------------------------------------------------------------------

    def run_synchronized(self, what: Callable[[], T]) -> T:
        """Do something that needs no other worker, on all of them; if it fails on one, raise its error on all."""
        try:
            result, problem = what(), None
        except Exception as error:
            result, problem = None, error
        self._raise_first(problem)
        return result

    def agree(self, facts: Sequence[int], problem: PipeEngineError | None, names: Sequence[str],
              told: Sequence[int] = (), explain: Explain | None = None) -> Sequence[Sequence[int]]:
        """One small gather: the same first two of ``facts`` everywhere, the same others in each replica, and nobody has
        a ``problem``; else the same error everywhere. Returns what each worker has ``told`` where there are
        replicas."""
        mine = self._record(problem is not None, *facts)
        if told:
            mine[2 + len(facts):2 + len(facts) + len(told)] = torch.tensor(told)
        mine[-1] = self.wishes.own()
        found = self._exchange(mine)
        for other in found:
            self.wishes.hear(int(other[-1]))
            other[-1] = mine[-1]        # what a worker asks for is no disagreement
        replicas = self.grid.num_replicas
        if replicas == 1 and problem is None and all(torch.equal(other, mine) for other in found):
            return ()
        rows = [other.tolist()[1:] for other in found]
        if any(row[0] for row in rows):
            self._raise_first(problem)
        for number, name in enumerate(names, 1):
            alike = self.size if number <= EVERYWHERE else self.grid.width
            for first in range(0, self.size, alike):
                self._compare(name, first, [row[number] for row in rows[first:first + alike]], explain)
        return [row[1 + len(facts):] for row in rows] if replicas > 1 else ()

    def _compare(self, name: str, first: int, values: Sequence[int], explain: Explain | None) -> None:
        """Raise ``InputError`` unless the workers from ``first`` on have one value."""
        other = next((number for number, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            if explain is not None:
                self._name_difference(first, first + other, self.all_gather_object(explain(name)))
            raise InputError(f"workers disagree on {name}: worker {first} has {values[0]}, worker {first + other} has "
                             f"{values[other]}; every worker of a pipeline must make the same calls with the same "
                             "batch (a DistributedSampler, or a loader that accelerate has prepared, gives each worker "
                             "another part of it, and so does a shuffle without a common seed; give it the number of "
                             "replicas and pipe.replica)")

    @staticmethod
    def _name_difference(first: int, other: int, told: Sequence[Mapping[str, str]]) -> None:
        """Raise ``InputError`` for the first entry that workers ``first`` and ``other`` have told otherwise."""
        for name, value in told[first].items():
            if told[other].get(name, value) != value:
                raise InputError(f"workers disagree on {name}: worker {first} has {value}, worker {other} has "
                                 f"{told[other][name]}; set it on every worker, at the same step")

    def _raise_first(self, problem: Exception | None) -> None:
        """Raise the problem of the first worker that has one, on every worker."""
        for rank, description in enumerate(self.all_gather_object(problem and Description.of(problem))):
            if description is not None:
                raise problem if rank == self.rank else Description(*description).error(rank)

    # -- failure ----------------------------------------------------------------------------------------------------

    def fail(self, error: BaseException, where: str) -> BaseException:
        """Tell the others of ``error`` unless another worker is to blame; returns what this worker is to raise."""
        if isinstance(error, Told):
            return WorkerError(str(error))
        verdict = self._guard.verdict()
        lost = isinstance(error, ConnectionLost)
        if verdict is None:
            if not lost:
                self._guard.tell(Description.of(error), where)
            # A closed connection is a consequence: the guard knows of what.
            verdict = self._guard.verdict(_VERDICT_SECONDS)
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            return error
        if verdict is not None and not (verdict.rank == self.rank and verdict.kind == "failed"):
            return WorkerError(verdict.text())
        if lost:
            return WorkerError(
                f"worker {self.rank} lost its connection {where}; another worker has died or been stopped: {error}"
            )
        return WorkerError(f"worker {self.rank} failed {where}: {type(error).__name__}: {error}")

    def close(self) -> None:
        """Give up the control group and the guard. Dropping the last reference closes the connections."""
        leave_outside(self)
        self.waiter.close()
        groups = [] if self._group is None else [self._group]
        self._group = None
        give_up(groups)
        self._guard.close()


@cache
def _number(call: str) -> int:
    """A number that stands for a call, the same on every worker."""
    return int.from_bytes(hashlib.sha256(call.encode()).digest()[:7], "big")
