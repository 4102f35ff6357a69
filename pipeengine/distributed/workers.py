"""The workers of one pipeline: who they are, what they agree on, and how one failure becomes everybody's.

Three things travel here besides the data: one small gather before a step (do all workers have the same batch, and can all
of them run it?), the loss after it, and, when something breaks, its cause.
"""
from __future__ import annotations

import json
import pickle
import traceback
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from pipeengine import errors
from pipeengine.distributed.waiting import Waiter, give_up
from pipeengine.errors import InputError, PipeEngineError, WorkerError
from pipeengine.torch_private import default_store

_SLOTS = 8


class SingleProcess:
    """One process that runs every stage."""

    rank, size = 0, 1
    ranks: tuple[int, ...] = (0,)

    def run_synchronized(self, what: Callable[[], object]) -> object:
        return what()

    def agree(self, facts: Sequence[int], problem: PipeEngineError | None, names: Sequence[str]) -> None:
        if problem is not None:
            raise problem

    def broadcast_object(self, value: object, source: int = 0) -> object:
        return value

    def all_gather_object(self, value: object) -> list:
        return [value]

    def broadcast(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        return tensor

    def all_reduce(self, tensor: torch.Tensor, largest: bool = False) -> torch.Tensor:
        return tensor

    def fail(self, error: BaseException, where: str) -> BaseException:
        return error

    def interrupted(self) -> Exception | None:
        return None

    def publish(self, text: str) -> None:
        self._published = text

    def published(self) -> dict[int, str]:
        return {0: self._published} if hasattr(self, "_published") else {}

    def close(self) -> None:
        pass


class ProcessGroupWorkers:
    """The processes of a pipeline, on a control group of their own."""

    def __init__(self, ranks: Sequence[int], timeout: timedelta):
        self.ranks = tuple(ranks)
        self.rank, self.size = self.ranks.index(dist.get_rank()), len(self.ranks)
        self.timeout = timeout
        self.waiter = Waiter(self.interrupted)
        self._group: dist.ProcessGroup | None = dist.new_group(list(ranks), backend="gloo", timeout=timeout)
        self._store = dist.PrefixStore("pipeengine", default_store())
        self._name = self.broadcast_object(uuid.uuid4().hex)
        self._problems = 0

    # -- collectives ------------------------------------------------------------------------------------------------

    def _wait(self, work: dist.Work) -> None:
        try:
            self.waiter.wait(work)
        finally:
            del work

    def all_gather_object(self, value: object) -> list:
        """Every worker's ``value``, in order of rank."""
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in self.ranks]
        self._wait(dist.all_gather(sizes, torch.tensor([data.numel()]), group=self._group, async_op=True))
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[:data.numel()] = data
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in self.ranks]
        self._wait(dist.all_gather(parts, padded, group=self._group, async_op=True))
        return [pickle.loads(bytes(part[:int(size)].tolist())) if int(size) < 1 << 12 else
                pickle.loads(part[:int(size)].numpy().tobytes()) for part, size in zip(parts, sizes)]

    def broadcast_object(self, value: object, source: int = 0) -> object:
        """``source``'s ``value`` on every worker."""
        data = torch.frombuffer(bytearray(pickle.dumps(value if self.rank == source else None)), dtype=torch.uint8)
        size = torch.tensor([data.numel()])
        self._wait(dist.broadcast(size, self.ranks[source], group=self._group, async_op=True))
        if self.rank != source:
            data = torch.empty(int(size), dtype=torch.uint8)
        self._wait(dist.broadcast(data, self.ranks[source], group=self._group, async_op=True))
        return value if self.rank == source else pickle.loads(data.numpy().tobytes())

    def broadcast(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """A small tensor of ``source`` on every worker; all pass one of the same shape and dtype."""
        moved = tensor.detach().cpu().contiguous()
        self._wait(dist.broadcast(moved, self.ranks[source], group=self._group, async_op=True))
        return moved.to(tensor.device)

    def all_reduce(self, tensor: torch.Tensor, largest: bool = False) -> torch.Tensor:
        """Sum (or maximum) over all workers."""
        moved = tensor.detach().cpu()
        work = dist.all_reduce(moved, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=self._group, async_op=True)
        self._wait(work)
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

    def run_synchronized(self, what: Callable[[], object]) -> object:
        """Do something that needs no other worker, on all of them; if it fails on one, raise its error on all."""
        try:
            result, problem = what(), None
        except Exception as error:
            result, problem = None, error
        found = self.all_gather_object(None if problem is None else _describe(problem))
        for rank, description in enumerate(found):
            if description is not None:
                raise _error(description, rank, self.rank, problem)
        return result

    def agree(self, facts: Sequence[int], problem: PipeEngineError | None, names: Sequence[str]) -> None:
        """One small gather: the same ``facts`` everywhere, and nobody has a ``problem``; else the same error everywhere."""
        mine = torch.zeros(_SLOTS, dtype=torch.int64)
        mine[0] = problem is not None
        mine[1:1 + len(facts)] = torch.tensor([fact & (1 << 63) - 1 for fact in facts])
        found = [torch.empty_like(mine) for _ in self.ranks]
        self._wait(dist.all_gather(found, mine, group=self._group, async_op=True))
        if all(torch.equal(other, mine) for other in found) and problem is None:
            return
        rows = [other.tolist() for other in found]
        if any(row[0] for row in rows):
            for rank, description in enumerate(self.all_gather_object(None if problem is None else _describe(problem))):
                if description is not None:
                    raise _error(description, rank, self.rank, problem)
        for number, name in enumerate(names, 1):
            values = [row[number] for row in rows]
            if len(set(values)) > 1:
                other = next(r for r, value in enumerate(values) if value != values[0])
                raise InputError(f"workers disagree on {name}: worker 0 has {values[0]}, worker {other} has {values[other]}; "
                                 "every worker must make the same calls with the same batch")

    # -- failure ----------------------------------------------------------------------------------------------------

    def interrupted(self) -> Exception | None:
        """The failure of another worker, if one has been recorded."""
        if not self._group or not hasattr(self, "_name"):
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
        record = {"rank": self.rank, "where": where, "error": f"{type(error).__name__}: {error}",
                  "traceback": "".join(traceback.format_exception(error))}
        secondary = isinstance(error, (RuntimeError, dist.DistError)) and _is_connection(error)
        try:
            if secondary:
                # A closed connection is a consequence: leave the first word to the worker that failed.
                for _ in range(20):
                    if self._store.check([f"{self._name}/failure"]):
                        return self._recorded()
                    _pause()
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
            return WorkerError(f"worker {self.rank} lost its connection {where}; another worker has died or been stopped: {error}")
        return WorkerError(f"worker {self.rank} failed {where}: {type(error).__name__}: {error}")

    def close(self) -> None:
        self.waiter.close()
        group, self._group = self._group, None
        if group is not None:
            give_up(group)


def _pause() -> None:
    import time
    time.sleep(0.05)


def _is_connection(error: BaseException) -> bool:
    text = str(error)
    return any(sign in text for sign in ("Connection closed", "Connection reset", "onnection refused", "Broken pipe", "gloo",
                                         "NCCL", "Timed out"))


def _describe(error: Exception) -> tuple[str, str, str]:
    return type(error).__name__, str(error), "".join(traceback.format_exception(error))


def _error(description: tuple[str, str, str], rank: int, own: int, problem: Exception | None) -> Exception:
    """What every worker raises for the problem of one."""
    if rank == own and problem is not None:
        return problem
    kind, text, trace = description
    known = getattr(errors, kind, None)
    if known is not None:
        return known(f"{text} (on worker {rank})")
    return WorkerError(f"worker {rank} failed: {kind}: {text}\n--- traceback of worker {rank} ---\n{trace}")


def connect(mesh: object, device: torch.device, launched: bool, timeout: timedelta = timedelta(minutes=10)) -> SingleProcess | ProcessGroupWorkers:
    """The workers of this job: the ``pp`` dimension of ``mesh``, the default process group, or this process alone.

    Where processes were ``launched`` (by torchrun) without a process group, one is started.
    """
    if mesh is not None:
        group = mesh.get_group("pp") if "pp" in (mesh.mesh_dim_names or ()) else mesh.get_group()
        ranks = dist.get_process_group_ranks(group)
        return ProcessGroupWorkers(ranks, timeout) if len(ranks) > 1 else SingleProcess()
    if not dist.is_initialized():
        if not launched:
            return SingleProcess()
        dist.init_process_group("gloo" if device.type == "cpu" else None, timeout=timeout)
    if dist.get_world_size() == 1:
        return SingleProcess()
    return ProcessGroupWorkers(range(dist.get_world_size()), timeout)
