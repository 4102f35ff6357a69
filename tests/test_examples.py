"""Every example, and the README's first one, runs as a user would run it; short."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(script: Path, *options: str, workers: int = 0, folder: Path | None = None) -> str:
    """What ``python script`` (or torchrun with so many workers) prints; a non-zero exit fails the test."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(workers)] if workers else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *launcher, str(script), *options], env=environment, text=True, timeout=240,
                          cwd=folder or ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


def losses(output: str) -> list[float]:
    return [float(found) for found in re.findall(r"loss +([0-9.]+)", output)]


SMALL_GPT = ("--steps", "25", "--width", "64", "--blocks", "4", "--rows", "8", "--length", "32",
             "--characters", "300000", "--microbatches", "4")


@pytest.mark.parametrize("workers", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_train_gpt(tmp_path, workers):
    """The loss falls; plan, report and trace are there; one process with two stages does the same. Started again it
    goes on, and ``--seconds`` ends the training on all workers after the same step."""
    options = () if workers else ("--stages", "2")
    output = run(EXAMPLES / "train_gpt.py", *SMALL_GPT, *options, "--folder", str(tmp_path / "gpt"), workers=workers)
    assert "loss on text it has not seen" in output and "going on" not in output
    found = losses(output)
    assert found[-1] < found[0] - 0.3
    assert "tokens/s" in output and "bottleneck" in output
    assert json.loads((tmp_path / "gpt" / "report.json").read_text())
    assert json.loads((tmp_path / "gpt" / "trace.json").read_text())
    assert "<svg" in (tmp_path / "gpt" / "report.html").read_text()
    if workers:
        output = run(EXAMPLES / "train_gpt.py", *SMALL_GPT[2:], "--seconds", "1", "--folder", str(tmp_path / "gpt"),
                     workers=workers)
        assert "going on at step 25" in output and "loss on text it has not seen" in output


def test_huggingface(tmp_path):
    """The loss falls over batches of other shapes, and from_pretrained reads what two workers wrote."""
    output = run(EXAMPLES / "huggingface.py", "--steps", "11", "--width", "64", "--folder", str(tmp_path / "llama"),
                 workers=2)
    found = losses(output)
    assert found[1] < found[0]
    assert "from_pretrained read them" in output and (tmp_path / "llama" / "config.json").exists()


def test_one_process():
    """Pipeline and plain PyTorch print the same losses, digit for digit."""
    output = run(EXAMPLES / "one_process.py", "--steps", "4")
    pairs = re.findall(r"pipeline ([0-9.]+) +plain ([0-9.]+)", output)
    assert len(pairs) == 4 and all(ours == plain for ours, plain in pairs)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts all writable memory on Linux only")
def test_too_large():
    output = run(EXAMPLES / "too_large.py", "--steps", "2")
    assert "one process: out of memory, as expected" in output and "four processes: trained" in output


def test_plan_offline(tmp_path):
    """A model nobody here could hold is planned; the file is a plan."""
    output = run(EXAMPLES / "plan_offline.py", "--layers", "16", "--stages", "4",
                 "--output", str(tmp_path / "plan.json"))
    assert "bottleneck" in output
    assert json.loads((tmp_path / "plan.json").read_text())["num_stages"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("workers", (0, 2))
@pytest.mark.parametrize("name", ("vision", "encoder_decoder", "own_model"))
def test_recipes_learn(name, workers):
    output = run(EXAMPLES / f"{name}.py", "30", workers=workers)
    found = losses(output)
    assert len(found) == 30 and found[-1] < 0.8 * found[0], output
    assert name != "vision" or float(re.search(r"accuracy ([0-9.]+)", output)[1]) > 0.5


@pytest.mark.slow
def test_recipes_of_large_models_are_planned_and_run_small(tmp_path):
    """With the optimizer that the docstring rules out 8B do not fit, with the other they do; 70B with LoRA fit."""
    output = run(EXAMPLES / "finetune_8b.py", "--plan")
    assert "adamw does not fit" in output and "adafactor fits" in output
    output = run(EXAMPLES / "lora_70b.py", "--plan")
    assert "bottleneck" in output
    for name in ("finetune_8b", "lora_70b"):
        found = losses(run(EXAMPLES / f"{name}.py", "--length", "32", "--microbatches", "4", folder=tmp_path))
        assert len(found) == 5 and found[-1] < found[0], name
    assert (tmp_path / "runs" / "lora" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_readme_first_example(workers, tmp_path):
    """At most 15 lines, and it runs as printed, with plain python and over two workers."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    assert len(code.strip().splitlines()) <= 15
    script = tmp_path / "first.py"
    script.write_text(code)
    assert "stage" in run(script, workers=workers, folder=tmp_path)
