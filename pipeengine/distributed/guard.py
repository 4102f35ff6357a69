"""A worker's end of the guard: starts its process, and hears from it who is to blame.

Every worker has one small process beside it (``guard_process``), connected to that of worker 0 over the loopback, or
over the group's own interface where there are several machines; both sides of a connection prove that they know the
run's token. A verdict arrives on a socket that is looked at while this worker waits for others, so there is no thread.
"""
from __future__ import annotations

import atexit
import json
import os
import secrets
import select
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from pipeengine.distributed.activity import Activity
from pipeengine.distributed.failure import ConnectionLost, Description
from pipeengine.distributed.guard_process import Lines
from pipeengine.errors import InputError, WorkerError

T = TypeVar("T")

# The guard's process has packages without contents, so that it loads its own three files and nothing else: 20 ms.
_START = """
import sys, types
for name, folder in (("pipeengine", {root!r}), ("pipeengine.distributed", {here!r})):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from pipeengine.distributed.guard_process import main
main()
"""


@dataclass(frozen=True)
class GuardSettings:
    """When a worker counts as lost, in seconds.

    - ``beat``: how often each worker is heard of; ``frozen``: silence, or a stopped process, that ends the run.
    - ``stall``: no progress and no CPU time inside a step, at least; ``outside``: the same between calls, or while
      computing; ten times the longest pause seen so far, where that is more.
    - ``long``: the first calls, and what is known to take long. ``join``: until every worker has come.
    - ``judges``: False for a debugger: only deaths and errors are told. ``kills``: a frozen process is killed.
    - ``error_file``: where torchrun looks for what ended this worker.
    """

    beat: float = 0.5
    frozen: float = 3.0
    stall: float = 3.0
    outside: float = 60.0
    long: float = 600.0
    join: float = 300.0
    judges: bool = True
    kills: bool = True
    agent: int = 0
    interface: str = ""
    error_file: str = ""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> GuardSettings:
        """As the environment says: ``PIPEENGINE_GUARD`` is ``debug``, or settings such as ``stall=10,long=1800``."""
        values: dict[str, object] = {"agent": os.getppid() if "TORCHELASTIC_RUN_ID" in environment else 0,
                                     "interface": environment.get("GLOO_SOCKET_IFNAME", "").split(",")[0],
                                     "error_file": environment.get("TORCHELASTIC_ERROR_FILE", "")}
        for part in filter(None, environment.get("PIPEENGINE_GUARD", "").split(",")):
            name, _, value = part.partition("=")
            if name == "debug" and not value:
                values["judges"] = False
            elif isinstance(getattr(cls, name, None), float):
                values[name] = float(value)
            else:
                raise InputError(f"PIPEENGINE_GUARD is {environment['PIPEENGINE_GUARD']!r}; give debug, or seconds as "
                                 "in stall=10,outside=120,long=1800,frozen=5,beat=0.5,join=600")
        return cls(**values)       # type: ignore[arg-type]


class Verdict(NamedTuple):
    """Worker ``rank`` is to blame: it has ``failed`` (by an error of its own), ``died``, ``left``, ``closed``, is
    ``frozen`` or ``stalled``, never came (``missing``), or all wait in different calls (``parted``)."""

    kind: str
    rank: int
    what: str
    traceback: str = ""

    def text(self) -> str:
        """What every worker raises as a ``WorkerError``."""
        text = f"worker {self.rank} {self.what}"
        if self.traceback:
            text += f"\n--- traceback of worker {self.rank} ---\n{self.traceback}"
        return text


class Told(ConnectionLost):
    """Another worker is lost, so this one need not wait any longer; everybody has been told."""


