"""The workers of one job: who they are, what they agree on, and how one failure becomes everybody's.

Three things travel here besides the data: one small gather before a step (do all workers have the same batch, and can
all of them run it?), the loss after it, and, when something breaks, its cause.
"""
from __future__ import annotations

import json
import pickle
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from time import sleep
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from pipeengine.distributed.buckets import Copies
from pipeengine.distributed.failure import ConnectionLost, Description, start
from pipeengine.distributed.grid import Grid, ranks_of_mesh, ranks_of_world
from pipeengine.distributed.groups import GroupMaker, first_group
from pipeengine.distributed.local import LocalTransport, Transport
from pipeengine.distributed.replicas import ReplicatedParameters
from pipeengine.distributed.tied_parameters import NoTies, Tie, TiedParameters
from pipeengine.distributed.transport import DistributedTransport
from pipeengine.distributed.waiting import Waiter, give_up
from pipeengine.errors import InputError, PipeEngineError, WorkerError
from pipeengine.torch_private import default_store

_SLOTS = 8
T = TypeVar("T")


class Workers(Protocol):
    """The workers of one pipeline, or of several replicas of it, seen from worker ``rank`` of ``size``.

    ``grid`` says which replica it is in, and where. Every method but ``publish`` and ``published`` is called by all.
    """

    rank: int
    size: int
    grid: Grid
    backend: str | None

    def run_synchronized(self, what: Callable[[], T]) -> T:
        """Do something that needs no other worker, on all of them; if it fails on one, raise its error on all."""

    def agree(self, facts: Sequence[int], problem: PipeEngineError | None, names: Sequence[str],
              told: Sequence[int] = ()) -> Sequence[Sequence[int]]:
        """The same ``facts`` everywhere (the first) and in each replica (the others), and nobody has a ``problem``;
        else the same error everywhere. Returns what each worker has ``told`` where there are replicas."""

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
                  owner: Mapping[str, int] | None) -> NoTies:
        """The same where there are replicas; with ``owner`` each parameter is updated by one worker."""

    def fail(self, error: BaseException, where: str) -> BaseException:
        """Tell the others of ``error``, and return what this worker is to raise."""

    def publish(self, text: str) -> None:
        """Leave a text for the others to find; nobody waits."""

    def published(self) -> dict[int, str]:
        """What each worker has left last, for those that have."""

    def close(self) -> None:
        """Give the connections up."""


