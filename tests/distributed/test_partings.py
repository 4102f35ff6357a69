"""Workers whose programs part ways: an error on every one of them that names the two calls, never a hang or abort."""
from contextlib import suppress

import pytest
import torch
import zoo
from workers import Workers

import pipeengine as pe

BATCH = zoo.regression()[0]


def pipeline(**options) -> pe.Pipeline:
    torch.manual_seed(0)
    settings = dict(num_microbatches=4, schedule="1f1b", costs="analytic")
    return pe.Pipeline(zoo.AWKWARD["LongSkips"].build(), BATCH, **settings | options)


def second_pipeline(pipe: pe.Pipeline) -> None:
    pipeline()


# What the odd worker does while the other steps: harmless ones first, since a pipeline lives on after them.
CALLS = {
    "evaluate": lambda pipe: pipe.evaluate(**BATCH),
    "clip_grad_norm_": lambda pipe: pipe.clip_grad_norm_(1.0),
    "save_weights('/tmp/nowhere')": lambda pipe: pipe.save_weights("/tmp/nowhere"),
    "full_state_dict": lambda pipe: pipe.full_state_dict(),
    "load_state_dict": lambda pipe: pipe.load_state_dict(pipe.state_dict()),
    "verify_shared": lambda pipe: pipe.verify_shared(),
    "close": lambda pipe: pipe.close(),
    "Checkpoints.wait": lambda pipe: pe.Checkpoints("/tmp/nowhere", pipe).wait(),
    "evaluate(gather=True)": lambda pipe: pipe.evaluate(**BATCH, gather=True),
    "step": lambda pipe: pipe.step(**BATCH),
}


def partings(report, odd: int) -> None:
    """One after the other; then a second pipeline on the odd worker alone."""
    pipe = pipeline()
    pipe.step(**BATCH)
    for name, call in CALLS.items():
        common = CALLS["evaluate"] if name == "step" else CALLS["step"]
        try:
            (call if pipe.rank == odd else common)(pipe)
            report(name, "nothing")
        except pe.InputError as error:
            report(name, str(error))
    report("after", torch.isfinite(pipe.step(**BATCH)).item())
    pipe.verify_shared()
    try:
        (second_pipeline if pipe.rank == odd else CALLS["step"])(pipe)
    except pe.WorkerError as error:
        report("second", str(error))
    with suppress(pe.WorkerError):      # the odd worker's first pipeline hears of it here
        pipe.close()
    # Each worker used to count its own pipelines, so that these two waited for each other for minutes.
    report("third", torch.isfinite(pipeline().step(**BATCH)).item())


@pytest.mark.parametrize("odd", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_different_calls_are_an_error_that_names_both(odd):
    running = Workers(2, partings, odd, limit=120)
    for report in running.join():
        for name in CALLS:
            text = report.get(name, running.account())
            own, other = (name, "evaluate" if name == "step" else "step")[:: 1 if odd == 0 else -1]
            assert text.startswith(f"workers make different calls: worker 0 calls {own}, worker 1 {other};"), text
        assert report["after"] is True
        assert "construction" in report["second"] and "step 2" in report["second"], report["second"]
        assert "different calls" in report["second"] and report.get("third") is True, running.account()


def leaving(report, how: str) -> None:
    """The script of worker 1 ends while worker 0 steps on."""
    pipe = pipeline()
    pipe.step(**BATCH)
    if pipe.rank == 1:
        if how == "raises":
            raise ValueError("no more data")
        return
    try:
        for _ in range(3):
            pipe.step(**BATCH)
    except pe.WorkerError as error:
        report("error", str(error))


@pytest.mark.parametrize("how, words", [("returns", "worker 1 "), ("raises", "worker 1 ")])
def test_a_script_that_ends_early_is_told(how, words):
    running = Workers(2, leaving, how, limit=120)
    reports = running.join()
    assert words in reports[0].get("error", running.account()), reports[0]
