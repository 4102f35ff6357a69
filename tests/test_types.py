"""A script of a user's own sees the types of the public names, as mypy --strict reads them."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = """
from typing import assert_type

import torch
import pipeengine as pe
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(output, target)

model, inputs = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(8, 8)
pipe = pe.Pipeline(model, (inputs,), num_stages=2, num_microbatches=2, loss_fn=loss_fn, target=inputs)
optimizer = torch.optim.AdamW(pipe.parameters())
data = TensorDataset(inputs)
loader = pe.ResumableLoader(DataLoader(data, batch_size=4, sampler=pe.ShuffledSampler(data)))
run = pe.Run("runs/first", pipe, optimizer=optimizer, loader=loader, save_every="10min")
for step in run.steps(10):
    loss = pipe.step(inputs, target=inputs)
    assert_type(loss, torch.Tensor)
    assert_type(pipe.clip_grad_norm_(1.0), torch.Tensor)
    run.log(loss=loss)
assert_type(step, int)
assert_type(pipe.plan, pe.Plan)
assert_type(pipe.report(), str)
assert_type(pipe.full_state_dict(), dict[str, torch.Tensor] | None)
assert_type(pe.Checkpoints("saved", pipe, every=2).load(), int)
assert_type(pe.simulate(pe.build("1f1b", num_workers=2, num_microbatches=4)), pe.Timeline)
pipe.stepp(inputs)
pe.Pipeline(model, (inputs,), num_stage=2)
"""


@pytest.mark.slow
def test_a_script_sees_types(tmp_path):
    """Everything is as it says, and two slips of a pen are found; nothing else is."""
    pytest.importorskip("mypy")
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "mypy.ini").write_text("[mypy]\n")
    done = subprocess.run([sys.executable, "-m", "mypy", "--strict", "--config-file", "mypy.ini", "--follow-imports",
                           "silent", "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600,
                          env=os.environ | {"MYPYPATH": str(ROOT)})
    found = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(found) == 2 and '"stepp"' in found[0] and '"num_stage"' in found[1], done.stdout