class Guard:
    """Watches this worker and the others. ``activity`` is where this worker says what it is doing."""

    # What a process does is a fact of the process: a worker that makes a second pipeline must say so to those who wait
    # for it in the first, and hear from them.
    _open: weakref.WeakSet[Guard] = weakref.WeakSet()

    def __init__(self, rank: int, size: int, settings: GuardSettings):
        self.rank, self.size, self._settings = rank, size, settings
        self.activity: Activity = next((guard.activity for guard in Guard._open), None) or Activity()
        self._lines, self._process = _start(self.activity.file)
        self._verdict: Verdict | None = None
        self._broken = ""
        self._finalizer = weakref.finalize(self, _end, os.getpid(), self._lines, self._process)
        self._finalizer.atexit = False
        self._at_exit = _leaver(weakref.ref(self))
        atexit.register(self._at_exit)
        Guard._open.add(self)

    def connect(self, store: dist.Store, call: Callable[[Callable[[], Any]], Any]) -> int:
        """Meet the other guards; ``call`` runs what may block on ``store``, which is these workers' own. Returns the
        number of the meeting, the same for all and never had before.

        Worker 0 numbers meetings, the others come to its newest: one of them may have waited alone, in a pipeline that
        nobody else made, and then been called off.
        """
        token, hub, bind = secrets.token_hex(32), None, "127.0.0.1"
        if self.rank:
            seen = store.add(f"seen/{self.rank}", 0)
            number, told = call(lambda: self._come(store, seen))
            # Not by ``_come``: what was called off may go on there beside a later call.
            store.add(f"seen/{self.rank}", number - seen)
            found = json.loads(told)
            token, hub = found["token"], found["address"]
        else:
            number = store.add("meetings", 1)
            store.set(f"{number}/machine/0", _host())
            bind = self._address(store, number, call)
        settings = asdict(self._settings)
        self._lines.send({"rank": self.rank, "size": self.size, "token": token, "hub": hub, "bind": bind,
                          "pid": os.getpid(), "agent": settings.pop("agent"), "error_file": settings.pop("error_file"),
                          "settings": settings})
        if not self.rank:
            port = self._receive(self._settings.join, "port")
            store.set(f"{number}/hub", json.dumps({"address": [bind, port], "token": token}))
        return number

    def _come(self, store: dist.Store, seen: int) -> tuple[int, str]:
        """The number of worker 0's next meeting after ``seen``, and what it says there once all have come."""
        come = seen

        def look() -> tuple[int, str] | None:
            nonlocal come
            number = store.add("meetings", 0)
            if number > come:
                store.set(f"{number}/machine/{self.rank}", _host())
                come = number
            if number == seen or not store.check([f"{number}/hub"]):
                return None
            return number, store.get(f"{number}/hub").decode()
        return self._until(look, "worker 0")

    def _address(self, store: dist.Store, number: int, call: Callable[[Callable[[], Any]], Any]) -> str:
        """Where worker 0's guard listens: on the loopback alone, where all workers are on this machine."""
        hosts = [call(partial(self._fetch, store, f"{number}/machine/{rank}", rank)) for rank in range(self.size)]
        return "127.0.0.1" if len(set(hosts)) == 1 else _own_address(self._settings.interface)

    def _fetch(self, store: dist.Store, key: str, rank: int) -> str:
        """What worker ``rank`` leaves under ``key``."""
        return self._until(lambda: store.get(key).decode() if store.check([key]) else None, f"worker {rank}")

    def _until(self, look: Callable[[], T | None], whom: str) -> T:
        """What ``look`` finds, asked again and again: a ``get`` of what is not there yet would keep the store busy.
        Ends with this guard too, since nobody else ends it where its caller was called off."""
        deadline = time.monotonic() + self._settings.join
        while (found := look()) is None:
            if time.monotonic() > deadline or not self._finalizer.alive:
                raise WorkerError(f"worker {self.rank} has waited {self._settings.join:.0f} s for {whom} of "
                                  f"{self.size}; was every one started, and does each make this pipeline?")
            time.sleep(0.005)
        return found

    def _receive(self, seconds: float, name: str) -> object:
        """What the guard's process says next under ``name``."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            select.select([self._lines.connection], [], [], left)
            messages, alive = self._lines.receive()
            self._take(messages)
            for message in messages:
                if name in message:
                    return message[name]
            if not alive or self._broken:
                break
        raise WorkerError(f"the guard of worker {self.rank} did not start: {self._broken or 'it said nothing'}; "
                          "is this a Linux that lets a process start another?")

    def _take(self, messages: list[dict]) -> None:
        for message in messages:
            if "verdict" in message and self._verdict is None:
                told = message["verdict"]
                self._verdict = Verdict(str(told["kind"]), int(told["rank"]), str(told["what"]),
                                        str(told.get("traceback", "")))
            self._broken = str(message.get("broken", self._broken))

    # -- what happened ----------------------------------------------------------------------------------------------

    def verdict(self, seconds: float = 0.0) -> Verdict | None:
        """Who is to blame, if anybody is; waits for at most ``seconds`` until that is known."""
        deadline = time.monotonic() + seconds
        while self._verdict is None and self._finalizer.alive:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._lines.connection], [], [], left)[0]:
                break
            messages, alive = self._lines.receive()
            self._take(messages)
            if not alive:
                break
        return self._verdict

    def interrupted(self) -> Told | None:
        """The error that ends a wait, if another worker of this pipeline, or of another one of this process, is
        lost."""
        for guard in (self, *Guard._open):
            verdict = guard.verdict()
            if verdict is not None and (guard is self or verdict.kind != "closed"):
                return Told(verdict.text())
        return None

    def tell(self, told: Description, where: str) -> None:
        """This worker has failed by itself: let the others know."""
        with suppress(OSError, ValueError):
            self._lines.send({"failed": {"what": f"failed {where}: {told.kind}: {told.text}",
                                         "traceback": told.traceback}})

    def close(self) -> None:
        """End the guard's process."""
        Guard._open.discard(self)
        atexit.unregister(self._at_exit)
        self._finalizer()


