"""Real workers for tests: processes on this machine that share a gloo process group over the loopback.

They come from a fork server that has imported torch, transformers and pipeengine once, so that a launch takes a
fraction of a second. Nothing can hang: a worker that is not done after its limit writes down where every thread stands
and exits.
"""
import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from multiprocessing import connection

import torch
import torch.distributed as dist

_FIRST_IMPORTS = ["pytest", "torch", "torch.distributed", "transformers", "safetensors.torch",
                  "pipeengine.pipeline", "pipeengine.checkpoint", "pipeengine.report",
                  *(f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "llama", "bert", "t5", "vit"))]


@dataclass
class Worker:
    """One process, and what it has told so far: ``reports`` by key, ``error`` the traceback that ended it."""
    process: multiprocessing.Process
    messages: connection.Connection
    log: str
    reports: dict = field(default_factory=dict)
    error: str = ""

    def read(self) -> None:
        """Take what has arrived."""
        try:
            while self.messages.poll():
                key, value = pickle.loads(self.messages.recv_bytes())
                if key is None:
                    self.error = value
                else:
                    self.reports[key] = value
        except EOFError:
            self.messages.close()

    def account(self) -> str:
        """How it ended, for people."""
        with open(self.log) as log:
            said = log.read()[-6000:]
        return f"exit code {self.process.exitcode}, reported {list(self.reports)[-3:]}\n{self.error}{said}"


class Workers:
    """``num_workers`` processes that each run ``work(report, *arguments)``; ``report(key, value)`` tells the parent."""

    def __init__(self, num_workers: int, work: Callable, *arguments: object, limit: float = 100.0):
        self._deadline = time.monotonic() + limit + 5
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._folder = tempfile.TemporaryDirectory(prefix="workers-")
        self.workers = [self._start(rank, num_workers, work, arguments, limit) for rank in range(num_workers)]

    def _start(self, rank: int, num_workers: int, work, arguments, limit: float) -> Worker:
        here, there = multiprocessing.Pipe(duplex=False)
        log = f"{self._folder.name}/{rank}.log"
        open(log, "w").close()
        process = _context().Process(target=_main, daemon=True,
                                     args=(rank, num_workers, self._store.port, there, log, limit, work, arguments))
        process.start()
        there.close()
        return Worker(process, here, log)

    def _advance(self) -> None:
        """Wait until a worker says something or ends."""
        alive = [w for w in self.workers if w.process.is_alive()]
        waiting = [w.messages for w in self.workers if not w.messages.closed]
        if waiting or alive:            # the last one may have ended since the caller looked: nothing would wake us
            connection.wait([*waiting, *(w.process.sentinel for w in alive)],
                            max(0.0, self._deadline - time.monotonic()))
        for worker in self.workers:
            if not worker.messages.closed:
                worker.read()
        if time.monotonic() >= self._deadline:
            for worker in alive:
                worker.process.kill()

    def wait_for(self, key: object) -> None:
        """Return when every worker has reported ``key``; fail when one ends before that."""
        while any(key not in w.reports for w in self.workers):
            ended = [w for w in self.workers if not w.process.is_alive()]
            self._advance()
            if any(key not in w.reports for w in ended):
                raise AssertionError(self.account())

    def wait_for_one(self, rank: int, key: object) -> None:
        """Return when worker ``rank`` has reported ``key``; fail when it ends before that."""
        worker = self.workers[rank]
        while key not in worker.reports:
            ended = not worker.process.is_alive()
            self._advance()
            if ended and key not in worker.reports:
                raise AssertionError(self.account())

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.workers[rank].process.pid, number)

    def join(self) -> list[dict]:
        """Wait for all to end; what each has reported."""
        while any(w.process.is_alive() or not w.messages.closed for w in self.workers):
            self._advance()
        for worker in self.workers:
            worker.process.join()
        return [w.reports for w in self.workers]

    def account(self) -> str:
        """How every worker ended, for people."""
        return "\n".join(f"--- worker {rank}: {w.account()}" for rank, w in enumerate(self.workers))

    @property
    def exit_codes(self) -> list[int | None]:
        return [w.process.exitcode for w in self.workers]


def launch(num_workers: int, work: Callable, *arguments: object, limit: float = 100.0) -> list[dict]:
    """Run ``work(report, *arguments)`` on every worker to its end; what each has reported, by rank.

    Raises with all tracebacks when a worker fails or is not done after ``limit`` seconds.
    """
    workers = Workers(num_workers, work, *arguments, limit=limit)
    reports = workers.join()
    assert workers.exit_codes == [0] * num_workers, workers.account()
    return reports


@cache
def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_FIRST_IMPORTS)
    return context


def _main(rank: int, num_workers: int, port: int, messages, log: str, limit: float,
          work: Callable, arguments: tuple) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.dump_traceback_later(limit, exit=True)

    def report(key: object, value: object = None) -> None:
        messages.send_bytes(pickle.dumps((key, value)))
    try:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.set_num_threads(1)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=30))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_workers,
                                timeout=timedelta(seconds=limit))
        work(report, *arguments)
        dist.destroy_process_group()
    except BaseException:
        report(None, traceback.format_exc())
        raise
