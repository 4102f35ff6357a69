"""What surrounds the steps of several replicas: checkpoints, runs, and one failure that is everybody's."""
import os
import tempfile
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
import zoo
from torch import nn
from workers import launch

import pipeengine as pe
from pipeengine.tracking import read_metrics, series

SHARDS = (None, "optimizer", "parameters")
BEFORE, AFTER = 2, 2
BATCH = zoo.regression()[0]


class Fuse(torch.autograd.Function):
    """The identity, until it is lit."""
    lit = False

    @staticmethod
    def forward(ctx, x):
        if Fuse.lit:
            raise ValueError("boom")
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Net(zoo.Blocks):
    """Four blocks with dropout and a head; the last block can fail."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.2)

    def forward(self, x, y):
        for block in self.blocks:
            x = block(self.dropout(x))
        return self.loss(Fuse.apply(x), y)


def make(seed: int, shard: str | None = None, **options) -> tuple[pe.Pipeline, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    options = dict(num_replicas=2, num_microbatches=2, shard=shard) | options
    example = {key: value[:4] for key, value in BATCH.items()} if options["num_replicas"] else BATCH
    pipe = pe.Pipeline(Net(), example, schedule="1f1b", costs="analytic", check=False, **options)
    return pipe, torch.optim.AdamW(pipe.parameters(), lr=1e-2)


def train(pipe: pe.Pipeline, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        losses.append(float(pipe.step(**{key: value.tensor_split(pipe.num_replicas)[pipe.replica]
                                         for key, value in BATCH.items()})))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def work(report, root: str) -> None:
    warnings.simplefilter("ignore")
    for shard in SHARDS:
        folder = Path(root) / str(shard)
        pipe, optimizer = make(1, shard)
        checkpoints = pe.Checkpoints(folder, pipe, optimizer=optimizer)
        train(pipe, optimizer, BEFORE)
        checkpoints.save(BEFORE, force=True)
        checkpoints.wait()
        report((shard, "files"), sorted(os.listdir(folder / f"step-{BEFORE:06}")))
        report((shard, "through"), (train(pipe, optimizer, AFTER), pipe.full_state_dict()))
        checkpoints.close()
        pipe.close()
        pipe, optimizer = make(2 + pipe.replica, shard)         # other values, and others in each replica
        checkpoints = pe.Checkpoints(folder, pipe, optimizer=optimizer)
        report((shard, "loaded"), checkpoints.load())
        report((shard, "again"), (train(pipe, optimizer, AFTER), pipe.full_state_dict()))
        pipe.verify_shared()
        checkpoints.close()
        pipe.close()
    pipe, optimizer = make(5, num_replicas=None, num_microbatches=4)
    checkpoints = pe.Checkpoints(Path(root) / "optimizer", pipe, optimizer=optimizer)
    report("one loaded", checkpoints.load())
    report("one", (train(pipe, optimizer, AFTER), pipe.full_state_dict()))
    checkpoints.close()
    pipe.close()
    pipe, optimizer = make(1, "parameters")
    with pe.Run(Path(root) / "run", pipe, optimizer=optimizer) as run:
        for _ in run.steps(5):
            run.log(loss=train(pipe, optimizer, 1)[0])
    report("amount", pipe.amount)
    Fuse.lit = pipe.replica == 1 and pipe.rank == 1
    try:
        train(pipe, optimizer, 1)
    except pe.WorkerError as error:
        report("failure", str(error))
    report("in shards", all(hasattr(parameter, "to_local") for parameter in pipe.parameters()))
    try:
        train(pipe, optimizer, 1)
    except pe.WorkerError as error:
        report("closed", str(error))


@cache
def ran() -> tuple[list[dict], str]:
    folder = tempfile.mkdtemp()
    return launch(4, work, folder, limit=200), folder


@pytest.mark.parametrize("shard", SHARDS, ids=str)
def test_a_checkpoint_of_replicas_goes_on_bit_for_bit(shard):
    """Weights, moments, dropout: two steps, a save, two more; and from that save on in other pipelines."""
    reports, _ = ran()
    losses, state = reports[0][shard, "through"]
    for report in reports:
        assert report[shard, "loaded"] == BEFORE
        assert report[shard, "through"][0] == report[shard, "again"][0] == losses
    again = reports[0][shard, "again"][1]
    assert set(state) == set(again) and all(torch.equal(state[name], again[name]) for name in state)


def test_only_owners_write_weights():
    reports, _ = ran()
    weights = {shard: [name for name in reports[0][shard, "files"] if name.startswith("model-")] for shard in SHARDS}
    assert weights[None] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert len(weights["optimizer"]) == 4
    moments = [name for name in reports[0][None, "files"] if name.startswith("optimizer-")]
    assert moments == [f"optimizer-0000{worker}-of-00004.safetensors" for worker in (1, 2)]


def test_one_pipeline_goes_on_from_replicas_with_shards():
    """Four stages load what two replicas of two stages saved, and train on alike."""
    reports, _ = ran()
    losses, state = reports[0]["optimizer", "through"]
    assert reports[0]["one loaded"] == BEFORE
    assert reports[0]["one"][0] == pytest.approx(losses, rel=1e-5)
    for name, tensor in reports[0]["one"][1].items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_run_of_replicas_is_told_once():
    """One worker of the whole job writes; each worker's own values have its number."""
    reports, folder = ran()
    records = read_metrics(Path(folder) / "run" / "metrics.jsonl")
    assert [step for step, _ in series(records, "loss")] == list(range(5))
    assert all(report["amount"] == (8, "rows") for report in reports), "of both replicas"
    names = {name for record in records for name in record}
    assert {f"pipeline/sent_bytes/worker_{worker}" for worker in range(4)} <= names
    assert not any(name.endswith("idle_share/worker_2") for name in names), "timelines are of one pipeline"


def test_one_failure_in_one_replica_is_everybodys():
    """The same root cause on all four workers, and the pipeline is closed on all."""
    reports, _ = ran()
    for report in reports:
        assert "worker 3" in report["failure"] and "boom" in report["failure"], report["failure"]
        assert "closed" in report["closed"]
        assert report["in shards"], "parameters that were whole when the step failed are shards again"
