"""``pipeengine checkpoint``: what people see of a run's checkpoints."""
import json

import pytest
import torch
from torch import nn

import pipeengine as pe
from pipeengine.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model, folder = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), tmp_path_factory.mktemp("run")
    inputs = torch.ones(2, 3)
    pipe = pe.Pipeline(model, (inputs,), num_stages=2, costs="analytic", loss_fn=nn.functional.mse_loss,
                       target=torch.ones(2, 2))
    optimizer = torch.optim.AdamW(pipe.parameters())
    checkpoints = pe.Checkpoints(folder, pipe, optimizer=optimizer)
    for step in (1, 2):
        pipe.step(inputs, target=torch.ones(2, 2))
        optimizer.step()
        checkpoints.save(step)
    checkpoints.wait()
    return folder


def test_whole_checkpoints(folder, capsys):
    assert main(["checkpoint", "list", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["step-000002", "step-000001"] and "1 workers, Sequential" in lines[0]
    assert main(["checkpoint", "verify", str(folder)]) == 0
    assert capsys.readouterr().out.count("whole") == 2
    assert main(["checkpoint", "show", str(folder / "step-000001")]) == 0
    out = capsys.readouterr().out
    assert "26 parameters, 2 stages" in out and "optimizer (AdamW)" in out and "model.safetensors" in out
    assert main(["checkpoint", "show", "--format", "json", str(folder)]) == 0
    (row,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert row["facts"]["step"] == 2 and row["files"]["model.safetensors"]["tensors"] == 4


def test_damage_and_nothing(folder, capsys):
    path = folder / "step-000002" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\x55")
    assert main(["checkpoint", "list", str(folder)]) == 0, "sizes fit, and nothing was read"
    capsys.readouterr()
    assert main(["checkpoint", "verify", str(folder)]) == 3
    first, second = capsys.readouterr().out.splitlines()
    assert "not whole" in first and str(path) in first and "step-000001  whole" in second
    assert main(["checkpoint", "show", str(folder)]) == 0 and capsys.readouterr().out.startswith("step-000001")
    path.write_bytes(whole)
    assert main(["checkpoint", "list", str(folder / "nothing"), "--format", "json"]) == 2
    assert "holds no checkpoints" in json.loads(capsys.readouterr().out)["error"]
