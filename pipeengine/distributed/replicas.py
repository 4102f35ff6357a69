"""Parameters that several workers hold, in other stages or in other replicas: one value, one gradient per step.

The sum of a gradient is taken in the order of the workers, ((g0 + g1) + g2) + ..., on whichever of them has that share:
each sends every other its share, adds up its own, and then either all get the sums, or with shards only the owner keeps
what it will update. So the sum is the same bits for any buckets, any backend, and with shards or without. What each
worker sends is 2 (n - 1) / n of the parameters' bytes, which is the least.
"""
from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
import torch.distributed as dist

from pipeengine.distributed.buckets import Bucket, Copies, make_buckets
from pipeengine.distributed.failure import start
from pipeengine.distributed.groups import GroupMaker
from pipeengine.distributed.tied_parameters import NoTies
from pipeengine.distributed.waiting import Waiter, give_up
from pipeengine.errors import WorkerError
from pipeengine.torch_private import version_of


@dataclass
class _Underway:
    """A bucket whose gradients travel: first everybody's shares, then the sums. Its buffers live as long."""

    bucket: Bucket
    begin: float
    work: dist.Work
    kept: torch.Tensor | None
    shares: torch.Tensor
    sums: torch.Tensor | None = None
    used: Sequence[bool] = ()


