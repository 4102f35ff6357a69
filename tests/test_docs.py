"""Every Python block of README and docs runs as it stands, after what its page takes for given; links lead somewhere.

Pages that are run and checked further elsewhere: docs/runs.md (tests/run), docs/checkpoints.md (tests/checkpoint).
"""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from workers import launch

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
ELSEWHERE = {"docs/runs.md", "docs/checkpoints.md"}

SMALL = """
import contextlib, torch, pipeengine as pe
from torch import nn
from torch.utils.data import DataLoader
inputs, target = torch.randn(8, 8), torch.randn(8, 8)
class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])
    def forward(self, x, y):
        return {"loss": nn.functional.mse_loss(self.layers(x), y)}
model = Small()
batch = example = first_batch = dict(x=inputs, y=target)
"""
PIPE = SMALL + """
pipe = pe.Pipeline(model, batch, num_microbatches=2, num_stages=2, costs="analytic")
optimizer = torch.optim.AdamW(pipe.parameters())
scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
loader = pe.ResumableLoader(DataLoader([dict(x=row, y=row) for row in inputs], batch_size=4))
"""
LOSS = """
class Loss:
    def __init__(self, x): self.loss = (x * x).mean()
model = lambda x, leaf=torch.ones(2, requires_grad=True): Loss(x * leaf.sum())
micro_batches = micro_batches_of_replica_0 = micro_batches_of_replica_1 = [dict(x=torch.ones(2))]
weights = [0.5, 0.5]
"""
LLAMA = """
import torch, pipeengine as pe
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
model = LlamaForCausalLM(config)
data = [dict(input_ids=row, labels=row) for row in torch.randint(32, (16, 8))]
loader = torch.utils.data.DataLoader(data, batch_size=8)
first_batch = next(iter(loader))
args = TrainingArguments("out", max_steps=2, per_device_train_batch_size=8, use_cpu=True, report_to=[],
                         disable_tqdm=True)
"""
ACCELERATE = "\nscheduler = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD(model.parameters()), 1.0)\n"
# What each block of a page takes for given, by number; "" is what all of them do.
GIVEN = {
    "docs/architecture.md": {"": "import torch\n" + LOSS},
    "docs/capture.md": {"": SMALL},
    "docs/data.md": {"": PIPE + """
import numpy
numpy.arange(200_000, dtype=numpy.uint16).tofile("train.bin")
pipe.step = lambda input_ids, labels: float(input_ids.float().mean())
"""},
    "docs/huggingface.md": {"": LLAMA, "1": 'pipe = pe.Pipeline(model, first_batch, num_microbatches=2, num_stages=2)',
                            "2": LLAMA + ACCELERATE, "3": LLAMA},
    "docs/partitioning.md": {"": f"import os\nos.chdir({str(ROOT)!r})\n"},
    "docs/precision.md": {"": PIPE, "2": "model, example = Small(), {name: x.bfloat16() for name, x in batch.items()}"},
    "docs/replicas.md": {"": """
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DistributedSampler
dataset = list(range(10))
""" + SMALL, "1": LOSS},
    "docs/search.md": {"": SMALL},
    "README.md": {"1": LLAMA, "2": PIPE, "3": PIPE + "data = [dict(x=row, y=row) for row in inputs] * 4\n"},
}
# Where a block would need more machines than a test has.
INSTEAD = {("docs/search.md", 0): [("num_devices=64", "num_devices=1"), ("rows=512", "rows=8")],
           ("docs/precision.md", 0): [('"cuda"', '"cpu"'), ("torch.float16", "torch.bfloat16")],
           ("README.md", 3): [("10_000", "3")]}
NEEDS_WORKERS = {("docs/replicas.md", 0): 4}


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


def run_block(page: str, number: int, names: dict) -> None:
    code = blocks(ROOT / page)[number]
    for old, new in INSTEAD.get((page, number), ()):
        assert old in code
        code = code.replace(old, new)
    if re.search(r"^return ", code, re.M):          # the body of a function
        code = "def body(num_microbatches, num_workers, r, k, F, B):\n" + re.sub("^", "    ", code, flags=re.M)
    given = GIVEN.get(page, {})
    exec(compile(given.get("", "") if number == 0 else "", f"what {page} takes for given", "exec"), names)
    exec(compile(given.get(str(number), ""), f"what block {number} of {page} takes for given", "exec"), names)
    exec(compile(code, f"{page}, block {number}", "exec"), names)


@pytest.mark.parametrize("page", [name for page in PAGES if (name := str(page.relative_to(ROOT))) not in ELSEWHERE
                                  and blocks(page)])
def test_every_block_runs(page, tmp_path, monkeypatch):
    if page == "docs/huggingface.md":
        pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "a_page"}
    for number in range(len(blocks(ROOT / page))):
        if (page, number) in NEEDS_WORKERS:
            exec(GIVEN[page][""], names)
        elif (page, number) != ("README.md", 0):            # which tests/test_examples.py runs
            run_block(page, number, names)


def on_workers(report, page: str, number: int) -> None:
    run_block(page, number, {})


@pytest.mark.slow
@pytest.mark.parametrize("page, number", NEEDS_WORKERS)
def test_blocks_of_several_workers_run(page, number):
    launch(NEEDS_WORKERS[page, number], on_workers, page, number, limit=300)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_the_reference_has_every_name():
    """What ``import pipeengine`` offers; errors have a page of their own."""
    import pipeengine
    told = re.findall(r"^::: \S+\.(\w+)$", (ROOT / "docs" / "reference" / "api.md").read_text(), re.M)
    assert {name for name in pipeengine.__all__ if not name.endswith("Error")} <= set(told)
    assert {name for name in pipeengine.__all__ if name.endswith("Error")} <= set(
        re.findall(r"`(\w+Error)`", (ROOT / "docs" / "errors.md").read_text()))
    hidden = {name for name in dir(pipeengine) if not name.startswith("_")} - set(pipeengine.__all__)
    assert all(getattr(pipeengine, name).__name__ == f"pipeengine.{name}" for name in hidden), hidden


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    for name in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(name)
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
                          cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    reference = (tmp_path / "site" / "reference" / "api" / "index.html").read_text()
    assert "num_microbatches" in reference and "ShuffledSampler" in reference
    assert "pipeengine simulate" in (tmp_path / "site" / "reference" / "command" / "index.html").read_text()
