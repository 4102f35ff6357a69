"""Whatever happens to one worker, the others raise soon and name it; what only looks like a fault is left alone."""
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import zoo
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from workers import Workers

import pipeengine as pe
from pipeengine.distributed import GuardSettings, guard_watch
from pipeengine.distributed.activity import Activity
from pipeengine.distributed.faults import Fault, inject
from pipeengine.distributed.guard_judge import Judge
from pipeengine.distributed.guard_process import write_cause
from pipeengine.distributed.guard_watch import Patience, Watch
from pipeengine.distributed.waiting import give_up
from pipeengine.errors import InputError

NUM_WORKERS, LIMIT = 3, 120
BATCH = zoo.regression()[0]


def pipeline(**options) -> pe.Pipeline:
    torch.manual_seed(0)
    model = zoo.AWKWARD["LongSkips"].build()
    return pe.Pipeline(model, BATCH, **dict(num_microbatches=4, schedule="1f1b", costs="analytic") | options)


# ------------------------------------------------------------------------------------------------ a fault in a step

def faulty(report, fault: Fault, folder: str = "") -> None:
    """Steps until the fault has had its effect; tells when it happened, and what this worker raised and when."""
    if folder:
        os.environ["TORCHELASTIC_ERROR_FILE"] = f"{folder}/{torch.distributed.get_rank()}"
    pipe = pipeline()
    inject(pipe._workers.activity, pipe.rank, fault, lambda: report("fault", time.monotonic()))
    report("files", len(os.listdir("/proc/self/fd")))
    for _ in range(12):
        try:
            pipe.step(**BATCH)
        except pe.WorkerError as error:
            report("raised", (time.monotonic(), str(error)))
            raise SystemExit(3) from None
    pipe.close()
    report("done", True)


KILLS = {
    "kill worker 0": (Fault("kill", 0, 4, 5), "worker 0 was killed by SIGKILL"),
    "kill worker 2": (Fault("kill", 2, 4, 9), "worker 2 was killed by SIGKILL"),
    "exit": (Fault("exit", 1, 3, 2), "worker 1 died with exit code 7"),
    "abort": (Fault("abort", 0, 3, 0), "worker 0 was killed by SIGABRT"),
    "raise": (Fault("raise", 1, 4, 7), "worker 1 failed in step 4"),
    "stop": (Fault("stop", 1, 8, 6), "worker 1 is frozen (stopped by a signal) in step 8, stage 1"),
    "stop worker 0": (Fault("stop", 0, 8, 6), "worker 0 is frozen (stopped by a signal) in step 8, stage 0"),
    "stall": (Fault("sleep", 2, 9, 3), "worker 2 has made no progress for"),
}


# Another worker's turn at what is tried above.
AGAIN = ("kill worker 2", "stop worker 0")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in AGAIN)) for name in KILLS])
def test_the_others_raise_and_name_the_culprit(name, tmp_path):
    """Nobody but the culprit has a file for torchrun, whose summary blamed survivors that had ended first."""
    fault, words = KILLS[name]
    running = Workers(NUM_WORKERS, faulty, fault, str(tmp_path), limit=LIMIT)
    for rank in set(range(NUM_WORKERS)) - {fault.worker}:
        running.wait_for_one(rank, "raised")
    if fault.kind == "sleep":           # it lives, but sleeps for an hour: whoever started it ends it
        running.signal(fault.worker, signal.SIGKILL)
    reports = running.join()
    for rank in set(range(NUM_WORKERS)) - {fault.worker}:
        when, text = reports[rank]["raised"]
        assert words in text, text
        assert "step" in text and "micro-batch" in text, text
        # Seconds, generous so that a loaded machine does not fail: benchmarks/faults.py measures.
        assert when - reports[fault.worker]["fault"] < 30
    assert running.exit_codes[fault.worker] not in (0, None), "a frozen worker has been killed"
    if fault.kind != "sleep":           # without torchrun it is left to its user
        assert [path.name for path in tmp_path.iterdir()] == [str(fault.worker)]
        failure = ProcessFailure(fault.worker, 1, 1, str(tmp_path / str(fault.worker)))
        assert words in failure.message["message"] and failure.timestamp < time.time() - 1, failure


def test_a_long_call_that_holds_the_interpreter_is_no_fault():
    """Nor is a short stop: the guard's own process goes on, and sees that the worker computes or comes back."""
    running = Workers(NUM_WORKERS, faulty, Fault("hold", 1, 9, 4, seconds=5.0), limit=LIMIT)
    reports = running.join()
    assert all(report.get("done") for report in reports), running.account()


