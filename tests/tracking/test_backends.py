"""Each tracker for real, as far as it is installed: begun, restarted, and read back by its own reader or file."""
import os

import pytest
from tracker_files import comet_offline, wandb_offline

from pipeengine.tracking import TrackerSetting, make_tracker

RUN = "0123456789abcdef" * 2


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """Nothing of the machine's own settings, and nothing outside."""
    for name in list(os.environ):
        if name.startswith(("COMET_", "WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def two_starts(name, folder):
    """Steps 0 to 4, then a restart that goes on at 3 as the same run."""
    for first, steps in ((0, range(5)), (3, range(3, 8))):
        tracker = make_tracker(name, TrackerSetting("gpt", RUN, folder, first))
        tracker.store_init_configuration({"width": 64, "schedule": "1f1b"})
        for step in steps:
            tracker.log({"loss": 1 / (step + 1) + first, "note": "word"}, step=step)
        artifact = folder / "report.html"
        artifact.write_text("<p>report")
        if hasattr(tracker, "log_artifact"):
            tracker.log_artifact(artifact)
        tracker.finish()


EXPECTED = [(0, 1.0), (1, 0.5), (2, 1 / 3), (3, 3 + 1 / 4), (4, 3 + 1 / 5), (5, 3 + 1 / 6), (6, 3 + 1 / 7),
            (7, 3 + 1 / 8)]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    two_starts("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == \
        [(step, pytest.approx(value, rel=1e-6)) for step, value in EXPECTED]
    assert any(tag.startswith("run/parameters") for tag in events.Tags()["tensors"])


def test_mlflow_on_sqlite(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    (tmp_path / "mlflow.db.begun").write_text("of a start that was killed while MLflow made its tables")
    two_starts("mlflow", tmp_path)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("gpt")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params == {"width": "64", "schedule": "1f1b"} and run.info.status == "FINISHED"
    last = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "loss")}
    assert sorted(last.items()) == EXPECTED
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["report.html"]


def test_comet_offline(tmp_path):
    pytest.importorskip("comet_ml")
    two_starts("comet_ml", tmp_path)
    keys, points = comet_offline(tmp_path / "comet", "loss")
    assert len(list((tmp_path / "comet").glob("*.zip"))) == 2
    assert keys == {RUN}
    assert sorted(points.items()) == EXPECTED


def test_weights_and_biases_offline(tmp_path):
    wandb = pytest.importorskip("wandb")
    two_starts("wandb", tmp_path)
    wandb.teardown()            # its own process writes the file, and may still be at it
    runs, rows = wandb_offline(tmp_path / "wandb")
    assert runs == [RUN, RUN]
    points = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert sorted(points.items()) == EXPECTED


def test_classes_of_accelerate_pass_unchanged(tmp_path):
    tracking = pytest.importorskip("accelerate.tracking")
    pytest.importorskip("tensorboard")
    from accelerate.state import PartialState
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    PartialState(cpu=True)
    tracker = make_tracker(tracking.TensorBoardTracker, TrackerSetting("gpt", RUN, tmp_path))
    tracker.store_init_configuration({"width": 64})
    tracker.log({"loss": 0.5}, step=3)
    tracker.finish()
    (event,) = EventAccumulator(str(tmp_path / "gpt")).Reload().Scalars("loss")
    assert (event.step, event.value) == (3, 0.5)
