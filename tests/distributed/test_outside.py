"""Collectives of a script's own, under the guard: one that a worker never joins ends with its name, not in a hang."""
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
import zoo
from workers import Workers

import pipeengine as pe
from pipeengine.distributed import guarded_collectives
from pipeengine.distributed.failure import ConnectionLost
from pipeengine.distributed.outside import leave_outside, wait_guarded, watch_outside
from pipeengine.distributed.waiting import Waiter

BATCH = zoo.regression()[0]


def meet(report, ending: str) -> None:
    """Collectives of all kinds, then one in which worker 1 sleeps, dies or has an error of its own."""
    os.environ["PIPEENGINE_GUARD"] = "outside=1.5"
    torch.manual_seed(0)
    pipe = pe.Pipeline(zoo.AWKWARD["LongSkips"].build(), BATCH, num_microbatches=2, costs="analytic", check=False)
    for _ in range(7):
        pipe.step(**BATCH)
    before = dist.all_gather
    with guarded_collectives():
        with torch.inference_mode():
            parts = [torch.zeros(1), torch.zeros(1)]
            dist.all_gather(parts, torch.tensor([float(pipe.rank)]))
        values = [None, None]
        dist.all_gather_object(values, {"rank": pipe.rank})
        total = torch.ones(2)
        dist.all_reduce(total, async_op=True).wait()
        report("told", (torch.cat(parts).tolist(), [value["rank"] for value in values], total.tolist()))
        if pipe.rank == 1:
            if ending == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        try:
            dist.barrier()
        except pe.WorkerError as error:
            report("raised", str(error))
    assert dist.all_gather is before
    raise SystemExit(3)


@pytest.mark.parametrize("ending, words", (
    ("kill", "worker 1 was killed by SIGKILL"),
    ("sleep", "worker 1 has made no progress for .* outside of any call of the pipeline, while worker 0 waits in "
              "barrier")))
def test_a_worker_that_never_comes_is_named(ending, words):
    running = Workers(2, meet, ending)
    running.wait_for_one(0, "raised")
    if ending == "sleep":
        running.signal(1, signal.SIGKILL)
    reports = running.join()
    pytest.raises(pe.WorkerError, _raise, reports[0]["raised"]).match(words)
    assert reports[0]["told"] == ([0.0, 1.0], [0, 1], [2.0, 2.0])
    assert running.exit_codes[0] == 3, "its process ends though the collective does not"


def _raise(text: str) -> None:
    raise pe.WorkerError(text)


# -- without workers --------------------------------------------------------------------------------------------------

class Alone:
    """Workers whose guard knows nothing; ``failed`` is what they were told."""

    def __init__(self):
        from pipeengine.distributed import Unwatched
        self.waiter, self.activity, self.failed = Waiter(), Unwatched(), []

    def fail(self, error, where):
        self.failed.append((error, where))
        return pe.WorkerError("told")


@pytest.fixture
def alone():
    workers = Alone()
    watch_outside(workers)
    yield workers
    leave_outside(workers)
    workers.waiter.close()


def test_errors_of_the_call_itself_stay_what_they_are(alone):
    with pytest.raises(ZeroDivisionError):
        wait_guarded("gather", lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="shape"):
        wait_guarded("gather", lambda: torch.ones(2).view(3))
    assert alone.failed == []
    assert wait_guarded("gather", lambda: 5) == 5


def test_modes_of_the_thread_hold_where_it_waits(alone):
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            expected = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
            assert wait_guarded("gather", lambda: (torch.is_inference_mode_enabled(), torch.is_grad_enabled())) == \
                expected


def test_a_connection_that_broke_is_told_to_the_guard(alone):
    def broken():
        raise ConnectionLost("reset by peer")
    with pytest.raises(pe.WorkerError, match="^told$"):
        wait_guarded("reduce", broken)
    (error, where), = alone.failed
    assert isinstance(error, ConnectionLost) and where == "in reduce, outside of the pipeline"


def test_nobody_watches_where_there_are_no_workers():
    assert wait_guarded("gather", lambda: 5) == 5