class ReplicatedParameters(NoTies):
    """Keeps the copies of parameters equal across replicas, and across stages where they are shared.

    ``tensors`` are this worker's, by name; ``copies`` say who else holds them. ``owner`` (with shards) says who updates
    each parameter; the others have no gradient after a step, and get the new values before the next. Gradients that
    earlier steps have accumulated are sums already and stay out of the next one.
    """

    def __init__(self, copies: Sequence[Copies], tensors: Mapping[str, torch.Tensor], worker: int,
                 ranks: Sequence[int], backend: str, groups: GroupMaker, waiter: Waiter,
                 owner: Mapping[str, int] | None = None):
        self._copies = tuple(one for one in copies if worker in one.workers)
        self._tensors = {one.name: tensors[one.name] for one in self._copies}
        self._worker, self._ranks, self._owner = worker, tuple(ranks), owner
        self._waiter = waiter
        # Two groups, since each must see its operations in one order, and sums may go before the next shares.
        self._groups = {workers: tuple(groups.make([ranks[w] for w in workers], backend, what)
                                       for what in ("shares", "sums"))
                        for workers in sorted({one.workers for one in copies}) if worker in workers}
        self._parameters = {one.name: parameter for one in self._copies
                            if isinstance(parameter := self._tensors[one.name], torch.nn.Parameter)}
        self._buckets: dict[tuple[bool, ...], tuple[Bucket, ...]] = {}
        self._before: dict[str, torch.Tensor | None] = {}
        self._underway: list[_Underway] = []
        self._versions: tuple[int, ...] | None = None
        self._exchanged: tuple[Bucket, ...] = ()        # of the last step: what it trained may be frozen since
        self.messages, self.bytes = 0, 0

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The buckets of those parameters of this worker that need a gradient now."""
        trained = tuple(parameter.requires_grad for parameter in self._parameters.values())
        if trained not in self._buckets:
            copies = [one for one in self._copies
                      if one.name in self._parameters and self._parameters[one.name].requires_grad]
            self._buckets[trained] = make_buckets(copies, self._parameters, self._owner)
        return self._buckets[trained]

    def _wait(self, work: dist.Work) -> None:
        try:
            self._waiter.wait(work)
        finally:
            del work

    def equalise(self) -> None:
        """Give every copy the value that the first holder in the first replica has."""
        for one in self._copies:
            with torch.no_grad():
                value = self._tensors[one.name].detach()
                sent = value if value.is_contiguous() else value.contiguous()
                self._wait(start(dist.broadcast, sent, self._ranks[one.workers[0]],
                                 group=self._groups[one.workers][0], async_op=True))
                if sent is not value:
                    value.copy_(sent)
        self._versions = self._own_versions()

    # -- gradients --------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Set aside what earlier steps have accumulated."""
        self._exchanged = self.buckets
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self._before[name], parameter.grad = parameter.grad, None

    def start(self, stage: int) -> None:
        """Begin to sum the gradients of ``stage`` (-1: those that several stages have part in); returns at once."""
        for bucket in self.buckets:
            if bucket.stage == stage:
                self._underway.append(self._send_shares(bucket))

    def reduce(self) -> None:
        """Sum what has not been started, and wait until ``.grad`` of all parameters is this step's sum and what was set
        aside."""
        spans = []
        started = {id(one.bucket) for one in self._underway}
        self._underway += [self._send_shares(bucket) for bucket in self.buckets if id(bucket) not in started]
        for one in self._underway:
            self._add_up(one)
        while self._underway:
            one = self._underway.pop(0)
            self._put_back(one)
            spans.append((one.bucket.stage, one.begin, perf_counter()))
        self.spans = spans
        for name, gradient in self._before.items():
            if self._parameters[name].grad is None and self._is_updated(name):
                self._parameters[name].grad = gradient
        self._before.clear()
        self._versions = None

    def _is_updated(self, name: str) -> bool:
        return self._owner is None or self._owner[name] == self._worker

    def _send_shares(self, bucket: Bucket) -> _Underway:
        """Each member's share of this worker's gradients on its way to that member, with who has used what."""
        members, count = len(bucket.workers), len(bucket.names)
        parameters = [self._parameters[name] for name in bucket.names]
        own = bucket.share(bucket.workers.index(self._worker))
        device = parameters[0].device
        sent = torch.zeros(bucket.cuts[-1] + members * count, dtype=bucket.dtype, device=device)
        used = torch.tensor([parameter.grad is not None for parameter in parameters]).to(sent)
        for member in range(members):
            sent[bucket.cuts[member + 1] + member * count:][:count] = used
        for number, parameter in enumerate(parameters):
            if parameter.grad is not None:
                gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
                flat, begin = gradient.detach().reshape(-1), bucket.starts[number]
                for member, low, high in bucket.pieces(number, len(flat)):
                    sent[low + member * count:high + member * count] = flat[low - begin:high - begin]
        received = torch.empty(members * (own + count), dtype=bucket.dtype, device=device)
        sizes = [bucket.share(member) + count for member in range(members)]
        work = start(dist.all_to_all_single, received, sent, [own + count] * members, sizes,
                     group=self._groups[bucket.workers][0], async_op=True)
        self._count(sent.numel() - own - count, sent)
        return _Underway(bucket, perf_counter(), work, sent, received.view(members, own + count))

    def _count(self, entries: int, of: torch.Tensor) -> None:
        self.messages += 1
        self.bytes += entries * of.element_size()

    def _add_up(self, one: _Underway) -> None:
        """This worker's share of the sums; without shards they go to everybody."""
        self._wait(one.work)
        count = len(one.bucket.names)
        own = one.shares.shape[1] - count
        one.used = one.shares[:, own:].ne(0).any(0).tolist()
        total = one.shares[0, :own].to(sum_dtype(one.bucket.dtype), copy=True)
        for more in one.shares[1:, :own]:
            total += more
        one.kept = total = total.to(one.bucket.dtype)
        one.sums = total
        if self._owner is None:
            one.sums = torch.empty(own * len(one.bucket.workers), dtype=total.dtype, device=total.device)
            one.work = start(dist.all_gather_into_tensor, one.sums, total,
                             group=self._groups[one.bucket.workers][1], async_op=True)
            self._count(own * (len(one.bucket.workers) - 1), total)

    def _put_back(self, one: _Underway) -> None:
        """The sums as gradients, added to what was set aside."""
        bucket = one.bucket
        if self._owner is None:
            self._wait(one.work)
        assert one.sums is not None, "added up before it is put back"
        first = 0 if self._owner is None else bucket.cuts[bucket.workers.index(self._worker)]
        for number, name in enumerate(bucket.names):
            parameter = self._parameters[name]
            if not (one.used[number] and self._is_updated(name)):
                parameter.grad = None
                continue
            begin = bucket.starts[number] - first
            gradient = one.sums[begin:begin + parameter.numel()].view(parameter.shape)
            before = self._before.pop(name, None)
            if before is not None:
                parameter.grad = before.add_(gradient)
            elif parameter.grad is None or parameter.grad.is_sparse:
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
            else:
                parameter.grad.copy_(gradient)

    def restore(self) -> None:
        """After a step that failed: gradients as they were before it."""
        self._underway.clear()
        for name, parameter in self._parameters.items():
            parameter.grad = self._before.get(name)
        self._before.clear()

    # -- new values -------------------------------------------------------------------------------------------------

    def is_stale(self) -> bool:
        """Whether this worker has changed a parameter that it updates for others since they last got its values."""
        return self._owner is not None and self._versions != self._own_versions()

    def _own_versions(self) -> tuple[int, ...]:
        return tuple(version_of(p) for name, p in self._parameters.items() if self._is_updated(name))

    def refresh(self) -> None:
        """Give everybody the values of the parameters that this worker updates, and take theirs."""
        if self._owner is None:
            return
        underway = [self._send_values(bucket) for bucket in self._exchanged or self.buckets]
        for bucket, work, values, _ in underway:
            self._wait(work)
            with torch.no_grad():
                for number, name in enumerate(bucket.names):
                    if not self._is_updated(name):
                        parameter, begin = self._parameters[name], bucket.starts[number]
                        parameter.copy_(values[begin:begin + parameter.numel()].view(parameter.shape))
        self._versions = self._own_versions()

    def _send_values(self, bucket: Bucket) -> tuple[Bucket, dist.Work, torch.Tensor, torch.Tensor]:
        own = [self._parameters[name].detach().reshape(-1) for name in bucket.names if self._is_updated(name)]
        values = torch.empty(bucket.cuts[-1], dtype=bucket.dtype, device=self._parameters[bucket.names[0]].device)
        mine = torch.cat(own) if own else values[:0]
        members = len(bucket.workers)
        sent = mine.repeat(members)
        work = start(dist.all_to_all_single, values, sent, [bucket.share(member) for member in range(members)],
                     [len(mine)] * members, group=self._groups[bucket.workers][1], async_op=True)
        self._count(len(mine) * (members - 1), mine)
        return bucket, work, values, sent

    # -- the end ----------------------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Raise ``WorkerError`` unless every copy of every parameter holds the same bits, told by SHA-256."""
        self.refresh()
        problem = ""                    # told at the end: others wait for this worker in every group
        for workers, (group, _) in self._groups.items():
            names = [one.name for one in self._copies if one.workers == workers and one.name in self._parameters]
            if not names:
                continue
            own = torch.tensor([_digest(self._parameters[name]) for name in names], dtype=torch.int64)
            own = own.to(self._parameters[names[0]].device)
            everybody = [torch.empty_like(own) for _ in workers]
            self._wait(start(dist.all_gather, everybody, own, group=group, async_op=True))
            for worker, theirs in zip(workers, everybody):
                for name, first, value in zip(names, everybody[0].tolist(), theirs.tolist()):
                    if first != value:
                        problem = problem or f"the copies of {name} on workers {workers[0]} and {worker} differ"
        if problem:
            raise WorkerError(f"{problem}; was one of them changed outside the optimizer, or is an optimizer's step "
                              "random?")

    def close(self) -> None:
        """Give the groups up."""
        self._before.clear()
        self._underway.clear()
        groups = list(itertools.chain.from_iterable(self._groups.values()))     # leaves no variable that holds one
        self._groups.clear()
        give_up(groups)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is added up in float32 and rounded once."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _digest(tensor: torch.Tensor) -> int:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 1
