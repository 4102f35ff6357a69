"""Signals, and the ends of scripts: what was trained is saved, and the process ends as it should."""
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import torch
from torch import nn
from workers import Workers

import pipeengine as pe

ROOT = Path(pe.__file__).parents[1]


def pipeline() -> pe.Pipeline:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    return pe.Pipeline(model, (torch.ones(4, 4),), num_stages=2, num_microbatches=2, costs="analytic",
                       loss_fn=nn.functional.mse_loss, target=torch.zeros(4, 4))


def train(report, folder: Path, limit: int) -> None:
    """Steps until a signal says otherwise; worker 1 does not hear of it itself."""
    pipe = pipeline()
    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1, momentum=0.9)
    checkpoints = pe.Checkpoints(folder, pipe, every=1_000_000, optimizer=optimizer)
    for step in range(checkpoints.load() + 1, limit):
        pipe.step(torch.ones(4, 4), target=torch.zeros(4, 4))
        optimizer.step()
        optimizer.zero_grad()
        report("step", step)
        checkpoints.save(step)
        report("saved", step)
        time.sleep(0.005)


def test_one_workers_signal_is_everybodys(tmp_path):
    """SIGUSR1 to worker 1 saves; SIGTERM to worker 0 saves after one and the same step, and all exit with 0."""
    workers = Workers(2, train, tmp_path, 10_000)
    workers.wait_for("saved")
    workers.signal(1, signal.SIGUSR1)
    until = time.monotonic() + 30
    while not any(tmp_path.glob("step-*")) and time.monotonic() < until:
        workers._advance()
    (first,) = tmp_path.glob("step-*")
    workers.signal(0, signal.SIGTERM)
    reports = workers.join()
    assert workers.exit_codes == [0, 0], workers.account()
    last = max(tmp_path.glob("step-*"))
    assert last > first and {report["step"] for report in reports} == {int(last.name.removeprefix("step-"))}
    assert {report["saved"] for report in reports} == {reports[0]["step"] - 1}, "save did not return, it ended"
    checkpoints = pe.Checkpoints(tmp_path, pipeline())
    assert checkpoints.load() == reports[0]["step"] and not checkpoints.passed_over


SCRIPT = """
    import sys, time, torch
    sys.path.insert(0, {tests!r})
    import pipeengine as pe
    from test_preemption import pipeline
    pipe = pipeline()
    checkpoints = pe.Checkpoints({folder!r}, pipe)
    {body}
"""


def script(folder: Path, body: str) -> subprocess.Popen:
    text = textwrap.dedent(SCRIPT).format(tests=str(Path(__file__).parent), folder=str(folder),
                                          body=textwrap.dedent(body).strip())
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    return subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})


def test_a_script_that_ends_at_once_has_its_checkpoint(tmp_path):
    """Without ``wait``: what is written in the background is finished as the process ends."""
    process = script(tmp_path, """
import os
real = os.fsync
os.fsync = lambda file: (time.sleep(0.05), real(file))
checkpoints.save(7)
assert not os.path.exists(os.path.join(checkpoints._folder, "step-000007"))
""")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert pe.Checkpoints(tmp_path, pipeline()).load() == 7


def test_a_signal_while_nothing_is_saved(tmp_path):
    """The first SIGTERM is kept for the next save; the second ends the process as it always did."""
    process = script(tmp_path, """
checkpoints.save(1)
print("ready", flush=True)
time.sleep(60)
""")
    assert "ready" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == -signal.SIGTERM
    process.stdout.close()


def test_handlers_of_the_program_stay(tmp_path):
    mine = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        kept = signal.getsignal(signal.SIGTERM)
        pe.Checkpoints(tmp_path, pipeline()).save(1)        # forgotten, as by a cell that runs again
        checkpoints = pe.Checkpoints(tmp_path, pipeline())
        checkpoints.save(2)
        assert signal.getsignal(signal.SIGTERM) is kept and signal.getsignal(signal.SIGUSR1) != signal.SIG_DFL
        checkpoints.close()
        assert signal.getsignal(signal.SIGTERM) is kept and signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, mine)