def test_a_stop_that_ends_in_time_is_no_fault():
    running = Workers(NUM_WORKERS, faulty, Fault("stop", 1, 9, 4), limit=LIMIT)
    running.wait_for_one(1, "fault")
    time.sleep(0.5)
    running.signal(1, signal.SIGCONT)
    assert all(report.get("done") for report in running.join()), running.account()


# -------------------------------------------------------------------------------------------------- ends and leaks

def children() -> list[str]:
    """Processes that this one has started and not yet seen end."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        found += (task / "children").read_text().split()
    return [child for child in found if "guard_process" in Path(f"/proc/{child}/cmdline").read_text()]


def many_pipelines(report) -> None:
    def look() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    for closes in (True, True, False, False, False):
        pipe = pipeline()
        pipe.step(**BATCH)
        if closes:
            pipe.close()
        del pipe
        import gc
        gc.collect()
        report(f"looks {closes}", look())
    deadline = time.monotonic() + 30
    while children() and time.monotonic() < deadline:
        time.sleep(0.05)
    report("children", children())


def test_nothing_is_left_behind():
    """Files, threads and processes after a close; the guard's process also where a pipe was only let go."""
    for report in Workers(2, many_pipelines, limit=LIMIT).join():
        assert report["children"] == []


# ------------------------------------------------------------------------------------------- the judge, by itself

def state(**values) -> dict:
    return dict(section="step 3", where="step 3", waiting=False, quiet=0.1, overdue=False, frozen=False) | values


def judged(*states: dict, size: int | None = None, settings: GuardSettings | None = None) -> dict | None:
    """The verdict over workers in such states."""
    told: list[dict] = []
    judge = Judge(size or len(states), vars(settings or GuardSettings()), told.append)
    for rank, one in enumerate(states):
        judge.hear(rank, {"beat": one})
    judge.judge()
    return told[0] if told else None


WAITS = state(waiting=True, quiet=4.0)


@pytest.mark.parametrize("states, kind, rank, words", [
    ((state(), WAITS), None, None, ()),
    ((WAITS, state(overdue=True, quiet=3.5)), "stalled", 1, ("3.5 s", "worker 0 waits in step 3")),
    ((state(), state(overdue=True)), None, None, ()),                          # nobody waits: a notebook at rest
    ((state(), state(frozen=True)), "frozen", 1, ("stopped",)),
    ((state(frozen=True), state(frozen=True)), None, None, ()),                # a job that was suspended as a whole
    ((WAITS, state(waiting=True, quiet=4.0, section="construction", where="construction")), "parted", 0,
     ("worker 0 in step 3", "worker 1 in construction")),
    ((WAITS, WAITS), None, None, ()),
    ((state(waiting=True, quiet=70), state(waiting=True, quiet=90)), "stalled", 1, ("lost",)),
])
def test_who_is_to_blame(states, kind, rank, words):
    verdict = judged(*states)
    assert (verdict or {}).get("kind") == kind
    if verdict:
        assert verdict["rank"] == rank and all(word in verdict["what"] for word in words), verdict


def test_the_first_cause_wins():
    told: list[dict] = []
    judge = Judge(3, vars(GuardSettings()), told.append)
    judge.hear(1, {"failed": {"what": "failed in step 1: ValueError: boom", "traceback": "..."}})
    judge.hear(2, {"ended": {"code": -9, "left": False, "where": "step 1"}})
    judge.lost(0)
    assert [(verdict["kind"], verdict["rank"]) for verdict in told] == [("failed", 1)]


@pytest.mark.parametrize("ending, words", [
    ({"code": -9, "left": False, "where": "step 2"}, "was killed by SIGKILL (out of memory?) in step 2"),
    ({"code": 1, "left": True, "where": "outside of any call of the pipeline"}, "exit code 1 outside of any call"),
    ({"code": None, "left": False, "where": "step 2"}, "died in step 2")])
def test_how_a_worker_ended_is_told(ending, words):
    told: list[dict] = []
    judge = Judge(2, vars(GuardSettings()), told.append)
    judge.hear(1, {"ended": ending})
    assert words in told[0]["what"]


def test_patience_is_learnt():
    patience = Patience(stall=3.0, outside=60.0, long=600.0)
    step = ("step", 1)
    assert patience.limit(step, 2, False, False) == 600 and patience.limit(step, 9, True, False) == 600
    assert patience.limit(step, 9, False, False) == 3 and patience.limit(step, 9, False, True) == 60
    patience.learn(step, 2.0)
    assert patience.limit(step, 9, False, False) == 20 and patience.limit(("", 0), 9, False, False) == 60


