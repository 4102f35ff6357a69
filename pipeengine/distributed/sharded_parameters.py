"""Parameters of which each replica holds some rows: whole during a step, in shards between steps.

torch's FSDP2 holds the shards and makes the parameters whole; here they are gathered and summed once per step, whatever
the number of micro-batches.
"""
from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from time import perf_counter

import torch
import torch.distributed as dist

from pipeengine.distributed.buckets import Copies
from pipeengine.distributed.failure import start
from pipeengine.distributed.groups import GroupMaker
from pipeengine.distributed.replicas import ReplicatedParameters, sum_dtype
from pipeengine.distributed.sharded_tensors import own_part, rows_of, shard_like
from pipeengine.distributed.sharding import Sharding, make_units, refuse_old_optimizers
from pipeengine.distributed.shells import Held, shard_units
from pipeengine.distributed.tied_parameters import NoTies
from pipeengine.distributed.waiting import Waiter, give_up


@dataclass
class _Underway:
    """A unit whose gradients travel to those that hold their rows; its buffers live as long."""

    held: Held
    numbers: list[int]
    begin: float
    work: dist.Work
    sent: torch.Tensor
    shares: torch.Tensor


class ShardedParameters(NoTies):
    """Holds rows of the parameters that ``sharding`` names; ``rest`` keeps the others equal.

    ``copies`` are those of this worker, with the same members: the workers at its place in all replicas, which have
    ``ranks``. Gradients are added up in the order of the replicas, as ``rest`` does it, and what is not this worker's
    is never sent to it.
    """

    def __init__(self, copies: Sequence[Copies], tensors: Mapping[str, torch.Tensor], sharding: Sharding,
                 rest: ReplicatedParameters, worker: int, ranks: Sequence[int], backend: str, groups: GroupMaker,
                 waiter: Waiter):
        self._rest, self._waiter = rest, waiter
        workers = copies[0].workers
        self._workers, self._size, self._me = workers, len(workers), workers.index(worker)
        self._members = members = [ranks[one] for one in workers]
        # FSDP2 has a group that carries nothing: it keeps hold of it, and an idle one can end at any time.
        self._groups = {what: groups.make(members, backend, what) for what in ("whole", "rows")}
        self._idle = groups.make(members, backend, "mesh")
        self._underway: list[_Underway] = []
        self._before: dict[str, torch.Tensor] = {}
        self._is_whole = False
        self._sent, self._sent_bytes, self._spans = 0, 0, list[tuple[int, float, float]]()
        self._equalise([tensors[one.name] for one in copies])
        self._replaced = [weakref.ref(tensors[one.name]) for one in copies]
        self._held = shard_units(make_units(copies, tensors), tensors, sharding, self._idle, self.all_gather)

    def _wait(self, work: dist.Work) -> None:
        try:
            self._waiter.wait(work)
        finally:
            del work

    def _equalise(self, tensors: Sequence[torch.Tensor]) -> None:
        """The values of the first replica everywhere."""
        for tensor in tensors:
            self._wait(start(dist.broadcast, tensor.detach(), self._members[0], group=self._groups["whole"],
                             async_op=True))

    @property
    def messages(self) -> int:          # type: ignore[override]
        """Messages that this worker has sent."""
        return self._rest.messages + self._sent

    @property
    def bytes(self) -> int:             # type: ignore[override]
        """Bytes that this worker has sent."""
        return self._rest.bytes + self._sent_bytes

    def _count(self, entries: int, of: torch.Tensor) -> None:
        self._sent += 1
        self._sent_bytes += entries * of.element_size()

    # -- whole and in shards ----------------------------------------------------------------------------------------

    def all_gather(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        """Every member's ``part`` in ``whole``."""
        self._wait(start(dist.all_gather_into_tensor, whole, part, group=self._groups["whole"], async_op=True))
        self._count(part.numel() * (self._size - 1), part)

    def gather(self) -> None:
        """Make the parameters whole."""
        self._is_whole = True
        for held in self._held:
            held.shell.unshard()
            for number, parameter in enumerate(held.parameters):
                held.now(number).requires_grad_(parameter.requires_grad)

    def release(self) -> None:
        """Leave this worker its rows alone."""
        self._is_whole = False
        for held in self._held:
            held.shell.reshard()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, tensors without memory of the whole shape stand for the shards. The first time raises ``InputError``
        where an optimizer holds what was there before."""
        refuse_old_optimizers(self._replaced)
        self._replaced.clear()
        for held in self._held:
            for parameter, whole in zip(held.parameters, held.whole):
                whole.requires_grad_(parameter.requires_grad)
            held.put(held.whole)
        try:
            yield
        finally:
            for held in self._held:
                held.put(held.parameters)

    # -- gradients --------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Set aside what earlier steps have accumulated, and make the parameters whole."""
        self._rest.begin()
        for held in self._held:
            for name, parameter in zip(held.unit.names, held.parameters):
                if parameter.grad is not None:
                    self._before[name], parameter.grad = parameter.grad, None
        self.gather()

    def start(self, stage: int) -> None:
        """Begin to sum the gradients of ``stage``; returns at once."""
        self._rest.start(stage)
        for held in self._held:
            if held.unit.stage == stage:
                self._send(held)

    def reduce(self) -> None:
        """Sum what has not been started, and wait until ``.grad`` of all shards is their rows of this step's sum and
        what was set aside."""
        self._rest.reduce()
        self._spans = list(self._rest.spans)
        started = {id(one.held) for one in self._underway}
        for held in self._held:
            if id(held) not in started:
                self._send(held)
        self.release()
        while self._underway:
            one = self._underway.pop(0)
            self._wait(one.work)
            self._add_up(one)
            self._spans.append((one.held.unit.stage, one.begin, perf_counter()))
        for held in self._held:
            for name, parameter in zip(held.unit.names, held.parameters):
                if name in self._before:
                    parameter.grad = self._before.pop(name)

    @property
    def spans(self) -> Sequence[tuple[int, float, float]]:      # type: ignore[override]
        """Stage, start and end of each sum of the last step."""
        return self._spans

    def _send(self, held: Held) -> None:
        """The rows of each member on their way to it, with who has used what."""
        numbers = [number for number, parameter in enumerate(held.parameters) if parameter.requires_grad]
        if not numbers:
            return
        gradients = [held.now(number).grad for number in numbers]
        dtype = held.now(numbers[0]).dtype
        flags = torch.tensor([gradient is not None for gradient in gradients])
        pieces, sizes = [], []
        for member in range(self._size):
            rows = [self._rows(held.parameters[number], gradient, member, dtype)
                    for number, gradient in zip(numbers, gradients)]
            pieces += [*rows, flags.to(rows[0])]
            sizes.append(sum(len(one) for one in rows) + len(numbers))
        sent = torch.cat(pieces)
        del pieces, gradients
        for number in numbers:
            held.now(number).grad = None
        shares = sent.new_empty(self._size * sizes[self._me])
        begin = perf_counter()
        work = start(dist.all_to_all_single, shares, sent, [sizes[self._me]] * self._size, sizes,
                     group=self._groups["rows"], async_op=True)
        self._count(len(sent) - sizes[self._me], sent)
        self._underway.append(_Underway(held, numbers, begin, work, sent, shares.view(self._size, -1)))

    def _rows(self, parameter: torch.Tensor, gradient: torch.Tensor | None, member: int,
              dtype: torch.dtype) -> torch.Tensor:
        low, high = rows_of(parameter.shape[0], self._size, member)
        if gradient is None:
            return torch.zeros((high - low) * prod(parameter.shape[1:]), dtype=dtype, device=parameter.device)
        whole = gradient.to_dense() if gradient.is_sparse else gradient
        return whole.detach()[low:high].reshape(-1).to(dtype)

    def _add_up(self, one: _Underway) -> None:
        """This worker's rows of the sums as gradients of its shards, added to what was set aside."""
        count = len(one.numbers)
        own = one.shares.shape[1] - count
        used = one.shares[:, own:].ne(0).any(0).tolist()
        total = one.shares[0, :own].to(sum_dtype(one.shares.dtype), copy=True)
        for more in one.shares[1:, :own]:
            total += more
        position = 0
        for number, is_used in zip(one.numbers, used):
            parameter, name = one.held.parameters[number], one.held.unit.names[number]
            part = own_part(parameter.detach())
            values = total[position:position + part.numel()].view(part.shape).to(part.dtype)
            position += part.numel()
            before = self._before.pop(name, None)
            if before is not None and is_used:
                own_part(before).add_(values)
            parameter.grad = before if before is not None or not is_used else shard_like(values, parameter)

    def restore(self) -> None:
        """After a step that failed: shards, with gradients as they were before it."""
        self._rest.restore()
        self._underway.clear()
        if self._is_whole:
            for held in self._held:
                for number, parameter in enumerate(held.parameters):
                    if held.now(number) is not parameter:
                        held.now(number).grad = None
            self.release()
        for held in self._held:
            for name, parameter in zip(held.unit.names, held.parameters):
                parameter.grad = self._before.pop(name, parameter.grad)

    # -- what is around steps ---------------------------------------------------------------------------------------

    def collect(self, tensor: torch.Tensor, owner: int) -> torch.Tensor | None:
        """A sharded ``tensor`` whole on the worker ``owner``, None on the others; every member calls it alike."""
        part = own_part(tensor.detach())
        most = rows_of(tensor.shape[0], self._size, 0)[1]
        padded = part.new_zeros((most, *tensor.shape[1:]))
        padded[:len(part)] = part
        parts = [torch.empty_like(padded) for _ in self._workers] if self._workers[self._me] == owner else None
        self._wait(start(dist.gather, padded, parts, self._members[self._workers.index(owner)],
                         group=self._groups["whole"], async_op=True))
        return None if parts is None else torch.cat(parts)[:tensor.shape[0]]

    def is_stale(self) -> bool:
        """Whether one of the parameters that stay whole waits for new values."""
        return self._rest.is_stale()

    def refresh(self) -> None:
        """Fetch those."""
        self._rest.refresh()

    def verify(self) -> None:
        """Raise ``WorkerError`` unless the copies of what stays whole are equal; of shards there is one of each."""
        self._rest.verify()

    def close(self) -> None:
        """Give the groups up; the shards stay."""
        self._rest.close()
        self._underway.clear()
        self._before.clear()
        groups = list(self._groups.values())
        self._groups.clear()
        give_up(groups)
