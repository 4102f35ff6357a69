"""Four trackers; each is imported when it is started. What is not configured to go elsewhere stays in the run's
folder.

An experiment is found again by the run's id: Comet's key and the id of Weights & Biases are that id, MLflow's run has
it as the tag ``pipeengine.run``, TensorBoard's files lie in one folder.
"""
from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def _numbers(values: Mapping[str, object]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)}


class TensorBoard:
    """Event files in ``folder/tensorboard``; steps that are trained again replace those of the earlier start."""

    name, requires_logging_directory, replaces_steps = "tensorboard", True, True

    def __init__(self, run_name: str, run_id: str, folder: Path, first_step: int):
        self._folder, self._first_step = folder / "tensorboard", first_step
        self.tracker: Any = None

    def start(self) -> None:
        """Open a file of events."""
        from torch.utils.tensorboard import SummaryWriter
        self.tracker = SummaryWriter(str(self._folder), purge_step=self._first_step or None, flush_secs=10)

    def store_init_configuration(self, values: dict) -> None:
        """As a table of Markdown under "run/parameters"."""
        rows = "\n".join(f"| {name} | {value} |" for name, value in values.items())
        self.tracker.add_text("run/parameters", f"| name | value |\n|---|---|\n{rows}", self._first_step)
        self.tracker.flush()

    def log(self, values: dict, step: int | None, **kwargs: Any) -> None:
        """Numbers as scalars, texts as texts."""
        numbers = _numbers(values)
        for name, value in values.items():
            if name in numbers:
                self.tracker.add_scalar(name, numbers[name], step)
            else:
                self.tracker.add_text(name, str(value), step)
        self.tracker.flush()

    def finish(self) -> None:
        """Close the file."""
        self.tracker.close()


class MLflow:
    """A run of the experiment ``run_name``, where MLflow is told to write, else in ``folder/mlflow.db`` (sqlite)."""

    name, requires_logging_directory = "mlflow", False

    def __init__(self, run_name: str, run_id: str, folder: Path, first_step: int):
        self._run_name, self._run_id, self._folder = run_name, run_id, folder
        self.tracker: Any = None
        self._mlflow_id = ""
        self._waiting: tuple[list, list] = ([], [])
        self._sent = 0.0

    def start(self) -> None:
        """Find the run of this id, or begin one."""
        import mlflow
        own = not mlflow.is_tracking_uri_set()
        self.tracker = mlflow.MlflowClient(self._store(mlflow) if own else None)
        experiment = self.tracker.get_experiment_by_name(self._run_name)
        number = experiment.experiment_id if experiment else self.tracker.create_experiment(
            self._run_name, (self._folder / "mlflow-artifacts").absolute().as_uri() if own else None)
        runs = self.tracker.search_runs([number], f"tags.`pipeengine.run` = '{self._run_id}'")
        run = runs[0] if runs else self.tracker.create_run(number, run_name=self._run_name,
                                                           tags={"pipeengine.run": self._run_id})
        self._mlflow_id = run.info.run_id
        self.tracker.update_run(self._mlflow_id, "RUNNING")

    def _store(self, mlflow: Any) -> str:
        """The address of the folder's database. MLflow makes it in seconds of steps that cannot be taken up again, so
        a kill in the middle must leave none."""
        database, begun = self._folder / "mlflow.db", self._folder / "mlflow.db.begun"
        if not database.exists():
            begun.unlink(missing_ok=True)
            mlflow.MlflowClient(f"sqlite:///{begun}")
            os.replace(begun, database)
        return f"sqlite:///{database}"

    def store_init_configuration(self, values: dict) -> None:
        """As parameters; one that another start has written stays as it was."""
        from mlflow.entities import Param
        known = self.tracker.get_run(self._mlflow_id).data.params
        new = [Param(name, str(value)[:6000]) for name, value in values.items() if name not in known]
        for first in range(0, len(new), 100):
            self.tracker.log_batch(self._mlflow_id, params=new[first:first + 100])

    def log(self, values: dict, step: int | None, **kwargs: Any) -> None:
        """Numbers as metrics, texts as tags; written together about every two seconds, as each write is slow."""
        from mlflow.entities import Metric, RunTag
        numbers, now = _numbers(values), int(time.time() * 1000)
        metrics, tags = self._waiting
        metrics += [Metric(name, value, now, step or 0) for name, value in numbers.items()]
        tags += [RunTag(name, str(value)) for name, value in values.items() if name not in numbers]
        if len(metrics) > 500 or len(tags) > 50 or time.monotonic() - self._sent > 2:
            self._flush()

    def _flush(self) -> None:
        (metrics, tags), self._waiting = self._waiting, ([], [])
        last_tags = list({tag.key: tag for tag in tags}.values())
        for first in range(0, max(len(metrics), 1), 800):
            self.tracker.log_batch(self._mlflow_id, metrics=metrics[first:first + 800],
                                   tags=last_tags if first == 0 else [])
        self._sent = time.monotonic()

    def log_artifact(self, path: Path) -> None:
        """Copy a file to the run."""
        self.tracker.log_artifact(self._mlflow_id, str(path))

    def finish(self) -> None:
        """Write what waits and mark the run as finished."""
        self._flush()
        self.tracker.set_terminated(self._mlflow_id)


