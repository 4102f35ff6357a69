"""A tracker that raises, hangs, dies or is not there: told once, and nobody waits for it."""
import re
import threading
import time

import pytest

from pipeengine import InputError
from pipeengine.tracking import Teller, TrackerSetting, make_tracker
from pipeengine.tracking.trackers import name_of


class Notebook:
    """A tracker that remembers."""
    name, requires_logging_directory = "notebook", False

    def __init__(self):
        self.calls = []

    @property
    def tracker(self):
        return self.calls

    def start(self):
        self.calls.append("start")

    def store_init_configuration(self, values):
        self.calls.append(("config", values))

    def log(self, values, step=None, **kwargs):
        self.calls.append((step, values))

    def finish(self):
        self.calls.append("finish")


class Raising(Notebook):
    def log(self, values, step=None, **kwargs):
        super().log(values, step)
        raise ConnectionError(f"no route\nto host, step {step}")


class Dying(Notebook):
    def log(self, values, step=None, **kwargs):
        raise SystemExit(3)


class Hanging(Notebook):
    def __init__(self):
        super().__init__()
        self.free = threading.Event()

    def log(self, values, step=None, **kwargs):
        self.free.wait()


def tell(tracker, steps=100, *, make=None, capacity=10_000, patience=5.0):
    """What was said, whether all was told, and the longest ``tell`` in seconds."""
    said, longest = [], 0.0
    teller = Teller("t", make or (lambda: tracker), capacity=capacity, say=said.append)
    for step in range(steps):
        begin = time.perf_counter()
        teller.tell("log a step", lambda t, step=step: t.log({"loss": 1.0}, step=step))
        longest = max(longest, time.perf_counter() - begin)
    return said, teller.close(patience), longest


def test_everything_is_told_in_order():
    tracker = Notebook()
    assert tell(tracker)[:2] == ([], True)
    assert tracker.calls == [(step, {"loss": 1.0}) for step in range(100)]


@pytest.mark.parametrize("kind", (Raising, Dying))
def test_a_tracker_that_raises_is_told_of_once_and_gets_the_rest(kind):
    tracker = kind()
    said, all_told, _ = tell(tracker)
    assert len(said) == 1 and not all_told
    assert said[0].startswith("tracker t failed to log a step: ") and "\n" not in said[0]
    assert kind is Dying or len(tracker.calls) == 100


def test_a_tracker_that_hangs_is_left_behind():
    tracker = Hanging()
    said, all_told, _ = tell(tracker, patience=0.2)
    assert not all_told and len(said) == 1 and "99 calls left" in said[0]
    tracker.free.set()


def test_the_queue_has_an_end():
    tracker = Hanging()
    said, all_told, _ = tell(tracker, 1000, capacity=10, patience=0.2)
    assert not all_told and [re.sub(r"0\.[23]\d*", "0.2", line.split(" with ")[0].split(":")[0]) for line in said] == [
        "tracker t is 10 calls behind", "tracker t is not done after 0.2 s"]
    tracker.free.set()


def test_a_tracker_that_cannot_be_made_is_given_up():
    def missing():
        raise ImportError("No module named 'wandb'")
    said, all_told, _ = tell(None, make=missing)
    assert said == ["tracker t cannot be used: ImportError: No module named 'wandb'; metrics.jsonl has everything"]
    assert not all_told


def test_names_classes_and_objects_are_trackers(tmp_path):
    setting = TrackerSetting("gpt", "0" * 32, tmp_path)

    class WithFolder(Notebook):
        requires_logging_directory = True

        def __init__(self, run_name, logging_dir=None):
            super().__init__()
            self.calls.append((run_name, logging_dir))

    class WithName(Notebook):
        def __init__(self, run_name):
            super().__init__()
            self.calls.append(run_name)

    assert make_tracker(WithFolder, setting).calls == [("gpt", str(tmp_path)), "start"]
    assert make_tracker(WithName, setting).calls == ["gpt", "start"]
    assert make_tracker(own := Notebook(), setting) is own
    assert [name_of(given) for given in ("comet", "wandb", own, WithName)] == \
        ["comet_ml", "wandb", "notebook", "notebook"]


@pytest.mark.parametrize("given, told", (("weights", "no tracker 'weights'; give one of tensorboard, comet_ml"),
                                         (3, "has no store_init_configuration and no log"),
                                         (object, "has no store_init_configuration and no log")))
def test_what_is_no_tracker_is_refused(given, told):
    with pytest.raises(InputError, match=told):
        name_of(given)
