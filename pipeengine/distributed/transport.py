"""Carry values between workers over torch.distributed."""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice

import torch
import torch.distributed as dist

from pipeengine.distributed.failure import start
from pipeengine.distributed.groups import GroupMaker
from pipeengine.distributed.local import LocalTransport, Receipts
from pipeengine.distributed.waiting import Waiter, give_up
from pipeengine.errors import WorkerError
from pipeengine.program import UNDERWAY, Message
from pipeengine.stages import ACTIVATION, Layout, allocate, check_header, has_arrived, header, pack, unpack


class DistributedTransport:
    """Point-to-point messages between the workers that hold two stages.

    On gloo each message has a tag and a header that is checked. On backends without tags (NCCL) every ordered pair of
    workers has a group of its own, and the order of messages, which the program proves equal on both sides, says what
    each one is.
    """

    def __init__(self, worker_of: Sequence[int], rank: int, ranks: Sequence[int], device: torch.device, backend: str,
                 groups: GroupMaker, waiter: Waiter):
        self._worker_of, self._rank, self._ranks = tuple(worker_of), rank, tuple(ranks)
        self._device, self._tagged, self._waiter = device, backend == "gloo", waiter
        self._groups: dict[tuple[int, int], dist.ProcessGroup] = {}
        if self._tagged:
            group = groups.make(ranks, backend, "messages")
            self._groups = {(a, b): group for a in range(len(ranks)) for b in range(len(ranks))}
        else:
            for a in range(len(ranks)):
                for b in range(len(ranks)):
                    if a != b and rank in (a, b):
                        self._groups[a, b] = groups.make([ranks[a], ranks[b]], backend, "messages")
        self._place = {pair: tuple(dist.get_group_rank(group, self._ranks[end]) for end in pair)
                       for pair, group in self._groups.items()}
        self._local = LocalTransport()
        self._posted: dict[tuple, tuple[torch.Tensor, dist.Work]] = {}
        self._sent: dict[Message, tuple[dist.Work, torch.Tensor]] = {}
        self._step, self._digest = 0, 0
        self._receipts: Receipts = {}
        self.messages, self.bytes = 0, 0

    def begin(self, step: int, digest: int, receipts: Receipts) -> None:
        """A new step: everything sent from now on belongs to it. ``receipts``: what each message to come proves."""
        self._step, self._digest, self._receipts = step, digest, receipts

    def _ends(self, kind: int, source: int, target: int) -> tuple[int, int]:
        ends = self._worker_of[source], self._worker_of[target]
        return ends if kind == ACTIVATION else ends[::-1]

    def _tag(self, kind: int, source: int, target: int, microbatch: int) -> int:
        stages = len(self._worker_of)
        return ((self._step % 2 * 2 + kind) * stages * stages + source * stages + target) * 65536 + microbatch % 65536

    def irecv(self, kind: int, source: int, target: int, microbatch: int, layout: Layout) -> None:
        """Make room for a message, so that it can arrive while this worker computes."""
        ends = self._ends(kind, source, target)
        if ends[0] == ends[1]:
            return
        buffer = allocate(layout, self._device)
        tag = self._tag(kind, source, target, microbatch) if self._tagged else 0
        self._posted[kind, source, target, microbatch] = (
            buffer,
            start(self._groups[ends].recv, [buffer], self._place[ends][0], tag),
        )

    def send(self, kind: int, source: int, target: int, microbatch: int, tensors: list, layout: Layout) -> None:
        """Start sending; the buffer lives until the receiver has it.

        Gloo does not say which sends are done. What the receiver sends later does (``recv``); without that the oldest
        are waited for, two at a time, which takes two changes of threads. That is safe: programs complete even when
        every send waits for its receiver.
        """
        ends = self._ends(kind, source, target)
        if ends[0] == ends[1]:
            self._local.send(kind, source, target, microbatch, tensors, layout)
            return
        head = (
            header(self._step, microbatch, kind, source, target, layout.bytes, self._digest) if self._tagged else None
        )
        buffer = pack(tensors, layout, head, self._device)
        tag = self._tag(kind, source, target, microbatch) if self._tagged else 0
        if len(self._sent) >= UNDERWAY:
            self._forget(2)
        self._sent[kind, source, target, microbatch] = (
            start(self._groups[ends].send, [buffer], self._place[ends][1], tag),
            buffer,
        )
        self.messages += 1
        self.bytes += layout.payload_bytes

    def _forget(self, count: int) -> None:
        """Wait until the oldest ``count`` messages have been received."""
        oldest = list(islice(self._sent, count))
        work = [self._sent[key][0] for key in oldest]
        try:
            self._waiter.wait(*work)
        finally:
            del work
        for key in oldest:
            del self._sent[key]

    def recv(self, kind: int, source: int, target: int, microbatch: int, layout: Layout) -> list[torch.Tensor]:
        """The values of a message, with the shapes and in the order of ``layout``; waits until it is here."""
        sender, receiver = self._ends(kind, source, target)
        if sender == receiver:
            return self._local.recv(kind, source, target, microbatch, layout)
        key = (kind, source, target, microbatch)
        if key not in self._posted:
            self.irecv(*key, layout)
        buffer, work = self._posted.pop(key)
        if self._tagged and not has_arrived(buffer):
            self._waiter.wait(work)
        else:
            start(work.wait)        # NCCL: this thread's stream waits, and so not on the helper thread
        for arrived in self._receipts.get(key, ()):
            self._sent.pop(arrived, None)
        orders = None
        if self._tagged:
            head = header(self._step, microbatch, kind, source, target, layout.bytes, self._digest)
            orders = check_header(buffer, layout, head)
        return unpack(buffer, layout, orders)

    def own_memory(self) -> AbstractContextManager[None]:
        """Messages have that already; what one worker's stages hand on is its own."""
        return nullcontext()

    def finish(self) -> None:
        """Wait until everything sent has been received."""
        if self._sent:
            self._forget(len(self._sent))
        if self._posted:
            raise WorkerError(f"{len(self._posted)} posted messages were never asked for: {list(self._posted)[:3]}")

    def close(self) -> None:
        """Give the groups up. Dropping the last reference closes the connections, which frees every peer."""
        self._posted.clear()
        self._sent.clear()
        self._local.close()
        groups = list(set(self._groups.values()))
        self._groups.clear()
        give_up(groups)
