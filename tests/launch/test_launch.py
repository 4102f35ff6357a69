"""Workers that are lost are started again, and nothing is left of them."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from pipeengine.distributed.rendezvous import agree_on_attempt
from pipeengine.errors import InputError, WorkerError
from pipeengine.launch import LaunchSettings, launch, parse_workers

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os, signal, sys, torch, pipeengine as pe
from torch import nn
from pathlib import Path
folder = Path(sys.argv[1])
torch.manual_seed(0)
x = torch.randn(8, 8)
pipe = pe.Pipeline(nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), (x,), target=x, num_microbatches=2,
                   loss_fn=nn.functional.mse_loss, costs="analytic")
for step in range(6):
    if step == 3 and pipe.rank == 1 and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    loss = pipe.step(x, target=x)
pipe.close()
(folder / f"done-{pipe.rank}-{os.environ['TORCHELASTIC_RESTART_COUNT']}").write_text(str(float(loss)))
"""
SLEEPS = "import sys, os, time; open(f'{sys.argv[1]}/{os.getpid()}', 'w').close(); time.sleep(1000)"
LAUNCHERS = {"launch": ["-m", "pipeengine", "launch", "--workers", "2", "--max-restarts", "2"],
             "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts",
                          "2"]}


def start(launcher: str, code: str, folder: Path) -> subprocess.Popen:
    (folder / "script.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *LAUNCHERS[launcher], str(folder / "script.py"), str(folder)],
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_worker_is_started_again(launcher, tmp_path):
    """Plain torchrun let the new workers meet the addresses of the dead ones, and never recovered."""
    output = start(launcher, SCRIPT, tmp_path).communicate(timeout=300)[0]
    assert {path.name for path in tmp_path.glob("done*")} == {"done-0-1", "done-1-1"}, output
    # The agent may end the survivor before it has said so itself.
    assert "worker 1 was killed by SIGKILL" in output or "failed (exitcode: -9) local_rank: 1" in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_agent(number, tmp_path):
    agent = start("launch", SLEEPS, tmp_path)
    deadline = time.monotonic() + 120
    while len(workers := [path.name for path in tmp_path.glob("[0-9]*")]) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    agent.send_signal(number)
    agent.communicate(timeout=60)
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers) \
            and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(workers) == 2 and time.monotonic() < deadline


def test_what_is_asked_for_is_checked():
    assert parse_workers("4") == (4, 4) and parse_workers("2:4") == (2, 4)
    for wrong in ("", "0", "4:2", "a", "2:", "-1"):
        with pytest.raises(InputError, match="number of workers"):
            parse_workers(wrong)
    with pytest.raises(InputError, match="no script"):
        launch("/nowhere.py", [], LaunchSettings((1, 1)))
    with pytest.raises(InputError, match="--rendezvous"):
        launch(__file__, [], LaunchSettings((1, 1), nodes=(2, 2)))


def test_what_dead_workers_left_in_the_store_is_passed_over():
    import threading
    store = dist.HashStore()
    names = []
    for _ in range(3):          # three attempts over one store
        attempt: list[str] = [""] * 3
        threads = [threading.Thread(target=lambda rank=rank: attempt.__setitem__(
            rank, agree_on_attempt(store, rank, 3, 30.0))) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(attempt)) == 1
        names.append(attempt[0])
    assert len(set(names)) == 3 and all(names)
    with pytest.raises(WorkerError, match="worker 1 has not come"):
        agree_on_attempt(dist.HashStore(), 0, 2, 0.05)
