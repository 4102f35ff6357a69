"""Two "machines", network namespaces joined by a veth pair: a link that is cut ends the run, one that heals does not.
"""
import json
import os
import subprocess
import sys
import textwrap
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
HOSTS = ("10.231.7.1", "10.231.7.2")
CODE = """
import json, os, sys, time
from datetime import timedelta
import torch, torch.distributed as dist, pipeengine as pe
from torch import nn
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
store = dist.TCPStore("10.231.7.1", 29471, 2, is_master=rank == 0, timeout=timedelta(seconds=90))
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=300))
torch.manual_seed(0)
x = torch.randn(8, 8)
pipe = pe.Pipeline(nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), (x,), target=x, num_microbatches=2,
                   loss_fn=nn.functional.mse_loss, costs="analytic")
told = {}
try:
    for step in range(100_000):
        pipe.step(x, target=x)
        if step == 20:
            open(f"{folder}/ready-{rank}", "w").close()
        if step % 20 == 0 and os.path.exists(f"{folder}/stop-{step}"):
            break
        if rank == 0 and step > 20 and step % 20 == 0 and os.path.exists(f"{folder}/stop"):
            open(f"{folder}/stop-{step + 20}", "w").close()
            os.remove(f"{folder}/stop")
    told = {"done": step}
except pe.WorkerError as error:
    told = {"raised": time.monotonic(), "text": str(error)}
with open(f"{folder}/told-{rank}", "w") as file:
    json.dump(told, file)
os._exit(0)
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def in_host(name: str, *command: str) -> list[str]:
    return ["ip", "netns", "exec", name, *command]


@contextmanager
def two_machines():
    """The names of two namespaces that reach each other alone; skips where they cannot be made."""
    mark = uuid.uuid4().hex[:6]
    names = [f"pe{mark}{number}" for number in (0, 1)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", f"a{mark}", "netns", names[0], "type", "veth", "peer", "name", f"b{mark}", "netns", names[1])
        for name, link, host in zip(names, (f"a{mark}", f"b{mark}"), HOSTS):
            ip("-n", name, "link", "set", link, "name", "wire")
            ip("-n", name, "address", "add", f"{host}/24", "dev", "wire")
            for device in ("wire", "lo"):
                ip("-n", name, "link", "set", device, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        pytest.skip(f"no network namespaces here: {error}")
    try:
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def wait_for(*paths: Path, seconds: float = 120) -> None:
    limit = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        assert time.monotonic() < limit, f"{paths} did not come"
        time.sleep(0.02)


def run_over(names: list[str], folder: Path, disturb) -> list[dict]:
    """Two workers that step until ``disturb()`` has had its effect; what each has told."""
    (folder / "script.py").write_text(textwrap.dedent(CODE))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "wire"}
    processes = [subprocess.Popen(in_host(name, sys.executable, str(folder / "script.py"), str(rank), str(folder)),
                                  env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                 for rank, name in enumerate(names)]
    try:
        wait_for(folder / "ready-0", folder / "ready-1")
        disturb()
        wait_for(folder / "told-0", folder / "told-1")
        return [json.loads((folder / f"told-{rank}").read_text()) for rank in (0, 1)]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("how", ["cut", "one way"])
def test_a_link_that_is_gone_ends_the_run_on_both_sides(how, tmp_path):
    """Each side names the other; nobody waits for gloo's five minutes. One way: packets of worker 1 alone are lost."""
    with two_machines() as names:
        def disturb() -> None:
            if how == "cut":
                ip("-n", names[1], "link", "set", "wire", "down")
            else:
                # Frames to an address that nobody has: what worker 1 sends is lost, what is sent to it arrives.
                ip("-n", names[1], "neighbour", "replace", HOSTS[0], "lladdr", "02:00:00:00:00:01", "dev", "wire",
                   "nud", "permanent")
        first, second = run_over(names, tmp_path, disturb)
    assert "worker 1 " in first["text"] and "not been heard of" in first["text"], first
    assert "worker 0 " in second["text"] or "worker 1 has not heard of worker 0" in second["text"], second


def test_a_link_that_heals_within_two_seconds_is_no_fault(tmp_path):
    with two_machines() as names:
        def disturb() -> None:
            ip("-n", names[1], "link", "set", "wire", "down")
            time.sleep(2.0)
            ip("-n", names[1], "link", "set", "wire", "up")
            time.sleep(3.0)
            (tmp_path / "stop").touch()
        told = run_over(names, tmp_path, disturb)
    assert all("done" in one for one in told) and told[0] == told[1], told
