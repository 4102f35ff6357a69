"""What stands for a schedule: names, texts, files and functions; and batches that are shorter than it is made for."""
import pytest

from pipeengine.errors import ScheduleError
from pipeengine.program import check
from pipeengine.schedules import PUBLISHED, Schedule, Topology, call_schedule
from pipeengine.simulation import Costs
from pipeengine.synthesis import SCHEDULES, build, build_short, find
from pipeengine.synthesis.registry import TORCH_NAMES

TEXT = "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("p, m", [(1, 1), (2, 1), (3, 2), (4, 3), (4, 5)])
def test_a_short_batch_has_the_order_of_a_longer_one(name, p, m):
    """Complete, of as many micro-batches as there are, each where it would have been."""
    try:
        schedule = build_short(name, num_workers=p, num_microbatches=m)
    except ScheduleError as error:
        assert name == "dualpipe", f"only two routes cannot be shortened: {error}"
        return
    assert schedule.num_microbatches == m and schedule.topology.num_workers == p
    check(schedule)
    for more in range(m, m + 4 * p + 1):
        try:
            longer = build(name, num_workers=p, num_microbatches=more)
        except ScheduleError:
            continue
        assert schedule == longer.keep(m), "the nearest number that works"
        break


def test_why_a_short_batch_cannot_be_is_told_for_its_own_number():
    with pytest.raises(ScheduleError, match="not 3 and 4"):
        build_short("dualpipe", num_workers=3, num_microbatches=4)


def test_names_texts_files_and_functions_are_found(tmp_path):
    assert find("1f1b") is SCHEDULES["1f1b"] and find("ScheduleGPipe") is PUBLISHED["gpipe"]
    assert find(TEXT) == find("  " + TEXT) == Schedule.from_text(TEXT)
    (tmp_path / "mine.csv").write_text(TEXT)
    assert find(str(tmp_path / "mine.csv")) == find(TEXT) and find(str(tmp_path / "mine.csv")).name == "mine"
    assert find("pipeengine.schedules.linear:gpipe") is PUBLISHED["gpipe"]
    assert set(TORCH_NAMES.values()) <= set(PUBLISHED)


@pytest.mark.parametrize("text, said", [
    ("/nowhere/mine.csv", "cannot read the schedule /nowhere/mine.csv"),
    ("pipeengine.schedules:F", "pipeengine.schedules:F is 0; give a function .num_workers, num_microbatches. or a"),
    ("GPIPE", "unknown schedule 'GPIPE'; did you mean 'gpipe'"), ("zb-h3", "did you mean 'zb-h"),
    ("qqqq", "unknown schedule 'qqqq'; known: gpipe, 1f1b"), ("", "unknown schedule ''; known")])
def test_what_stands_for_nothing_is_told(text, said):
    with pytest.raises(ScheduleError, match=said):
        find(text)


def test_a_file_that_is_no_text_is_told(tmp_path):
    (tmp_path / "mine.csv").write_bytes(b"\xff\xfe0F0")
    with pytest.raises(ScheduleError, match="cannot read the schedule .*mine.csv"):
        find(str(tmp_path / "mine.csv"))


@pytest.mark.parametrize("numbers", [dict(num_workers=0, num_microbatches=1), dict(num_workers=1, num_microbatches=0),
                                     dict(num_workers=2, num_microbatches=2, stages_per_worker=-1)])
def test_nothing_is_built_for_nobody(numbers):
    with pytest.raises(ScheduleError, match="give at least one of each"):
        build("gpipe", **numbers)


def test_a_function_is_given_what_it_takes():
    """Only options that it names, and only those that were given."""
    seen = []

    def mine(num_workers, num_microbatches, costs=None, objective="makespan"):
        seen.append((costs, objective))
        return Schedule.from_text(TEXT)
    costs = Costs([1, 1], backward=[2, 2])
    build(mine, num_workers=2, num_microbatches=2, costs=costs, max_peak=2.0)
    build(mine, num_workers=2, num_microbatches=2, objective="span")
    assert seen == [(costs, "makespan"), (None, "span")]
    assert call_schedule(mine, 2, 2, objective=None, unknown=3) == Schedule.from_text(TEXT)


def test_a_schedule_for_other_numbers_is_refused():
    made = Schedule.from_text(TEXT, name="mine")
    for numbers in ((3, 2), (2, 3)):
        with pytest.raises(ScheduleError, match=f"mine is for 2 workers and 2 micro-batches, the run has {numbers[0]} "
                                                f"and {numbers[1]}; build it again"):
            build(made, num_workers=numbers[0], num_microbatches=numbers[1])
    with pytest.raises(ScheduleError, match="mine is for 2 workers"):
        build(lambda num_workers, num_microbatches: made, num_workers=4, num_microbatches=2)


def test_an_own_schedule_is_checked_like_a_written_one():
    """Two stages per worker, one of them never run."""
    lost = Schedule.from_text("0F0,0B0\n1F0,1B0\n", topology=Topology((0, 1, 0)))
    with pytest.raises(ScheduleError, match="stage 2|2F0"):
        build(lost, num_workers=2, num_microbatches=1)