@pytest.mark.parametrize("state, used, waited, overdue_after", [
    ("R", 0.9, 0.0, None), ("R", 0.05, 0.9, None), ("D", 0.0, 0.0, None), ("S", 0.0, 0.0, 3.0), ("S", 0.05, 0.05, 3.0),
    ("T", 0.0, 0.0, None)])
def test_a_worker_without_a_cpu_is_not_stalled(state, used, waited, overdue_after, tmp_path, monkeypatch):
    """A worker that computes on a machine with twenty others gets less than a fifth of a CPU: it was called stalled.

    ``used`` and ``waited``: seconds of CPU time per second, had and wanted. Seconds pass by hand.
    """
    clock = [100.0]
    monkeypatch.setattr(guard_watch.time, "monotonic", lambda: clock[0])
    activity = Activity()
    for _ in range(8):
        with activity.section("step"):
            pass
    own, start = tmp_path / str(os.getpid()), clock[0]
    for thread in "12":
        (own / "task" / thread).mkdir(parents=True)
    with activity.section("step", 9):
        activity.at("B", 1, 2)
        watch = Watch(os.getpid(), activity._memory, vars(GuardSettings()), proc=str(tmp_path))
        overdue = None
        while clock[0] < start + 20 and overdue is None:
            seconds = clock[0] - start
            ticks = [int(seconds * used * os.sysconf("SC_CLK_TCK")), 0]
            (own / "stat").write_text(f"1 (a (b) c) {state} {' '.join(['0'] * 10)} {ticks[0]} {ticks[1]} 0")
            (own / "status").write_text("TracerPid:\t0\n")
            for thread in "12":
                (own / "task" / thread / "schedstat").write_text(f"0 {int(seconds * waited / 2 * 1e9)} 7\n")
            seen = watch.look()
            overdue = seconds if seen["overdue"] else None
            clock[0] += 0.25
    assert "step 9, stage 1, backward of micro-batch 2" == seen["where"]
    assert overdue == (None if overdue_after is None else overdue_after + 0.25)
    assert seen["frozen"] == (state == "T")


def test_what_ended_a_worker_is_written_once(tmp_path):
    """What the worker has written itself (``record``) has more to say; no path, or none that can be written, is fine.
    """
    path = tmp_path / "error.json"
    write_cause(str(path), "worker 1 failed in step 3", "Traceback ...")
    failure = ProcessFailure(1, 7, 1, str(path))
    assert failure.message["message"] == "worker 1 failed in step 3"
    assert failure.message["extraInfo"]["py_callstack"] == "worker 1 failed in step 3\nTraceback ..."
    assert failure.timestamp < ProcessFailure(0, 6, 1, "").timestamp, "one without a file is later"
    write_cause(str(path), "another")
    write_cause("", "nowhere")
    write_cause(str(tmp_path / "no" / "folder"), "nowhere")
    assert json.loads(path.read_text())["message"]["message"] == "worker 1 failed in step 3"
    assert [found.name for found in tmp_path.iterdir()] == ["error.json"]


def test_settings_come_from_the_environment():
    assert GuardSettings.of({}) == GuardSettings()
    assert GuardSettings.of({"PIPEENGINE_GUARD": "debug,long=5"}) == GuardSettings(judges=False, long=5.0)
    for wrong in ("off", "stall", "judges=1", "=3"):
        with pytest.raises((InputError, ValueError)):
            GuardSettings.of({"PIPEENGINE_GUARD": wrong})


def test_a_group_whose_collective_never_ends_is_left_behind():
    """gloo's destructor waits for it: a survivor, told of a stalled worker at once, once raised ten minutes later."""
    running = Workers(2, alone_in_a_collective, limit=LIMIT)
    reports = running.join()
    assert all(report.get("left") for report in reports), running.account()


def alone_in_a_collective(report) -> None:
    """Worker 0 begins a collective that worker 1 joins only after worker 0 has given the group up."""
    import torch.distributed as dist
    groups = [dist.new_group([0, 1])]
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 0:
        work = dist.all_reduce(torch.ones(1), group=groups[0], async_op=True)
        give_up(groups)
        del work
        store.set("left", "")
    store.wait(["left"])
    report("left", True)
    dist.all_reduce(torch.ones(1), group=groups[0]) if groups and dist.get_rank() else None
