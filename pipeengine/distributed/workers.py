"""The workers of one pipeline: who they are, what they agree on, and how one failure becomes everybody's.

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
from pipeengine.distributed.board import Board, LocalBoard, StoreBoard
from pipeengine.distributed.codec import decode_or_raise, encode_or_tell
from pipeengine.distributed.failure import ConnectionLost, Description, start
from pipeengine.distributed.guard import Guard, GuardSettings, Told
from pipeengine.distributed.local import LocalTransport, Transport
from pipeengine.distributed.rendezvous import start_group
from pipeengine.distributed.tied_parameters import NoTies, Tie, TiedParameters
from pipeengine.distributed.transport import DistributedTransport
from pipeengine.distributed.waiting import Waiter, give_up, new_group
from pipeengine.distributed.wishes import Wishes
from pipeengine.errors import InputError, PipeEngineError, WorkerError
from pipeengine.torch_private import default_store

_SLOTS = 8
_VERDICT_SECONDS = 2.0      # until the guard has said who is to blame
T = TypeVar("T")


class Workers(Protocol):
    """The workers of one pipeline, seen from worker ``rank`` of ``size``. Every method but ``publish`` and
    ``published`` is called by all of them."""

    rank: int
    size: int
    backend: str | None
    activity: Unwatched
    wishes: Wishes
    board: Board

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
        self.activity = Unwatched()
        self._published: dict[int, str] = {}
        self.wishes, self.board = Wishes(), LocalBoard()

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

    def __init__(self, ranks: Sequence[int], timeout: timedelta, backend: str = "gloo",
                 settings: GuardSettings | None = None):
        self.ranks, self.backend = tuple(ranks), backend
        self.rank, self.size = self.ranks.index(dist.get_rank()), len(self.ranks)
        self.timeout = timeout
        self.wishes = Wishes()
        self._group: dist.ProcessGroup | None = None
        self._store = self._own_store()
        self.board = StoreBoard(dist.PrefixStore("board", self._store))
        self._guard = Guard(self.rank, self.size, settings or GuardSettings())
        self.activity = self._guard.activity
        self.waiter = Waiter(self._guard.interrupted, waits=self._guard.activity.wait)
        try:
            with self.activity.section("construction", takes_long=True):
                self._guard.connect(self._store, self.waiter.run)
                self._group = new_group(ranks, "gloo", timeout, self.waiter)
        except BaseException as error:
            failure = self.fail(error, "while connecting")
            self.close()
            raise failure from None

    def _own_store(self) -> dist.Store:
        """A part of the default store for these workers alone: every one of them counts the pipelines it has made."""
        name = "pipeengine/" + "-".join(map(str, self.ranks))
        number = default_store().add(f"{name}/made/{self.rank}", 1)
        return dist.PrefixStore(f"{name}/{number}", default_store())

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
        mine = torch.zeros(_SLOTS, dtype=torch.int64)
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

    def agree(self, facts: Sequence[int], problem: PipeEngineError | None, names: Sequence[str]) -> None:
        """One small gather: the same ``facts`` everywhere, and nobody has a ``problem``; else the same error
        everywhere."""
        mine = self._record(problem is not None, *facts)
        mine[-1] = self.wishes.own()
        found = self._exchange(mine)
        for other in found:
            self.wishes.hear(int(other[-1]))
            other[-1] = mine[-1]        # what a worker asks for is no disagreement
        if all(torch.equal(other, mine) for other in found) and problem is None:
            return
        rows = [other.tolist()[1:] for other in found]
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
        if verdict is None or verdict.rank == self.rank and verdict.kind == "failed":
            return self._own_failure(error, where, lost)
        return WorkerError(verdict.text())

    def _own_failure(self, error: BaseException, where: str, secondary: bool) -> BaseException:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            return error
        if secondary:
            return WorkerError(
                f"worker {self.rank} lost its connection {where}; another worker has died or been stopped: {error}"
            )
        return WorkerError(f"worker {self.rank} failed {where}: {type(error).__name__}: {error}")

    def close(self) -> None:
        """Give up the control group and the guard. Dropping the last reference closes the connections."""
        self.waiter.close()
        group, self._group = self._group, None
        if group is not None:
            give_up(group)
        self._guard.close()


def connect(mesh: object, device: torch.device, launched: bool, timeout: timedelta = timedelta(minutes=10),
            environment: Mapping[str, str] | None = None) -> Workers:
    """The workers of this job: the ``pp`` dimension of ``mesh``, the default process group, or this process alone.

    Where processes were ``launched`` (by torchrun) without a process group, one is started, as ``environment`` says.
    """
    environment = environment or {}
    settings = GuardSettings.of(environment)
    if mesh is not None:
        group = mesh.get_group("pp") if "pp" in (mesh.mesh_dim_names or ()) else mesh.get_group()
        ranks = dist.get_process_group_ranks(group)
        return ProcessGroupWorkers(ranks, timeout, _backend(device), settings) if len(ranks) > 1 else SingleProcess()
    if not dist.is_initialized():
        if not launched:
            return SingleProcess()
        start_group(device, environment, timeout)
    if dist.get_world_size() == 1:
        return SingleProcess()
    return ProcessGroupWorkers(range(dist.get_world_size()), timeout, _backend(device), settings)


@cache
def _number(call: str) -> int:
    """A number that stands for a call, the same on every worker."""
    return int.from_bytes(hashlib.sha256(call.encode()).digest()[:7], "big")


def _backend(device: torch.device) -> str:
    """What carries tensors on ``device``."""
    return "gloo" if device.type == "cpu" else dist.get_default_backend_for_device(device)
