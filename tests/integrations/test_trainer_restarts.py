"""A Trainer over two workers that was killed, or told to end, goes on bit for bit, in the same experiments."""
import importlib.util
import os
import signal
import time
from pathlib import Path

import numpy
import pytest
from workers import Workers, launch

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
from test_huggingface import PIPELINE, as_torchrun, outcome, trainer_of  # noqa: E402
from tracker_files import comet_offline, wandb_offline  # noqa: E402
from transformers import TrainerCallback, TrainerControl, TrainerState  # noqa: E402

from pipeengine.distributed import Wishes  # noqa: E402
from pipeengine.integrations.huggingface import PipelineTrainer, newest_whole  # noqa: E402
from pipeengine.integrations.restarts import SaveOnSignal, continued_experiments, save_experiments  # noqa: E402

STEPS = 8


class Interrupted(TrainerCallback):
    """At a step dies without a word, or waits for a signal to any worker."""

    def __init__(self, report, rank, die_at, wait_at):
        self.report, self.rank, self.die_at, self.wait_at = report, rank, die_at, wait_at

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.die_at and self.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if state.global_step == self.wait_at:
            self.report("waits")
            deadline = time.monotonic() + 60
            while not args.asked() and self.rank == 1 and time.monotonic() < deadline:
                time.sleep(0.01)


TRACKERS = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb", "comet_ml": "comet_ml"}


def trackers() -> list[str]:
    """Those that are installed, by the Trainer's names."""
    return [name for name, module in TRACKERS.items() if importlib.util.find_spec(module)]


def train(report, folder: str, die_at=None, wait_at=None, resume=False):
    as_torchrun(report)
    rank = int(os.environ["RANK"])
    os.environ.update(MLFLOW_TRACKING_URI=f"sqlite:///{folder}/mlflow.db", WANDB_MODE="offline", WANDB_SILENT="true",
                      WANDB_DIR=folder, COMET_START_ONLINE="0", COMET_OFFLINE_DIRECTORY=f"{folder}/comet",
                      COMET_DISABLE_AUTO_LOGGING="1")       # which would report what MLflow is told, too
    Path(folder, "comet").mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    trainer = trainer_of(PipelineTrainer, "tied llama", f"{folder}/out", pipeline=PIPELINE, arguments=dict(
        max_steps=STEPS, save_strategy="steps", save_steps=3, eval_strategy="no", report_to=trackers(),
        enable_jit_checkpoint=True))
    trainer.args.asked = lambda: trainer.pipe.holdings().workers.wishes.own()
    trainer.add_callback(Interrupted(report, rank, die_at, wait_at))
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        report("saved", sorted(path.name for path in Path(folder, "out").glob("checkpoint-*")))
    report("outcome", outcome(trainer))
    report("last step", trainer.state.global_step)
    trainer.pipe.close()


def assert_same_training(reports, whole) -> None:
    ours, expected = reports[0]["outcome"], whole[0]["outcome"]
    assert len(expected["losses"]) == STEPS
    for key in ("losses", "norms", "rates"):
        assert ours[key] == expected[key], key
    for name, weight in expected["weights"].items():
        assert numpy.array_equal(ours["weights"][name], weight), name


def assert_one_experiment(folder: Path, losses: list[tuple[float]]) -> None:
    """Each tracker has one run, and in it every step once as the Trainer tells it."""
    if "tensorboard" in trackers():
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        run, = (folder / "out" / "runs").iterdir()
        events = EventAccumulator(str(run))
        events.Reload()
        told = [(event.step, event.value) for event in events.Scalars("train/loss")]
        assert [step for step, _ in told] == list(range(1, STEPS + 1))
        numpy.testing.assert_allclose([value for _, value in told], [loss for loss, in losses], rtol=1e-6)
    if "mlflow" in trackers():
        import mlflow
        client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
        run, = client.search_runs([e.experiment_id for e in client.search_experiments()])
        history = client.get_metric_history(run.info.run_id, "loss")
        assert {(each.step, each.value) for each in history} == {
            (step, loss) for step, (loss,) in enumerate(losses, 1)}
        assert run.info.status == "FINISHED"
    if "wandb" in trackers():
        runs, rows = wandb_offline(folder / "wandb")
        points = {row["train/global_step"]: row["train/loss"] for row in rows if "train/loss" in row}
        assert len(set(runs)) == 1 and len(runs) == 2
        assert sorted(points.items()) == [(step, loss) for step, (loss,) in enumerate(losses, 1)]
    if "comet_ml" in trackers():
        keys, found = comet_offline(folder / "comet", "train/loss")
        assert len(keys) == 1
        assert sorted(found.items()) == [(step, loss) for step, (loss,) in enumerate(losses, 1)]