class SingleProcess:
    """One process that runs every stage."""

    rank, size = 0, 1
    grid = Grid(1, 1, 0, 0)
    backend = None

    def __init__(self) -> None:
        self._published: dict[int, str] = {}

    def run_synchronized(self, what: Callable[[], T]) -> T:
        """Do it."""
        return what()

    def agree(self, facts: Sequence[int], problem: PipeEngineError | None, names: Sequence[str],
              told: Sequence[int] = ()) -> Sequence[Sequence[int]]:
        """Raise the ``problem``, if there is one."""
        if problem is not None:
            raise problem
        return ()

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """The value itself."""
        return value

    def all_gather_object(self, value: T) -> list[T]:
        """A list of the one value."""
        return [value]

    def broadcast(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """The tensor itself."""
        return tensor

    def send_to_first(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """The tensor itself."""
        return tensor

    def all_reduce(self, tensor: torch.Tensor, largest: bool = False) -> torch.Tensor:
        """The tensor itself."""
        return tensor

    def connect_stages(self, worker_of: Sequence[int], device: torch.device) -> Transport:
        """Stages hand values over as they are."""
        return LocalTransport()

    def tie(self, ties: Sequence[Tie], tensors: Mapping[str, torch.Tensor], device: torch.device) -> NoTies:
        """Aliases are one tensor here: nothing to keep equal."""
        return NoTies()

    def replicate(self, copies: Sequence[Copies], tensors: Mapping[str, torch.Tensor],
                  owner: Mapping[str, int] | None) -> NoTies:
        """One process has no replicas."""
        return NoTies()

    def fail(self, error: BaseException, where: str) -> BaseException:
        """Nobody to tell: the error as it is."""
        return error

    def publish(self, text: str) -> None:
        """Keep the text."""
        self._published = {0: text}

    def published(self) -> dict[int, str]:
        """The text kept last, if any, as that of worker 0."""
        return self._published

    def close(self) -> None:
        """No connections to give up."""


class ProcessGroupWorkers:
    """The processes of ``num_replicas`` pipelines, on a control group of their own."""

    def __init__(self, ranks: Sequence[int], timeout: timedelta, backend: str = "gloo", num_replicas: int = 1):
        self.ranks, self.backend = tuple(ranks), backend
        self.rank, self.size = self.ranks.index(dist.get_rank()), len(self.ranks)
        self.grid = Grid.of(self.rank, self.size, num_replicas)
        self.timeout = timeout
        self.waiter = Waiter(self.interrupted)
        self._name: str | None = None
        self._group: dist.ProcessGroup | None = first_group(self.ranks, timeout)
        self._store = dist.PrefixStore("pipeengine", default_store())
        self._name = self.broadcast_object(uuid.uuid4().hex)
        self._groups = GroupMaker(self._name, timeout)

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
                  owner: Mapping[str, int] | None) -> ReplicatedParameters:
        """The copies of tensors in all replicas, on groups of their own, equal from the start; every worker calls
        it."""
        replicated = ReplicatedParameters(copies, tensors, self.rank, self.ranks, self.backend, self._groups,
                                          self.waiter, owner)
        replicated.equalise()
        return replicated

    # -- collectives ------------------------------------------------------------------------------------------------

    def _wait(self, work: dist.Work) -> None:
        try:
            self.waiter.wait(work)
        finally:
            del work

    def all_gather_object(self, value: T) -> list[T]:
        """Every worker's ``value``, in order of rank."""
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in self.ranks]
        self._wait(start(dist.all_gather, sizes, torch.tensor([data.numel()]), group=self._group, async_op=True))
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[:data.numel()] = data
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in self.ranks]
        self._wait(start(dist.all_gather, parts, padded, group=self._group, async_op=True))
        return [pickle.loads(bytes(part[:int(size)].tolist())) if int(size) < 1 << 12 else
                pickle.loads(part[:int(size)].numpy().tobytes()) for part, size in zip(parts, sizes)]

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """``source``'s ``value`` on every worker."""
        data = torch.frombuffer(bytearray(pickle.dumps(value if self.rank == source else None)), dtype=torch.uint8)
        size = torch.tensor([data.numel()])
        self._wait(start(dist.broadcast, size, self.ranks[source], group=self._group, async_op=True))
        if self.rank != source:
            data = torch.empty(int(size), dtype=torch.uint8)
        self._wait(start(dist.broadcast, data, self.ranks[source], group=self._group, async_op=True))
        return value if self.rank == source else pickle.loads(data.numpy().tobytes())

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
        moved = tensor.detach().cpu()
        kind = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
        self._wait(start(dist.all_reduce, moved, kind, group=self._group, async_op=True))
        return moved.to(tensor.device)

    # -- records ----------------------------------------------------------------------------------------------------

    def publish(self, text: str) -> None:
        """Leave a text for the others to find; nobody waits."""
        self._store.set(f"{self._name}/records/{self.rank}", text)

    def published(self) -> dict[int, str]:
        """What each worker has left last, for those that have."""
        keys = {rank: f"{self._name}/records/{rank}" for rank in range(self.size)}
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
              told: Sequence[int] = ()) -> Sequence[Sequence[int]]:
        """One small gather: the same first of ``facts`` everywhere, the same others in each replica, and nobody has a
        ``problem``; else the same error everywhere. Returns what each worker has ``told`` where there are replicas."""
        mine = torch.zeros(_SLOTS, dtype=torch.int64)
        mine[0] = problem is not None
        mine[1:1 + len(facts)] = torch.tensor([fact & (1 << 63) - 1 for fact in facts])
        mine[1 + len(facts):1 + len(facts) + len(told)] = torch.tensor(told, dtype=torch.int64)
        found = [torch.empty_like(mine) for _ in self.ranks]
        self._wait(start(dist.all_gather, found, mine, group=self._group, async_op=True))
        replicas = self.grid.num_replicas
        if replicas == 1 and problem is None and all(torch.equal(other, mine) for other in found):
            return ()
        rows = [other.tolist() for other in found]
        if any(row[0] for row in rows):
            self._raise_first(problem)
        for number, name in enumerate(names, 1):
            alike = self.size if number == 1 else self.grid.width
            for first in range(0, self.size, alike):
                self._compare(name, first, [row[number] for row in rows[first:first + alike]])
        return [row[1 + len(facts):] for row in rows] if replicas > 1 else ()

    @staticmethod
    def _compare(name: str, first: int, values: Sequence[int]) -> None:
        """Raise ``InputError`` unless the workers from ``first`` on have one value."""
        other = next((number for number, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise InputError(f"workers disagree on {name}: worker {first} has {values[0]}, worker {first + other} has "
                             f"{values[other]}; every worker of a pipeline must make the same calls with the same "
                             "batch (a DistributedSampler, or a loader that accelerate has prepared, gives each worker "
                             "another part of it, and so does a shuffle without a common seed; give it the number of "
                             "replicas and pipe.replica)")

    def _raise_first(self, problem: Exception | None) -> None:
        """Raise the problem of the first worker that has one, on every worker."""
        for rank, description in enumerate(self.all_gather_object(problem and Description.of(problem))):
            if description is not None:
                raise problem if rank == self.rank else description.error(rank)

    # -- failure ----------------------------------------------------------------------------------------------------

    def interrupted(self) -> Exception | None:
        """The failure of another worker, if one has been recorded."""
        if self._group is None or self._name is None:
            return None
        try:
            return self._recorded() if self._store.check([f"{self._name}/failure"]) else None
        except Exception:           # the store is gone: the wait itself will tell
            return None

    def _recorded(self) -> WorkerError:
        record = json.loads(self._store.get(f"{self._name}/failure"))
        return WorkerError(f"worker {record['rank']} failed {record['where']}: {record['error']}\n"
                           f"--- traceback of worker {record['rank']} ---\n{record['traceback']}")

    def fail(self, error: BaseException, where: str) -> BaseException:
        """Record ``error`` unless another worker was first, and return what this worker is to raise."""
        told = Description.of(error)
        record = {"rank": self.rank, "where": where, "error": f"{told.kind}: {told.text}", "traceback": told.traceback}
        secondary = isinstance(error, ConnectionLost)
        try:
            if secondary:
                # A closed connection is a consequence: leave the first word to the worker that failed.
                for _ in range(20):
                    if self._store.check([f"{self._name}/failure"]):
                        return self._recorded()
                    sleep(0.05)
            if self._store.add(f"{self._name}/failures", 1) == 1:
                self._store.set(f"{self._name}/failure", json.dumps(record))
                return self._own_failure(error, where, secondary)
            return error if isinstance(error, (KeyboardInterrupt, SystemExit)) else self._recorded()
        except Exception:           # no store any more: its host is gone
            return self._own_failure(error, where, secondary)

    def _own_failure(self, error: BaseException, where: str, secondary: bool) -> BaseException:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            return error
        if secondary:
            return WorkerError(
                f"worker {self.rank} lost its connection {where}; another worker has died or been stopped: {error}"
            )
        return WorkerError(f"worker {self.rank} failed {where}: {type(error).__name__}: {error}")

    def close(self) -> None:
        """Give up the control group. Dropping the last reference closes the connections."""
        self.waiter.close()
        group, self._group = self._group, None
        if group is not None:
            give_up(group)


def connect(mesh: dist.DeviceMesh | None, device: torch.device, launched: bool, num_replicas: int | None = None,
            timeout: timedelta = timedelta(minutes=10)) -> Workers:
    """The workers of this job: those of ``mesh``, of the default process group, or this process alone.

    Where processes were ``launched`` (by torchrun) without a process group, one is started. Raises ``InputError`` where
    they do not make ``num_replicas`` pipelines.
    """
    if mesh is None and launched and not dist.is_initialized():
        dist.init_process_group("gloo" if device.type == "cpu" else None, timeout=timeout)
    if mesh is not None:
        ranks, count = ranks_of_mesh(mesh, num_replicas)
    else:
        ranks, count = ranks_of_world(dist.get_world_size() if dist.is_initialized() else 1, num_replicas)
    return ProcessGroupWorkers(ranks, timeout, _backend(device), count) if len(ranks) > 1 else SingleProcess()


def _backend(device: torch.device) -> str:
    """What carries tensors on ``device``."""
    return "gloo" if device.type == "cpu" else dist.get_default_backend_for_device(device)
