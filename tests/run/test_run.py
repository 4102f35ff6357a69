"""A run in one process: what its folder holds, how it ends, goes on and is told of."""
import gc
import json
import re
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from run_training import make, train_step

import pipeengine as pe
from pipeengine.run import Run
from pipeengine.tracking import read_metrics, series


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class Notebook:
    """A tracker that remembers."""
    name, requires_logging_directory, tracker = "notebook", False, None

    def __init__(self):
        self.calls, self.config, self.files, self.ends = [], {}, [], 0

    def start(self):
        pass

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **kwargs):
        self.calls.append((step, values))

    def log_artifact(self, path):
        self.files.append(path.name)

    def finish(self):
        self.ends += 1

    def of(self, name):
        return [(step, values[name]) for step, values in self.calls if name in values]


def train(folder, total, *, stop_at=None, log=True, seconds=None, **options):
    """Losses by step of one start."""
    run, *parts = make(folder, num_stages=2, **{"save_every": 4, **options})
    losses = {}
    for step in run.steps(total, seconds):
        losses[step] = float(loss := train_step(*parts))
        if log:
            run.log(loss=loss)
        if step == stop_at:
            run.stop()
    return run, losses


def test_a_run_leaves_what_it_promises(tmp_path, capsys):
    tracker = Notebook()
    run, losses = train(tmp_path / "a", 12, trackers=[tracker], config={"width": 16, "deep": {"er": 1}})
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "run.json", "options.json", "plan.json", "metrics.jsonl", "checkpoints", "report.json", "report.html",
        "timeline.svg", "plan.svg", "trace.json"}
    assert sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir()) == [
        f"step-{step:06}" for step in (4, 8, 12)]
    records = read_metrics(tmp_path / "a" / "metrics.jsonl")
    assert dict(series(records, "loss")) == losses and list(losses) == list(range(12))
    assert len(series(records, "pipeline/step_seconds")) == 12
    assert dict(series(records, "pipeline/seconds/stage_1")), "the timelines are told"
    assert tracker.of("loss") == list(losses.items()) and tracker.ends == 1
    assert tracker.config.items() >= {"width": 16, "deep.er": 1, "pipeline.schedule": "1f1b",
                                      "pipeline.num_stages": 2}.items() and "plan.gap" in tracker.config
    assert {"report.html", "plan.json", "plan.svg", "timeline.svg"} <= set(tracker.files)
    assert pe.Plan.load(tmp_path / "a" / "plan.json") == run.pipe.plan
    picture = (tmp_path / "a" / "plan.svg").read_text()
    assert picture.count("<circle") >= len(run.pipe.graph) > 8, "a dot for each node, as `pipeengine plan` draws them"
    assert "steps: 12 of 12" in run.report() and "step 12 of 12" in capsys.readouterr().err