def _start(memory: int) -> tuple[Lines, subprocess.Popen]:
    here = Path(__file__).parent
    own, other = socket.socketpair()
    code = _START.format(root=str(here.parent), here=str(here))
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", code, str(other.fileno()), str(memory)],
                               pass_fds=(other.fileno(), memory), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    other.close()
    return Lines(own), process


def _end(owner: int, lines: Lines, process: subprocess.Popen) -> None:
    if os.getpid() == owner:            # and not a forked child, which shares the connection
        lines.send({"closed": True})
        with suppress(OSError):
            lines.connection.shutdown(socket.SHUT_WR)
    lines.connection.close()
    # The one that judges lives on for a moment, for the others; it ends by itself and is reaped by Python.
    with suppress(subprocess.TimeoutExpired):
        process.wait(0.02)


def _leaver(guard: weakref.ref[Guard]) -> Callable[[], None]:
    """What tells, at the interpreter's end, that the script has ended, and by which error."""
    owner = os.getpid()

    def leave() -> None:
        watched, error = guard(), None if hasattr(sys, "ps1") else getattr(sys, "last_value", None)
        if watched is not None and os.getpid() == owner:
            watched.activity.leave()
            if error is not None and not isinstance(error, WorkerError):
                watched.tell(Description.of(error), "outside of any call of the pipeline")
    return leave


def _host() -> str:
    """The same for two processes that reach each other over the loopback, and no others."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/net")


def _own_address(interface: str) -> str:
    """This machine's address on ``interface``, or that of its name."""
    if interface:
        import fcntl
        import struct
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", interface.encode()[:15]))  # SIOCGIFADDR
        return socket.inet_ntoa(answer[20:24])
    address = socket.gethostbyname(socket.gethostname())
    if address.startswith("127."):
        raise WorkerError(f"the name of this machine, {socket.gethostname()}, stands for {address}, which other "
                          "machines cannot reach; set GLOO_SOCKET_IFNAME to the interface that connects them")
    return address