@pytest.mark.slow
def test_killed_or_told_to_end_it_goes_on(tmp_path):
    """kill -9 of one worker after step 5, SIGTERM to one worker after step 4: step 3's checkpoint, and step 5's."""
    whole = launch(2, train, str(tmp_path / "whole"))
    killed = Workers(2, train, str(tmp_path / "killed"), 5)
    reports = killed.join()
    assert killed.exit_codes[1] == -signal.SIGKILL and killed.exit_codes[0] not in (0, None)
    assert reports[0]["saved"] == ["checkpoint-3"]
    assert "WorkerError: worker 1 " in killed.workers[0].error, killed.account()
    again = launch(2, train, str(tmp_path / "killed"), None, None, True)
    assert_same_training(again, whole)
    assert_one_experiment(tmp_path / "killed", again[0]["outcome"]["losses"])

    told = Workers(2, train, str(tmp_path / "told"), None, 4)
    told.wait_for("waits")
    told.signal(1, signal.SIGTERM)
    reports = told.join()
    assert told.exit_codes == [0, 0], told.account()
    assert [report["last step"] for report in reports] == [5, 5], "both end after the same step"
    assert reports[0]["saved"] == ["checkpoint-3", "checkpoint-5"]
    again = launch(2, train, str(tmp_path / "told"), None, None, True)
    assert_same_training(again, whole)
    assert_one_experiment(tmp_path / "told", again[0]["outcome"]["losses"])


def fall_asleep(report, folder: str, sleeps: str) -> None:
    """Worker 1 of two replicas falls asleep where the Trainer gathers losses for metrics, or before an epoch."""
    as_torchrun(report)
    os.environ["PIPEENGINE_GUARD"] = "outside=2"
    arguments = dict(max_steps=40, eval_strategy="steps", eval_steps=9, per_device_train_batch_size=3)
    trainer = trainer_of(PipelineTrainer, "classifier", folder, pipeline=PIPELINE | dict(num_replicas=2),
                         arguments=arguments)

    def sleep(*_, **__):
        if trainer.state.global_step > 8 and os.environ["RANK"] == "1":
            report("asleep")
            time.sleep(600)
    if sleeps == "gather":
        gather = trainer.gather_function
        trainer.accelerator.gather_for_metrics = lambda *args, **more: (sleep(), gather(*args, **more))[1]
        trainer.gather_function = trainer.accelerator.gather_for_metrics
    else:
        trainer.add_callback(type("Sleeper", (TrainerCallback,), dict(on_epoch_begin=sleep))())
        trainer.args.eval_strategy = "no"
    trainer.train()


@pytest.mark.slow
@pytest.mark.parametrize("sleeps", ("gather", "epoch"))
def test_a_worker_that_sleeps_in_the_trainer_is_named(sleeps, tmp_path):
    """What the others wait in is accelerate's own: it waited half an hour, for nobody by name."""
    running = Workers(2, fall_asleep, str(tmp_path), sleeps)
    running.wait_for_one(1, "asleep")
    begin = time.monotonic()
    while running.exit_codes[0] is None and time.monotonic() < begin + 60:
        time.sleep(0.1)
    running.signal(1, signal.SIGKILL)
    running.join()
    assert running.exit_codes[0] == 1
    assert "WorkerError: worker 1 has made no progress for " in running.workers[0].error, running.account()
    assert "outside of any call of the pipeline, while worker 0 waits in " in running.workers[0].error


# -- without workers --------------------------------------------------------------------------------------------------


class Anything:
    """An object with these attributes."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


class TensorBoardCallback:
    """As the Trainer's: a folder, and a writer that is made when training begins."""
    logging_dir = tb_writer = None

    def _SummaryWriter(self, **setting):
        return setting


