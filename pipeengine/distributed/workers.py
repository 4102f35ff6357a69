"""The workers of one pipeline: who they are, what they agree on, and how one failure becomes everybody's.

Three things travel here besides the data: one small gather before a step (do all workers have the same batch, and can
all of them run it?), the loss after it, and, when something breaks, its cause.
"""
from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from time import sleep
from typing import Protocol, TypeVar, cast

import torch
import torch.distributed as dist

from pipeengine.distributed.codec import decode_or_raise, encode_or_tell
from pipeengine.distributed.failure import ConnectionLost, Description, start
from pipeengine.distributed.local import LocalTransport, Transport
from pipeengine.distributed.tied_parameters import NoTies, Tie, TiedParameters
from pipeengine.distributed.transport import DistributedTransport
from pipeengine.distributed.waiting import Waiter, give_up
from pipeengine.distributed.wishes import Wishes
from pipeengine.errors import InputError, PipeEngineError, WorkerError
from pipeengine.torch_private import default_store

_SLOTS = 8
T = TypeVar("T")


class Workers(Protocol):
    """The workers of one pipeline, seen from worker ``rank`` of ``size``. Every method but ``publish`` and
    ``published`` is called by all of them."""

    rank: int
    size: int
    backend: str | None
    wishes: Wishes

    def run_synchronized(self, what: Callable[[], T]) -> T:
        """Do something that needs no other worker, on all of them; if it fails on one, raise its error on all."""

    def agree(self, facts: Sequence[int], problem: PipeEngineError | None, names: Sequence[str]) -> None:
        """The same ``facts`` everywhere, and nobody has a ``problem``; else the same error everywhere."""

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
    backend = None

    def __init__(self) -> None:
        self._published: dict[int, str] = {}
        self.wishes = Wishes()

    def run_synchronized(self, what: Callable[[], T]) -> T:
        """Do it."""
        return what()

    def agree(self, facts: Sequence[int], problem: PipeEngineError | None, names: Sequence[str]) -> None:
        """Raise the ``problem``, if there is one."""
        self.wishes.hear(self.wishes.own())
        if problem is not None:
            raise problem

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
    """The processes of a pipeline, on a control group of their own."""

    def __init__(self, ranks: Sequence[int], timeout: timedelta, backend: str = "gloo"):
        self.ranks, self.backend = tuple(ranks), backend
        self.rank, self.size = self.ranks.index(dist.get_rank()), len(self.ranks)
        self.timeout = timeout
        self.waiter = Waiter(self.interrupted)
        self.wishes = Wishes()
        self._name: str | None = None
        self._group: dist.ProcessGroup | None = dist.new_group(list(ranks), backend="gloo", timeout=timeout)
        self._store = dist.PrefixStore("pipeengine", default_store())
        self._name = self.broadcast_object(uuid.uuid4().hex)

    def connect_stages(self, worker_of: Sequence[int], device: torch.device) -> Transport:
        """A transport with groups of its own; every worker calls it."""
        return DistributedTransport(worker_of, self.rank, self.ranks, device, self.backend, self.timeout, self.waiter)

    def tie(self, ties: Sequence[Tie], tensors: Mapping[str, torch.Tensor], device: torch.device) -> TiedParameters:
        """The copies of shared tensors, on groups of their own, equal from the start; every worker calls it."""
        tied = TiedParameters(ties, {tie.name: tensors[tie.name] for tie in ties if self.rank in tie.workers},
                              self.rank, self.ranks, self.backend, self.timeout, self.waiter)
        tied.equalise()
        return tied

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

    def agree(self, facts: Sequence[int], problem: PipeEngineError | None, names: Sequence[str]) -> None:
        """One small gather: the same ``facts`` everywhere, and nobody has a ``problem``; else the same error
        everywhere."""
        mine = torch.zeros(_SLOTS, dtype=torch.int64)
        mine[0] = problem is not None
        mine[1:1 + len(facts)] = torch.tensor([fact & (1 << 63) - 1 for fact in facts])
        mine[-1] = self.wishes.own()
        found = [torch.empty_like(mine) for _ in self.ranks]
        self._wait(start(dist.all_gather, found, mine, group=self._group, async_op=True))
        for other in found:
            self.wishes.hear(int(other[-1]))
            other[-1] = mine[-1]        # what a worker asks for is no disagreement
        if all(torch.equal(other, mine) for other in found) and problem is None:
            return
        rows = [other.tolist() for other in found]
        if any(row[0] for row in rows):
            self._raise_first(problem)
        for number, name in enumerate(names, 1):
            values = [row[number] for row in rows]
            if len(set(values)) > 1:
                other = next(r for r, value in enumerate(values) if value != values[0])
                raise InputError(f"workers disagree on {name}: worker 0 has {values[0]}, worker {other} has "
                                 f"{values[other]}; every worker must make the same calls with the same batch "
                                 "(a DistributedSampler, or a loader that accelerate has prepared, gives each worker "
                                 "another part of it, and so does a shuffle without a common seed)")

    def _raise_first(self, problem: Exception | None) -> None:
        """Raise the problem of the first worker that has one, on every worker."""
        for rank, description in enumerate(self.all_gather_object(problem and Description.of(problem))):
            if description is not None:
                raise problem if rank == self.rank else Description(*description).error(rank)

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


def connect(mesh: object, device: torch.device, launched: bool, timeout: timedelta = timedelta(minutes=10)) -> Workers:
    """The workers of this job: the ``pp`` dimension of ``mesh``, the default process group, or this process alone.

    Where processes were ``launched`` (by torchrun) without a process group, one is started.
    """
    if mesh is not None:
        group = mesh.get_group("pp") if "pp" in (mesh.mesh_dim_names or ()) else mesh.get_group()
        ranks = dist.get_process_group_ranks(group)
        return ProcessGroupWorkers(ranks, timeout, _backend(device)) if len(ranks) > 1 else SingleProcess()
    if not dist.is_initialized():
        if not launched:
            return SingleProcess()
        dist.init_process_group("gloo" if device.type == "cpu" else None, timeout=timeout)
    if dist.get_world_size() == 1:
        return SingleProcess()
    return ProcessGroupWorkers(range(dist.get_world_size()), timeout, _backend(device))


def _backend(device: torch.device) -> str:
    """What carries tensors on ``device``."""
    return "gloo" if device.type == "cpu" else dist.get_default_backend_for_device(device)
