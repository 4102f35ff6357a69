"""A run over two workers: killed, interrupted, terminated, and started again as if nothing had been."""
import os
import signal
import time
from functools import cache

import pytest
import torch
import torch.distributed as dist
from run_training import make, train_step
from workers import Workers, launch

from pipeengine.tracking import read_metrics, series

TOTAL = 12


def work(report, folder, kill_at=None, wait_at=None):
    """Train to the end; at ``kill_at`` die without a word, at ``wait_at`` wait for a signal."""
    signal.signal(signal.SIGINT, signal.default_int_handler)        # as a terminal's programs have it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    run, pipe, *parts = make(folder, save_every=4, config={"killed": kill_at})
    report("begins", (run.first_step, run.id))
    losses = {}
    try:
        for step in run.steps(TOTAL):
            loss = train_step(pipe, *parts)
            losses[step] = float(loss)
            run.log(loss=loss)
            if pipe.rank == 1:
                run.log(only_last=step)
            if step == kill_at:
                run.checkpoints.wait()
                dist.barrier()
                os.kill(os.getpid(), signal.SIGKILL)
            if step == wait_at:
                report("waits")
                deadline = time.monotonic() + 60
                while not pipe.holdings().workers.wishes.own() and time.monotonic() < deadline:
                    time.sleep(0.01)
    except SystemExit as end:
        report("exits", end.code)
    report("losses", losses)
    report("parameters", {name: p.detach().numpy() for name, p in pipe.named_parameters()})


@cache
def uninterrupted():
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        return launch(2, work, folder), read_metrics(f"{folder}/metrics.jsonl")


def assert_as_if_nothing_had_been(second, folder, run_id):
    whole, metrics = uninterrupted()
    for ours, theirs in zip(second, whole):
        assert ours["losses"].items() <= theirs["losses"].items()
        assert ours["begins"][1] == run_id
        for name, value in theirs["parameters"].items():
            assert torch.equal(torch.from_numpy(ours["parameters"][name]), torch.from_numpy(value)), name
    records = read_metrics(f"{folder}/metrics.jsonl")
    assert series(records, "loss") == series(metrics, "loss")
    assert len([record for record in records if "loss" in record]) == TOTAL, "each step once"
    return records


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    first = Workers(2, work, str(tmp_path), 6)
    reports = first.join()
    assert first.exit_codes == [-signal.SIGKILL] * 2
    second = launch(2, work, str(tmp_path))
    assert [report["begins"][0] for report in second] == [4, 4]
    records = assert_as_if_nothing_had_been(second, tmp_path, reports[0]["begins"][1])
    # What only the last worker has, worker 0 tells, once per step.
    assert [step for step, _ in series(records, "only_last")][-8:] == list(range(4, TOTAL))
    assert len(series(records, "pipeline/sent_bytes/worker_1")) and len(series(records, "pipeline/bubble"))


@pytest.mark.parametrize("number, code", ((signal.SIGTERM, 0), (signal.SIGINT, 130)))
def test_a_signal_saves_and_ends(tmp_path, number, code):
    """Both workers save the same step and end, and the next start goes on there."""
    first = Workers(2, work, str(tmp_path), None, 5)
    first.wait_for("begins")
    while "waits" not in first.workers[0].reports:
        first._advance()
    for rank in (0, 1):
        first.signal(rank, number)
    reports = first.join()
    assert [report["exits"] for report in reports] == [code, code], first.account()
    second = launch(2, work, str(tmp_path))
    begins = {report["begins"][0] for report in second}
    assert begins <= {6, 7} and len(begins) == 1
    assert_as_if_nothing_had_been(second, tmp_path, reports[0]["begins"][1])
