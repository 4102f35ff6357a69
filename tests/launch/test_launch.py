"""Workers that are lost are started again, and nothing is left of them."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from pipeengine.distributed.rendezvous import agree_on_attempt
from pipeengine.errors import InputError, WorkerError
from pipeengine.launch import LaunchSettings, agent, launch, parse_workers

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
# Its last worker dies in every attempt that has more than two, so three attempts with 4, 3 and 2 workers make one run.
SHRINKS = """
import json, os, signal, sys, torch, pipeengine as pe
from torch import nn
from pathlib import Path

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2), nn.Tanh()) for _ in range(6)))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return nn.functional.cross_entropy(self.head(self.blocks(self.embedding(ids))).flatten(0, 1), ids.flatten())

def train(folder, size):
    torch.manual_seed(0)
    batches = torch.randint(0, 11, (12, 8, 5))
    pipe = pe.Pipeline(Tied(), {"ids": batches[0]}, num_microbatches=4, num_stages=size, costs="analytic")
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=1e-2)
    saves = pe.Checkpoints(folder / "saved", pipe, every=2, keep=None, optimizer=optimizer)
    start = saves.load()
    losses = {}
    for step in range(start, 12):
        if size > 2 and step == 12 - 2 * size and pipe.rank == size - 1:      # in step 4 of 4 workers, 6 of 3
            os.kill(os.getpid(), signal.SIGKILL)
        losses[step] = float(pipe.step(ids=batches[step]))
        optimizer.step()
        optimizer.zero_grad()
        saves.save(step + 1)
        saves.wait()
        (folder / f"losses-{size}-{pipe.rank}").write_text(json.dumps(losses))
    saves.close()
    pipe.close()

if __name__ == "__main__":
    train(Path(sys.argv[1]), int(os.environ["WORLD_SIZE"]))
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


@pytest.mark.parametrize("launcher", [pytest.param(one, marks=[pytest.mark.slow] * (one == "torchrun"))
                                      for one in LAUNCHERS])
def test_a_killed_worker_is_started_again(launcher, tmp_path):
    """Plain torchrun let the new workers meet the addresses of the dead ones, and never recovered."""
    output = start(launcher, SCRIPT, tmp_path).communicate(timeout=300)[0]
    assert {path.name for path in tmp_path.glob("done*")} == {"done-0-1", "done-1-1"}, output
    # The agent may end the survivor before it has said so itself.
    assert "worker 1 was killed by SIGKILL" in output or "failed (exitcode: -9) local_rank: 1" in output


SAVES = """
import signal, sys, time
from pathlib import Path
def save(number, frame):
    time.sleep(3)
    Path(sys.argv[1], f"saved-{os.environ['RANK']}").touch()
    raise SystemExit(0)
import os
signal.signal(signal.SIGTERM, save)
Path(sys.argv[1], f"ready-{os.environ['RANK']}").touch()
time.sleep(100)
"""


@pytest.mark.slow
def test_workers_have_time_to_save_after_a_signal(tmp_path):
    """They were killed after two seconds, in the middle of the checkpoint that the signal was to bring."""
    running = start("launch", SAVES, tmp_path)
    while len(list(tmp_path.glob("ready-*"))) < 2:
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    output = running.communicate(timeout=60)[0]
    assert running.returncode == 128 + signal.SIGTERM
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}, output


@pytest.mark.slow
def test_a_second_signal_kills_workers_that_do_not_end(tmp_path):
    """They had their two minutes again for every signal."""
    running = start("launch", SAVES.replace("sleep(3)", "sleep(300)"), tmp_path)
    while len(list(tmp_path.glob("ready-*"))) < 2:
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    time.sleep(1)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM and not list(tmp_path.glob("saved-*"))


@pytest.mark.slow
@pytest.mark.parametrize("fault, words", [("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL"),
                                          ("raise ValueError('no such row')", "ValueError: no such row"),
                                          ("os.kill(os.getpid(), signal.SIGSTOP)", "is frozen (stopped by a signal)")])
def test_the_summary_blames_the_culprit(fault, words, tmp_path):
    """Survivors end first where the culprit unwinds, and torchrun blamed worker 0 in 12 of 17 runs."""
    code = SCRIPT.replace("os.kill(os.getpid(), signal.SIGKILL)", fault)
    (tmp_path / "script.py").write_text(code)
    ran = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                          str(tmp_path / "script.py"), str(tmp_path)], capture_output=True, text=True, timeout=300,
                         env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    cause = ran.stderr.partition("Root Cause")[2]
    assert ran.returncode == 1 and "rank      : 1" in cause and words in cause, ran.stderr
    assert "worker 1 " in cause, cause


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_workers(tmp_path):
    """Planned anew for 4, 3 and 2 workers, over a tied parameter and dropout, as if one process had done it all."""
    from safetensors.torch import load_file
    (tmp_path / "script.py").write_text(SHRINKS)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-m", "pipeengine", "launch", "--workers", "2:4", "--max-restarts", "0",
                          str(tmp_path / "script.py"), str(tmp_path)], env=environment, capture_output=True, text=True,
                         timeout=300)
    assert ran.returncode == 0 and "going on with 2 workers" in ran.stderr, ran.stderr
    losses = {size: json.loads((tmp_path / f"losses-{size}-0").read_text()) for size in (4, 3, 2)}
    assert {size: list(map(int, own)) for size, own in losses.items()} == {
        4: [0, 1, 2, 3], 3: [4, 5], 2: [6, 7, 8, 9, 10, 11]}
    plain = tmp_path / "plain"
    plain.mkdir()
    names: dict = {"__name__": "script"}
    exec(compile(SHRINKS, "script", "exec"), names)
    names["train"](plain, 2)
    undisturbed = json.loads((plain / "losses-2-0").read_text())
    for own in losses.values():
        assert own == pytest.approx({step: undisturbed[step] for step in own}, rel=1e-6)
    tensors, truth = ({f"{path.name.startswith('model')} {name}": tensor
                       for path in (folder / "saved" / "step-000012").glob("*.safetensors")
                       for name, tensor in load_file(path).items()} for folder in (tmp_path, plain))
    assert set(tensors) == set(truth) and len(truth) > 30       # weights, and two moments for each
    for name, tensor in truth.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("workers, fails, ran, status", [
    ((2, 4), {4, 3}, [4, 3, 2], 0), ((2, 4), {4, 3, 2}, [4, 3, 2], 1), ((3, 3), {3}, [3], 1), ((1, 4), set(), [4], 0),
    ((2, 4), {4, -3}, [4, 3], 128 + signal.SIGTERM)])
def test_one_worker_fewer_until_it_goes(workers, fails, ran, status, tmp_path, monkeypatch, capfd):
    """A negative number in ``fails``: somebody ends the launcher then, which is no reason to go on with fewer."""
    tried = []

    def attempts(script, arguments, settings, number):
        tried.append(number)
        if -number in fails:
            raise SignalException("ended", signal.SIGTERM)
        if number in fails:
            raise ChildFailedError("script", {number - 1: ProcessFailure(number - 1, 7, -9, "")})
    monkeypatch.setattr(agent, "_run", attempts)
    (tmp_path / "script.py").touch()
    assert launch(str(tmp_path / "script.py"), [], LaunchSettings(workers, max_restarts=5)) == status
    assert tried == ran
    said = capfd.readouterr().err
    assert all(f"worker {number - 1} of {number} ended with exit code -9 and has used up 5 restarts" in said
               for number in fails if number > 0)
    assert [f"going on with {number} workers" in said for number in (3, 2)] == [number in ran[1:] for number in (3, 2)]


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
