"""Run a script on several workers under torchrun's agent, with a store on the loopback, made anew for every attempt."""
from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path

from pipeengine.errors import InputError
from pipeengine.torch_private import stop_workers_within

_SIOCGIFADDR = 0x8915
_SHUTDOWN_SECONDS = 2       # before a restart, from asking the survivors to end until they are killed


@dataclass(frozen=True)
class LaunchSettings:
    """``workers``: the fewest and the most on this machine. ``nodes`` and ``rendezvous`` (host:port of the first) for
    several machines, each of which runs this command. ``loopback``: let gloo listen nowhere else. ``grace``: seconds
    that workers have, after Ctrl-C or SIGTERM, to finish their step and save, until they are killed."""

    workers: tuple[int, int]
    max_restarts: int = 10
    nodes: tuple[int, int] = (1, 1)
    rendezvous: str | None = None
    run_id: str | None = None
    loopback: bool = True
    grace: int = 120


def parse_workers(text: str) -> tuple[int, int]:
    """``"4"`` or ``"2:4"`` as the fewest and the most. Raises ``InputError``."""
    fewest, colon, most = text.partition(":")
    try:
        numbers = int(fewest), int(most if colon else fewest)
    except ValueError:
        numbers = 0, 0
    if not 1 <= numbers[0] <= numbers[1]:
        raise InputError(f"{text!r} is no number of workers; give one such as 4, or the fewest and the most as in 2:4")
    return numbers


def launch(script: str, arguments: Sequence[str], settings: LaunchSettings) -> int:
    """Run ``script`` until it has ended well on every worker; returns the exit status, 0 then.

    When a worker is lost all are started again, ``max_restarts`` times; after that with one worker fewer, down to the
    fewest. Ctrl-C and SIGTERM ask every worker to end, and kill those that have not after ``grace``; after a second one
    that takes two seconds.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    if not Path(script).is_file():
        raise InputError(f"there is no script {script}; give the path of a Python file")
    if settings.nodes[1] > 1 and settings.rendezvous is None:
        raise InputError(f"{settings.nodes[1]} nodes need a place to meet: --rendezvous HOST:PORT of the first one")
    fewest, most = settings.workers
    for number in range(most, fewest - 1, -1):
        try:
            _run(script, arguments, settings, number)
            return 0
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            print(f"pipeengine: worker {rank} of {number} ended with exit code {failure.exitcode} and has used up "
                  f"{settings.max_restarts} restarts", file=sys.stderr, flush=True)
            if number > fewest:
                print(f"pipeengine: going on with {number - 1} workers", file=sys.stderr, flush=True)
        except SignalException as error:
            return 128 + error.sigval
    return 1


def _run(script: str, arguments: Sequence[str], settings: LaunchSettings, workers: int) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    several = settings.nodes[1] > 1
    if not several:
        _register()
    here = own_address(settings.rendezvous) if settings.rendezvous is not None and several else "127.0.0.1"
    stop_workers_within(_SHUTDOWN_SECONDS)
    config = LaunchConfig(
        min_nodes=settings.nodes[0], max_nodes=settings.nodes[1], nproc_per_node=workers,
        run_id=settings.run_id or ("pipeengine" if several else uuid.uuid4().hex),
        rdzv_backend="c10d" if several else _BACKEND, rdzv_endpoint=settings.rendezvous or "",
        max_restarts=settings.max_restarts, shutdown_timeout=settings.grace, local_addr=here,
        rdzv_configs={"is_host": here == _address_of(settings.rendezvous)[0]} if several else {})
    wrapper = str(Path(__file__).parent / "worker.py")
    interface = interface_of(here) if several or settings.loopback else ""
    elastic_launch(config, sys.executable)("-u", wrapper, str(os.getpid()), interface, script, *arguments)


def _address_of(rendezvous: str | None) -> tuple[str, int]:
    """The IPv4 address and the port of ``HOST:PORT``. Raises ``InputError``."""
    host, _, port = (rendezvous or "").rpartition(":")
    try:
        return socket.gethostbyname(host), int(port)
    except (OSError, ValueError) as error:
        raise InputError(f"--rendezvous is {rendezvous!r}: {error}; give the first machine's name or address and a "
                         "free port there, as in 10.0.0.1:29400") from error


def own_address(rendezvous: str) -> str:
    """This machine's address on the way to ``rendezvous``: what the others can reach, whatever its name stands for."""
    address = _address_of(rendezvous)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(address)          # sends nothing
        except OSError as error:
            raise InputError(f"there is no way to {rendezvous}: {error.strerror}; is the network up?") from error
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str:
    """The interface that has an IPv4 ``address``; "" where none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return ""


_BACKEND = "pipeengine-loopback"


@cache
def _register() -> None:
    """Make the rendezvous of one machine known to torch: its store is on the loopback, and new for every attempt."""
    import torch.distributed as dist
    from torch.distributed.elastic.rendezvous import (
        RendezvousHandler,
        RendezvousInfo,
        RendezvousParameters,
        RendezvousStoreInfo,
        rendezvous_handler_registry,
    )

    class Loopback(RendezvousHandler):
        """One machine, alone."""

        def __init__(self, run_id: str):
            self._run_id = run_id
            self._stores: list[dist.Store] = []

        def get_backend(self) -> str:
            return _BACKEND

        @property
        def use_agent_store(self) -> bool:
            return True

        def next_rendezvous(self) -> RendezvousInfo:
            listener = socket.create_server(("127.0.0.1", 0))
            port = listener.getsockname()[1]
            store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False,
                                  timeout=timedelta(minutes=5), master_listen_fd=listener.detach())
            self._stores[:] = [store]
            return RendezvousInfo(dist.PrefixStore("agent", store), 0, 1, RendezvousStoreInfo("127.0.0.1", port))

        def is_closed(self) -> bool:
            return False

        def set_closed(self) -> None:
            self._stores.clear()

        def num_nodes_waiting(self) -> int:
            return 0

        def get_run_id(self) -> str:
            return self._run_id

        def shutdown(self) -> bool:
            self._stores.clear()
            return True

    def create(parameters: RendezvousParameters) -> RendezvousHandler:
        return Loopback(parameters.run_id)
    rendezvous_handler_registry.register(_BACKEND, create)