def test_a_run_goes_on_where_its_checkpoint_ends(tmp_path):
    whole = train(tmp_path / "whole", 14)[1]
    first, early = train(tmp_path / "a", 14, stop_at=5, trackers=[before := Notebook()])
    second, late = train(tmp_path / "a", 14, trackers=[after := Notebook()])
    assert (first.first_step, second.first_step, first.id) == (0, 6, second.id)
    assert early | late == whole and not early.keys() & late.keys()
    assert before.of("loss") + after.of("loss") == list(whole.items())
    assert dict(series(read_metrics(tmp_path / "a" / "metrics.jsonl"), "loss")) == whole
    starts = json.loads((tmp_path / "a" / "run.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 6]
    assert train(tmp_path / "a", 14)[1] == {}, "nothing is left to train"


@pytest.mark.parametrize("replaces", (False, True))
def test_steps_trained_again_stand_in_the_file_once(tmp_path, replaces):
    """Checkpoint at 4, an exception in step 6: steps 4 to 6 come again."""
    run, *parts = make(tmp_path, num_stages=2, save_every=4)
    with pytest.raises(ZeroDivisionError), run:
        for step in run.steps(10):
            run.log(loss=train_step(*parts))
            if step == 6:
                run.log(early=1)
                run.checkpoints.wait()
                raise ZeroDivisionError
    tracker = Notebook()
    tracker.replaces_steps = replaces
    _, losses = train(tmp_path, 10, trackers=[tracker])
    assert list(losses) == list(range(4, 10))
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [step for step, _ in series(records, "loss")] == list(range(10))
    assert len([r for r in records if "loss" in r]) == 10 and not series(records, "early")
    # Step 6 had been logged but had not ended, so that only 4 and 5 were told.
    assert [step for step, _ in tracker.of("loss")] == list(range(4 if replaces else 6, 10))


def test_an_exception_in_the_loop_closes_everything(tmp_path):
    tracker = Notebook()

    def work():
        run, *parts = make(tmp_path, num_stages=2, trackers=[tracker])
        for step in run.steps(10):
            run.log(loss=train_step(*parts))
            if step == 3:
                raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        work()
    gc.collect()
    assert tracker.ends == 1 and [step for step, _ in tracker.of("loss")] == [0, 1, 2]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tracker")]


def test_with_a_block_values_may_follow_the_loop(tmp_path):
    tracker = Notebook()
    run, *parts = make(tmp_path, num_stages=2, trackers=[tracker])
    with run:
        for _ in run.steps(3):
            run.log(loss=train_step(*parts))
        run.log(test_loss=torch.tensor(0.25))
    assert tracker.of("test_loss") == [(2, 0.25)] and tracker.ends == 1
    assert series(read_metrics(tmp_path / "metrics.jsonl"), "test_loss") == ((2, 0.25),)


class Sleeping(Notebook):
    def log(self, values, step=None, **kwargs):
        time.sleep(10)


class Raising(Notebook):
    def log(self, values, step=None, **kwargs):
        raise ConnectionError("no route to host")


class Missing(Notebook):
    def start(self):
        raise ImportError("No module named 'comet_ml'")


def test_hostile_trackers_change_nothing(tmp_path, capfd, monkeypatch):
    """All at once beside a good one: the run is complete, its file too, each is told of once."""
    monkeypatch.setattr("pipeengine.run.recorder.PATIENCE", 0.3)
    good = Notebook()
    plain = train(tmp_path / "plain", 12)[1]
    _, losses = train(tmp_path / "a", 12, trackers=[Sleeping(), Raising(), Missing(), good])
    assert losses == plain and good.of("loss") == list(plain.items())
    assert dict(series(read_metrics(tmp_path / "a" / "metrics.jsonl"), "loss")) == plain
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("tracker")]
    assert sorted(line.split(":")[0].split(" after")[0] for line in told) == [
        "tracker notebook cannot be used", "tracker notebook failed to log a step", "tracker notebook is not done"]


def test_what_cannot_be_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(pe.InputError, match="no tracker 'nothing'"):
        make(tmp_path, num_stages=2, trackers=["nothing"])
    with pytest.raises(pe.InputError, match="a part is called run"):
        make(tmp_path, num_stages=2, run=torch.optim.SGD([torch.zeros(1)], 0.1))
    run, *parts = make(tmp_path, num_stages=2)
    with pytest.raises(pe.InputError, match="total is 0"):
        next(run.steps(0))
    run, *parts = make(tmp_path, num_stages=2)
    with pytest.raises(pe.InputError, match="accuracy is a list"):
        for _ in run.steps(2):
            train_step(*parts)
            run.log(accuracy=[1.0])
    run.close()
    assert isinstance(run, Run) and "torch" in sys.modules


def test_the_example_of_the_docs_runs(tmp_path, monkeypatch, capsys):
    """docs/runs.md as it stands; started again, nothing is left, and ``--watch`` says so."""
    from pipeengine.cli import main
    text = (Path(pe.__file__).parents[1] / "docs" / "runs.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    monkeypatch.chdir(tmp_path)
    exec(code, names := {})
    assert names["step"] == 24 and names["run"].first_step == 0
    exec(code, names := {})
    assert "step" not in names and names["run"].first_step == 25
    capsys.readouterr()
    assert main(["report", "--watch", "runs/first"]) == 0
    assert capsys.readouterr().out.startswith("step 25 of 25, done\n  loss ")
    assert main(["report", "--watch", "runs"]) == 2


def test_every_value_is_in_the_docs(tmp_path):
    """The table of docs/runs.md names what a run tells, and nothing else."""
    text = (Path(pe.__file__).parents[1] / "docs" / "runs.md").read_text()
    train(tmp_path, 12)
    told = {re.sub(r"_\d+$", "", name) for record in read_metrics(tmp_path / "metrics.jsonl") for name in record
            if name.startswith("pipeline/")}
    for name in told:
        assert name in text or name.removeprefix("pipeline/").split("/")[0] in text, name


def test_memory_is_counted_once(tmp_path):
    """A report of a run has measured memory without being asked, on a CPU too."""
    run, _ = train(tmp_path / "long", 6)
    rows = run.pipe.run_report().rows
    assert all(row.measured_bytes > 0 for row in rows) and not run.pipe._runner.counts_memory
    run, _ = train(tmp_path / "short", 3)
    assert all(row.measured_bytes is None for row in run.pipe.run_report().rows)


def test_a_start_may_have_so_many_seconds(tmp_path, capsys):
    """It ends as by ``stop``, with a checkpoint and a report; the next one goes on and says so."""
    run, losses = train(tmp_path, 100_000, seconds=0.3)
    told = capsys.readouterr().err
    assert 1 <= len(losses) < 100_000 and (tmp_path / "report.html").exists()
    assert re.search(r"step 1 of 100,000 .* 0 s left", told), told
    again, more = train(tmp_path, len(losses) + 3)
    assert sorted(more) == [len(losses) + number for number in range(3)]
    assert f"{tmp_path}: going on at step {len(losses):,}, where its newest checkpoint ends" in capsys.readouterr().err
    train(tmp_path, len(losses) + 3)
    assert f"all {len(losses) + 3:,} steps are trained; ask for more" in capsys.readouterr().err
