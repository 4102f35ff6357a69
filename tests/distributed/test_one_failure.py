"""How one failure becomes everybody's: types decide, not texts."""
import pickle

import pytest
import torch

from pipeengine.distributed import SingleProcess, connect
from pipeengine.distributed.failure import ConnectionLost, Description, headline, start
from pipeengine.distributed.waiting import Waiter
from pipeengine.errors import InputError, PlanError, WorkerError


class Work:
    """A message on its way; ``broken`` says what it ends with."""

    def __init__(self, broken: Exception | None = None, done: bool = False):
        self.broken, self.done = broken, done

    def is_completed(self) -> bool:
        return self.done

    def wait(self) -> None:
        if self.broken is not None:
            raise self.broken


@pytest.mark.parametrize("done", [False, True])
def test_broken_work_is_a_lost_connection(done):
    """Whatever text gloo, NCCL or a timeout gives; also when the work had ended before anybody waited."""
    waiter = Waiter()
    with pytest.raises(ConnectionLost, match="any words"):
        waiter.wait(Work(), Work(RuntimeError("any words"), done), Work())
    waiter.wait(Work(), Work(done=True))
    waiter.close()


def test_a_wait_ends_when_another_worker_has_failed():
    import threading
    stop = WorkerError("worker 1 failed")
    release = threading.Event()

    class Forever(Work):
        def wait(self) -> None:
            release.wait(20)
    waiter = Waiter(lambda: stop, interval_seconds=0.01)
    with pytest.raises(WorkerError, match="worker 1 failed"):
        waiter.wait(Forever())
    release.set()
    waiter.close()


def test_starting_on_a_broken_group_is_a_lost_connection():
    def refuse():
        raise RuntimeError("Broken pipe")
    with pytest.raises(ConnectionLost, match="Broken pipe"):
        start(refuse)
    assert start(lambda value: value, 3) == 3
    with pytest.raises(TypeError):
        start(lambda: None, "too many")


@pytest.mark.parametrize(
    "error", [AssertionError(), KeyboardInterrupt(), MemoryError(), ValueError("a\nb"), ValueError("\n")]
)
def test_every_error_has_a_headline(error):
    """A bare assert, Ctrl-C or MemoryError() in a stage became ``IndexError: list index out of range``."""
    line = headline(error)
    assert line and "\n" not in line and line in (str(error).splitlines()[:1] or [""])[0] + type(error).__name__


@pytest.mark.parametrize("error, expected", [(InputError("bad rows"), InputError), (PlanError("no plan"), PlanError),
                                             (ValueError("of the user's"), WorkerError)])
def test_errors_travel_as_text(error, expected):
    """Ours keep their type; others become a WorkerError with the culprit, the text and its traceback."""
    told = Description.of(error)
    assert all(type(part) is str for part in told) and pickle.loads(pickle.dumps(tuple(told))) == tuple(told)
    again = Description(*told).error(2)
    assert type(again) is expected and "worker 2" in str(again) and str(error) in str(again)


def test_one_process_is_its_own_peer():
    workers = connect(None, torch.device("cpu"), launched=False)
    assert isinstance(workers, SingleProcess) and (workers.rank, workers.size, workers.published()) == (0, 1, {})
    value = torch.ones(3)
    assert workers.broadcast(value, 0) is value and workers.send_to_first(value, 0) is value
    assert workers.all_gather_object("x") == ["x"] and workers.run_synchronized(lambda: 5) == 5
    with pytest.raises(InputError, match="no"):
        workers.agree((1,), InputError("no"), ("calls",))
    workers.publish("text")
    assert workers.published() == {0: "text"}