class Comet:
    """An experiment of Comet; without an API key an archive in ``folder/comet``, which ``comet upload`` sends."""

    name, requires_logging_directory = "comet_ml", False

    def __init__(self, run_name: str, run_id: str, folder: Path, first_step: int):
        self._run_name, self._run_id, self._folder = run_name, run_id, folder / "comet"
        self.tracker: Any = None

    def start(self) -> None:
        """Begin the experiment of this key, or go on with it."""
        import comet_ml
        self._folder.mkdir(parents=True, exist_ok=True)
        online = bool(comet_ml.get_config("comet.api_key"))
        settings = comet_ml.ExperimentConfig(
            name=self._run_name, offline_directory=str(self._folder), display_summary_level=0, parse_args=False,
            auto_output_logging=False, auto_histogram_weight_logging=False, auto_metric_logging=False,
            auto_param_logging=False)
        # Without a connection nobody can say whether the key is there: a later start adds to it.
        begun = any(self._folder.iterdir())
        set_archives_aside(self._folder, self._run_id)
        self.tracker = comet_ml.start(experiment_key=self._run_id, online=online, experiment_config=settings,
                                      mode="get_or_create" if online else "get" if begun else "create")

    def store_init_configuration(self, values: dict) -> None:
        """As parameters."""
        self.tracker.log_parameters(values)

    def log(self, values: dict, step: int | None, **kwargs: Any) -> None:
        """Numbers as metrics, texts as "other"."""
        numbers = _numbers(values)
        self.tracker.log_metrics(numbers, step=step)
        for name in values.keys() - numbers:
            self.tracker.log_other(name, values[name])

    def log_artifact(self, path: Path) -> None:
        """As an asset of the experiment."""
        self.tracker.log_asset(str(path), file_name=path.name, overwrite=True)

    def finish(self) -> None:
        """End the experiment and write or send what is left."""
        self.tracker.end()


def set_archives_aside(folder: Path, key: str) -> None:
    """Rename what earlier starts have left of the experiment ``key``, by the time of writing: Comet draws a part of an
    archive's name from Python's random numbers, which a training seeds, so a later start would write over it."""
    for archive in folder.glob(f"{key}*.zip"):
        written = str(archive.stat().st_mtime_ns)
        if not archive.stem.endswith(written):
            archive.rename(archive.with_name(f"{archive.stem}-{written}.zip"))


class WandB:
    """A run of Weights & Biases; without an API key offline in ``folder/wandb``, which ``wandb sync`` sends.

    Values are drawn over the key "step": the tracker's own step cannot go back, as it does after a restart.
    """

    name, requires_logging_directory = "wandb", False

    def __init__(self, run_name: str, run_id: str, folder: Path, first_step: int):
        self._run_name, self._run_id, self._folder = run_name, run_id, folder
        self.tracker: Any = None

    def start(self) -> None:
        """Begin the run of this id, or go on with it."""
        import wandb
        self._folder.mkdir(parents=True, exist_ok=True)
        online = wandb.login(prompt=False)          # whether there is a key
        self.tracker = wandb.init(project=self._run_name, name=self._run_name, id=self._run_id, resume="allow",
                                  dir=str(self._folder), mode="online" if online else "offline",
                                  settings=wandb.Settings(silent=True, console="off"))
        self.tracker.define_metric("step")
        self.tracker.define_metric("*", step_metric="step")

    def store_init_configuration(self, values: dict) -> None:
        """As the run's config."""
        self.tracker.config.update(values, allow_val_change=True)

    def log(self, values: dict, step: int | None, **kwargs: Any) -> None:
        """Values and their step as one row."""
        self.tracker.log({**values, "step": step})

    def log_artifact(self, path: Path) -> None:
        """Copy a file to the run's files."""
        self.tracker.save(str(path), base_path=str(path.parent), policy="now")

    def finish(self) -> None:
        """End the run."""
        self.tracker.finish()
