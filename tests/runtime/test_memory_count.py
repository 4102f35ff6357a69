"""The memory of a step as it was counted is what the allocator says, and what was predicted."""
import pytest
import torch
import zoo
from live import live
from torch.profiler import ProfilerActivity, profile
from workers import launch

import pipeengine as pe
from pipeengine.report import report_html
from pipeengine.report.run_report import RunReport
from pipeengine.runtime.memory_count import MemoryCount, count


def test_what_a_stage_makes_is_its_own_until_it_is_given_back():
    ranges = [(20, 29, 1), (10, 19, 0), (30, 39, 0)]
    events = [(5, 0xF, 1),          # before the first action: of no stage
              (11, 0xA, 100), (12, 0xB, 50), (13, 0xB, -50),
              (21, 0xC, 30), (22, 0xA, -100), (23, 0xD, -1000),         # stage 0's, and one that was there before
              (25, 0xA, 7),         # at an address that was used before
              (31, 0xE, 60), (41, 0xE, -60)]
    assert count(events, ranges) == MemoryCount(151, {0: 150, 1: 37})
    assert count([], []) == MemoryCount(0, {})


def trained(schedule: str, num_stages: int | None = None) -> tuple[pe.Pipeline, dict]:
    """After two steps, without gradients."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens = torch.randint(3, zoo.VOCAB, (8, 32))
    batch = dict(input_ids=tokens, labels=tokens)
    pipe = pe.Pipeline(zoo.hugging_face("llama").build(), batch, num_microbatches=4, num_stages=num_stages,
                       schedule=schedule, costs="analytic", check=False)
    for _ in range(2):
        pipe.step(**batch)
        drop_gradients(pipe)
    return pipe, batch


def drop_gradients(pipe: pe.Pipeline) -> None:
    for parameter in pipe.parameters():
        parameter.grad = None


@pytest.mark.parametrize("schedule", ["gpipe", "zb-h1"])
def test_counted_in_a_step_is_what_the_allocator_says(schedule):
    pipe, batch = trained(schedule, 1)
    pipe.count_memory()
    pipe.step(**batch)
    drop_gradients(pipe)
    expected = live(lambda: pipe.step(**batch)).peak
    assert pipe.timeline().peak_bytes[0] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_reports_have_it_beside_what_was_predicted(schedule):
    """Per stage within a tenth; in the text, in JSON, on the page. Steps that are not counted stay as they were."""
    pipe, batch = trained(schedule, 3)
    before = pipe.timeline()
    assert before.peak_bytes is None and all(row.measured_bytes is None for row in pipe.run_report().rows)
    pipe.count_memory()
    pipe.step(**batch)
    assert pipe.timeline().end.tolist() == before.end.tolist()          # counting takes time
    pipe.step(**batch)
    report = pipe.run_report()
    for row, peak in zip(report.rows, pipe.timeline().peak_bytes, strict=True):
        assert peak > 0 and row.measured_bytes == pytest.approx(row.predicted_bytes, rel=0.1)
    again = RunReport.from_json(report.to_json())
    assert again.rows == report.rows and again.measured.peak_bytes == pipe.timeline().peak_bytes
    head = next(line for line in pipe.report().splitlines() if line.startswith("stage "))
    assert head.count("measured") == 2          # busy, peak memory
    assert "<td>measured</td>" in report_html(report)


def test_under_the_profiler_the_count_waits():
    pipe, batch = trained("1f1b", 2)
    pipe.count_memory()
    with profile(activities=[ProfilerActivity.CPU]):
        pipe.step(**batch)
    assert pipe.timeline().peak_bytes is None
    pipe.step(**batch)
    assert pipe.timeline().peak_bytes is not None


def count_on_workers(report) -> None:
    pipe, batch = trained("1f1b")
    pipe.count_memory()
    pipe.step(**batch)
    torch.distributed.barrier()
    report("told", (pipe.timeline().peak_bytes, [(row.measured_bytes, row.predicted_bytes)
                                                 for row in pipe.run_report().rows]))


@pytest.mark.slow
def test_each_worker_counts_its_own():
    told = [reported["told"] for reported in launch(2, count_on_workers)]
    assert told[0] == told[1]
    peaks, rows = told[0]
    assert len(peaks) == len(rows) == 2 and all(peak > 0 for peak in peaks)
    for measured, predicted in rows:
        assert measured == pytest.approx(predicted, rel=0.1)
