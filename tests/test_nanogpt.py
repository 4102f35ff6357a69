"""A plain script moved to two workers: six lines differ and the losses do not; killed, it goes on bit for bit."""
import ast
import difflib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "nanogpt"
SMALL = ("--width", "32", "--blocks", "3", "--max-steps", "20", "--eval-every", "5", "--save-every", "4",
         "--length", "16", "--warmup-steps", "5")


def code(name: str) -> list[str]:
    """The lines of a script after its docstring, without empty ones."""
    text = (FOLDER / name).read_text()
    start = ast.parse(text).body[0].end_lineno
    return [line for line in text.splitlines()[start:] if line.strip()]


def start(name: str, workers: int, *options: str) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(workers)] if workers else []
    return subprocess.Popen([sys.executable, *launcher, str(FOLDER / name), *SMALL, *options], text=True, cwd=ROOT,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run(name: str, workers: int, *options: str) -> str:
    with start(name, workers, *options) as process:
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def numbers(output: str) -> dict[str, list[float]]:
    """Every number of every line that tells of a step or of an evaluation, by the line's beginning."""
    lines = re.findall(r"^((?:iter|step) \d+|done): (.*)$", output, re.MULTILINE)
    return {head: [float(number) for number in re.findall(r"\d+\.\d+", rest)] for head, rest in lines}


def test_six_lines_differ():
    """Those of the plain script's own checkpoints are not needed any more."""
    lines = list(difflib.ndiff(code("train.py"), code("train_pipeline.py")))
    new = [line for line in lines if line.startswith("+ ")]
    assert 0 < len(new) <= 6, new
    gone = [line for line in lines if line.startswith("- ")]
    assert len(gone) <= 5 + 11, gone


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data")
    subprocess.run([sys.executable, str(FOLDER / "prepare.py"), str(folder)], check=True)
    return str(folder)


@pytest.mark.slow
def test_two_workers_train_as_the_plain_script(data, tmp_path):
    """Losses of 20 steps, norms, and evaluations of both splits."""
    plain = numbers(run("train.py", 0, "--data", data, "--out", str(tmp_path / "plain")))
    moved = numbers(run("train_pipeline.py", 2, "--data", data, "--out", str(tmp_path / "moved")))
    assert len(plain) == 20 + 4 + 1 and moved.keys() == plain.keys()
    for head, expected in plain.items():
        assert moved[head] == pytest.approx(expected, abs=1e-5), head


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_a_killed_script_goes_on_bit_for_bit(data, tmp_path):
    """All workers die at once, with dropout; every digit of what follows is that of the run that nobody killed."""
    options = ("--data", data, "--dropout", "0.2", "--out")
    whole = numbers(run("train_pipeline.py", 2, *options, str(tmp_path / "whole")))
    process = start("train_pipeline.py", 2, *options, str(tmp_path / "killed"))
    for line in process.stdout:
        if line.startswith("iter 10:"):
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for pid in (process.pid, *map(int, workers)):       # torchrun first: it would end the others in order
                os.kill(pid, signal.SIGKILL)
    process.wait()
    again = numbers(run("train_pipeline.py", 2, *options, str(tmp_path / "killed")))
    assert "iter 19" in again and "iter 7" not in again, "it began at the checkpoint of 8 steps"
    assert again == {head: whole[head] for head in again}
