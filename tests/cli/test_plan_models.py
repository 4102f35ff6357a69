"""``pipeengine plan`` and ``profile`` for models: what factories return, what the figures rest on, where files go."""
import json
import os
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from partitioners import Plan
from pipeengine.cli.main import main

FACTORIES = """
import torch
from torch import nn

def parts():
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))), (torch.randn(12, 8),)

def bare():
    model, example = parts()
    return nn.Sequential(model, Mean()), example

class Mean(nn.Module):
    def forward(self, x):
        return x.square().mean()

def with_loss():
    return *parts(), nn.functional.mse_loss

def with_target():
    target = {"kind": torch.zeros(12, dtype=torch.int64)}
    return *parts(), lambda output, target: nn.functional.cross_entropy(output, target["kind"]), target

def model_only():
    return parts()[0]

def odd():
    return *parts(), 3

def asks(width, depth, *others, heads=4):
    return parts()
"""


@pytest.fixture
def factories(tmp_path):
    file = tmp_path / f"made_{tmp_path.name}.py"
    file.write_text(FACTORIES)
    return file


def answer(capsys, *words):
    status = main([*map(str, words)])
    return status, capsys.readouterr().out


@pytest.mark.parametrize("name", ["bare", "with_loss", "with_target"])
def test_factories_may_bring_a_loss_and_a_target(factories, capsys, name):
    status, text = answer(capsys, "plan", f"{factories}:{name}", "--stages", 3, "--format", "json")
    assert status == 0 and json.loads(text)["num_stages"] == 3, text


@pytest.mark.parametrize("name, message", [("model_only", "returned a Sequential"), ("odd", "of type int as loss_fn"),
                                           ("asks", "asks for width, depth; give a function without")])
def test_other_factories_are_told_what_to_return(factories, capsys, name, message):
    status, text = answer(capsys, "plan", f"{factories}:{name}", "--stages", 3, "--format", "json")
    assert status == 2 and message in text and "model, example, loss_fn, target" in text


def test_what_the_figures_rest_on_is_told(factories, capsys):
    words = (
        "plan",
        f"{factories}:bare",
        "--stages",
        3,
        "--microbatches",
        4,
        "--flops",
        "400T",
        "--memory-bandwidth",
        "2TB/s",
    )
    status, text = answer(capsys, *words, "--schedule", "1f1b")
    assert status == 0 and " ".join(text.split()).startswith(
        "planned for 12 rows of 8 in 4 micro-batches; analytic seconds for 4e+14 FLOP/s and "
        "2e+12 bytes/s of memory; memory as under 1f1b: 3 to 1 micro-batches held"
    )
    found = json.loads(answer(capsys, *words, "--format", "json")[1])["assumptions"]
    assert found["made_with"] == {
        "rows": 12,
        "row": [8],
        "num_microbatches": 4,
        "bytes_per_weight": 4.0,
        "flops": 6912.0,
        "costs": "analytic",
        "flops_per_second": 4e14,
        "bytes_per_second": 2e12,
    }
    assert (found["num_microbatches"], found["memory_schedule"], found["microbatches_held"]) == (4, "gpipe", [4, 4, 4])
    assert "the device is a guess" in answer(capsys, *words[:4])[1]


def test_a_profile_keeps_its_micro_batches(factories, capsys, tmp_path):
    graph, plan = tmp_path / "graph.json", tmp_path / "plan.json"
    assert answer(capsys, "profile", f"{factories}:bare", "--microbatches", 4, "-o", graph)[0] == 0
    status, text = answer(capsys, "plan", graph, "--stages", 2, "-o", plan)
    assert status == 0 and "12 rows of 8 in 4 micro-batches; seconds measured on cpu" in text
    assert Plan.load(plan).setting.num_microbatches == 4
    text = answer(capsys, "plan", graph, "--stages", 2, "--microbatches", 6)[1]
    assert "in 6 micro-batches, with seconds and bytes of one of 4" in text


def test_no_more_micro_batches_than_rows(factories, capsys):
    status, text = answer(capsys, "plan", f"{factories}:bare", "--stages", 2, "--microbatches", 100)
    assert status == 0 and "12 micro-batches are used: 100 were asked for and the batch has 12 rows" in text
    assert "in 12 micro-batches;" in text


def test_the_picture_and_the_plan_each_have_a_file(factories, capsys, tmp_path):
    picture, plan = tmp_path / "plan.svg", tmp_path / "plan.json"
    status, text = answer(
        capsys, "plan", f"{factories}:bare", "--stages", 2, "--format", "svg", "-o", picture, "--save", plan
    )
    assert status == 0 and text == f"wrote {picture}\n"
    assert ElementTree.parse(picture).getroot().tag.endswith("svg") and Plan.load(plan).num_stages == 2


def test_a_reader_that_leaves_is_no_error():
    words = ["simulate", "--workers", "4", "--microbatches", "8"]
    code = f"from pipeengine.cli import main; raise SystemExit(main({words}))"
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone:
        ran = subprocess.run([sys.executable, "-c", code], stdout=gone, stderr=subprocess.PIPE, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize("stages, room, schedule", [(3, 3000, "gpipe"), (2, 2000, "1f1b"), (4, 1500, "gpipe")])
def test_the_memory_that_is_told_does(factories, capsys, stages, room, schedule):
    words = ("plan", f"{factories}:bare", "--stages", stages, "--microbatches", 4, "--schedule", schedule, "--memory")
    status, text = answer(capsys, *words, f"{room} bytes")
    hint = re.search(r"try memory of ([\d,]+ bytes) per device", text)
    assert status == 3 and hint, text
    assert answer(capsys, *words, hint[1])[0] == 0


def test_a_model_that_cannot_be_cut_is_told_so(factories, capsys):
    factories.write_text(
        FACTORIES + "\ndef one():\n    return nn.Sequential(nn.Linear(8, 8), Mean()), (torch.randn(12, 8),)\n"
    )
    status, text = answer(capsys, "plan", f"{factories}:one", "--stages", 2)
    assert status == 3 and "it runs whole only, with num_stages=1" in text and "allow_empty" not in text
    assert answer(capsys, "plan", f"{factories}:one", "--stages", 1)[0] == 0
