"""Start the default process group in the environment that torchrun gives, so that a restart works.

torchrun keeps one store for all attempts, and a worker that was started again would read the addresses of the dead
ones there. So each attempt has a part of the store to itself, and the workers agree on which: restart counts can differ
between machines.
"""
from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from pipeengine.errors import WorkerError


def start_group(device: torch.device, environment: Mapping[str, str], timeout: timedelta) -> None:
    """Make the default process group of all workers that were launched with this ``environment``.

    On one machine gloo listens on the loopback alone, unless ``GLOO_SOCKET_IFNAME`` says otherwise.
    """
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if environment.get("LOCAL_WORLD_SIZE") == environment["WORLD_SIZE"] and "GLOO_SOCKET_IFNAME" not in environment:
        os.putenv("GLOO_SOCKET_IFNAME", "lo")       # read by gloo in C++, whenever a group is made
    agent_hosts = environment.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    store = dist.TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), size,
                          is_master=rank == 0 and not agent_hosts, timeout=timeout, multi_tenant=True,
                          wait_for_workers=False)
    attempt = agree_on_attempt(dist.PrefixStore("pipeengine", store), rank, size, timeout.total_seconds())
    dist.init_process_group("gloo" if device.type == "cpu" else None, rank=rank, world_size=size, timeout=timeout,
                            store=dist.PrefixStore(f"pipeengine/attempt/{attempt}", store))


def agree_on_attempt(store: dist.Store, rank: int, size: int, seconds: float) -> str:
    """A name for this attempt, the same on every worker of it and on no other.

    Every worker leaves a number of its own. Worker 0 proposes a name for the numbers that it finds, again whenever one
    of them has changed, until all have accepted. What dead workers have left is never accepted by the living.
    """
    own, deadline = secrets.token_hex(8), time.monotonic() + seconds
    store.set(f"join/{rank}", own)
    proposal: dict = {"attempt": "", "workers": []}
    while time.monotonic() < deadline:
        if rank == 0:
            workers = [_look(store, f"join/{other}") for other in range(size)]
            if None not in workers and workers != proposal["workers"]:
                proposal = {"attempt": secrets.token_hex(8), "workers": workers}
                store.set("proposal", json.dumps(proposal))
        else:
            proposal = json.loads(_look(store, "proposal") or '{"attempt": "", "workers": []}')
        attempt = proposal["attempt"]
        if attempt and proposal["workers"][rank:rank + 1] == [own]:
            store.set(f"{attempt}/accepted/{rank}", "")
            if rank == 0 and all(store.check([f"{attempt}/accepted/{other}"]) for other in range(size)):
                store.set(f"{attempt}/go", "")
            if store.check([f"{attempt}/go"]):
                return attempt
        time.sleep(0.01)
    missing = [other for other in range(size) if _look(store, f"join/{other}") is None]
    raise WorkerError(f"worker {rank} has waited {seconds:.0f} s for {size} workers; "
                      + (f"worker {missing[0]} has not come: was every one started?" if missing else
                         "they have not agreed on a start; start them again"))


def _look(store: dist.Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None