def trainer_with(callback, folder) -> Anything:
    return Anything(args=Anything(output_dir=str(folder), should_save=True),
                    callback_handler=Anything(callbacks=[callback]))


def test_an_experiment_goes_on_in_its_folder(tmp_path):
    """The folder is told relative to the output, which may be moved; what the script says itself counts."""
    checkpoint = tmp_path / "out" / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 4}')
    before = TensorBoardCallback()
    before.logging_dir = str(tmp_path / "out" / "runs" / "monday")
    save_experiments(trainer_with(before, tmp_path / "out"), checkpoint)
    (tmp_path / "out").rename(tmp_path / "moved")
    after, own = TensorBoardCallback(), TensorBoardCallback()
    own.logging_dir = "elsewhere"
    for callback in (after, own):
        environment: dict[str, str] = {}
        with continued_experiments(trainer_with(callback, tmp_path / "moved"), str(tmp_path / "moved/checkpoint-4"),
                                   environment):
            assert not environment
    assert after.tb_writer == dict(log_dir=str(tmp_path / "moved" / "runs" / "monday"), purge_step=5)
    assert own.tb_writer is None and own.logging_dir == "elsewhere"


def test_variables_of_an_experiment_are_there_while_it_trains(tmp_path):
    """Those of the script stay as they are; the others are gone afterwards, whatever happened."""
    (tmp_path / "experiments.json").write_text('{"MLFLOW_RUN_ID": "a1", "WANDB_RUN_ID": "b2", "WANDB_RESUME": "allow"}')
    environment = {"WANDB_RUN_ID": "mine"}
    trainer = trainer_with(Anything(), tmp_path)
    with pytest.raises(KeyError), continued_experiments(trainer, str(tmp_path), environment):
        assert environment == {"MLFLOW_RUN_ID": "a1", "WANDB_RUN_ID": "mine", "WANDB_RESUME": "allow"}
        raise KeyError
    assert environment == {"WANDB_RUN_ID": "mine"}
    with continued_experiments(trainer, None, environment):
        assert environment == {"WANDB_RUN_ID": "mine"}


def test_archives_of_comet_are_not_written_over(tmp_path):
    """A seeded training draws the same name at each start, and Comet takes it."""
    (tmp_path / "experiments.json").write_text('{"COMET_EXPERIMENT_KEY": "k1"}')
    offline = tmp_path / "offline"
    offline.mkdir()
    for start in range(3):
        environment = {"COMET_OFFLINE_DIRECTORY": str(offline)}
        with continued_experiments(trainer_with(Anything(), tmp_path), str(tmp_path), environment):
            (offline / "k1-drawn.zip").write_text(str(start))
    (offline / "k2-drawn.zip").write_text("another experiment")
    assert sorted(archive.read_text() for archive in offline.glob("k1*.zip")) == ["0", "1", "2"]
    assert (offline / "k2-drawn.zip").exists()


@pytest.mark.parametrize("number, ends", ((signal.SIGTERM, True), (signal.SIGUSR1, False)))
def test_a_signal_saves_after_the_step(number, ends):
    wishes, state = Wishes(), TrainerState()
    workers = Anything(size=1, wishes=wishes)
    callback = SaveOnSignal(Anything(pipe=Anything(holdings=lambda: Anything(workers=workers))))
    before = signal.getsignal(number)
    signal.signal(number, signal.SIG_DFL)
    try:
        callback.on_train_begin(None, state, TrainerControl())
        os.kill(os.getpid(), number)
        for expected in ((True, ends), (False, False)):
            control = TrainerControl()
            callback.on_step_end(None, state, control)
            assert (control.should_save, control.should_training_stop) == expected
        callback.on_train_end(None, state, TrainerControl())
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_torn_state_is_passed_over(tmp_path):
    """A Trainer writes trainer_state.json where it stays: killed while it does, half of it is there."""
    for number, text in ((3, '{"global_step": 3}'), (6, '{"global_st'), (9, "")):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text(text)
    assert newest_whole(tmp_path) == str(tmp_path / "checkpoint-3")
