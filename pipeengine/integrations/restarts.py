"""What makes a Trainer that was started again the same training: its trackers' experiments, and a signal that saves."""
from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from pipeengine.checkpoint import AGAIN, STOP, SignalWatch
from pipeengine.tracking import set_archives_aside

EXPERIMENTS = "experiments.json"


class SaveOnSignal(TrainerCallback):
    """After SIGTERM on any worker all save the same step and end the training; after SIGUSR1 they save and go on.

    Stands where ``enable_jit_checkpoint`` puts a callback that looks at its own process alone, and so would stop one
    worker in the middle of what the others do.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._watch: SignalWatch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the signals over that have their default."""
        self._watch = SignalWatch(self._trainer.pipe.holdings().workers.wishes)
        self._watch.watch()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Do what some worker asks for: the same on all of them, for it came with the agreement before the step."""
        workers = self._trainer.pipe.holdings().workers
        asked = workers.wishes.take(STOP | AGAIN, alone=workers.size == 1)
        control.should_save |= bool(asked)
        control.should_training_stop |= bool(asked & STOP)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the signals back."""
        if self._watch is not None:
            self._watch.release()


def save_together_on_signals(trainer: Any) -> None:
    """Put ``SaveOnSignal`` where the Trainer has made the callback of ``enable_jit_checkpoint``."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "JITCheckpointCallback":
            trainer.remove_callback(callback)
            before = getattr(callback.jit_manager, "_original_sigterm_handler", None)
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
            trainer.add_callback(SaveOnSignal(trainer))


# -- trackers ---------------------------------------------------------------------------------------------------------


def _mlflow(trainer: Any, callback: Any) -> dict[str, str]:
    run = sys.modules["mlflow"].active_run() if "mlflow" in sys.modules else None
    return {} if run is None else {"MLFLOW_RUN_ID": run.info.run_id}


def _wandb(trainer: Any, callback: Any) -> dict[str, str]:
    run = getattr(sys.modules.get("wandb"), "run", None)
    return {} if run is None else {"WANDB_RUN_ID": run.id, "WANDB_RESUME": "allow"}


def _comet(trainer: Any, callback: Any) -> dict[str, str]:
    experiment = sys.modules["comet_ml"].get_running_experiment() if "comet_ml" in sys.modules else None
    return {} if experiment is None else {"COMET_EXPERIMENT_KEY": experiment.get_key()}


def _tensorboard(trainer: Any, callback: Any) -> dict[str, str]:
    return {} if callback.logging_dir is None else \
        {"TENSORBOARD_LOGGING_DIR": os.path.relpath(callback.logging_dir, trainer.args.output_dir)}


# The Trainer's callbacks, and the variables by which the program of each goes on with an experiment that is there.
_VARIABLES: dict[str, Callable[[Any, Any], dict[str, str]]] = {
    "MLflowCallback": _mlflow, "WandbCallback": _wandb, "CometCallback": _comet, "TensorBoardCallback": _tensorboard}


def running_experiments(trainer: Any) -> dict[str, str]:
    """Variables that name the experiments which the callbacks of ``trainer`` report to now, in this process."""
    found: dict[str, str] = {}
    for callback in trainer.callback_handler.callbacks:
        for cls in type(callback).__mro__:
            found |= _VARIABLES.get(cls.__name__, lambda *_: {})(trainer, callback)
    return found


def save_experiments(trainer: Any, folder: Path) -> None:
    """Write beside a checkpoint what its trackers report to."""
    if trainer.args.should_save and (found := running_experiments(trainer)):
        (folder / EXPERIMENTS).write_text(json.dumps(found, indent=1) + "\n")


@contextlib.contextmanager
def continued_experiments(trainer: Any, checkpoint: str | None, environment: MutableMapping[str, str]
                          ) -> Iterator[None]:
    """Inside, the trackers go on with the experiments of ``checkpoint``, unless the script says others: the variables
    that they look for are in ``environment``."""
    path = None if checkpoint is None else Path(checkpoint) / EXPERIMENTS
    told = json.loads(path.read_text()) if path is not None and path.is_file() else {}
    running = running_experiments(trainer)
    own = {name: value for name, value in told.items() if name not in environment and name not in running}
    folder = own.pop("TENSORBOARD_LOGGING_DIR", None)
    if folder is not None and trainer.args.should_save:
        _continue_tensorboard(trainer, os.path.join(trainer.args.output_dir, folder), Path(str(checkpoint)))
    if "COMET_EXPERIMENT_KEY" in own and trainer.args.should_save:
        set_archives_aside(Path(environment.get("COMET_OFFLINE_DIRECTORY", ".cometml-runs")),
                           own["COMET_EXPERIMENT_KEY"])
    environment.update(own)
    try:
        yield
    finally:
        for name in own:
            environment.pop(name, None)


def _continue_tensorboard(trainer: Any, folder: str, checkpoint: Path) -> None:
    """Write into the folder of before; what it has of steps after the checkpoint does not count."""
    step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    for callback in trainer.callback_handler.callbacks:
        if hasattr(callback, "tb_writer") and callback.tb_writer is None:
            callback.logging_dir = folder
            callback.tb_writer = callback._SummaryWriter(log_dir=folder, purge_step=step + 1)
