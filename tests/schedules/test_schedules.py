"""Laws that every schedule keeps, for many sizes; then exact pictures."""
from inspect import cleandoc

import pytest

from pipeengine.errors import ScheduleError
from pipeengine.program.checking import check
from pipeengine.report.text import timeline_text
from pipeengine.schedules.linear import forward_schedule
from pipeengine.schedules.schedule import Schedule, Topology
from pipeengine.simulation.costs import Costs
from pipeengine.simulation.simulator import simulate
from pipeengine.synthesis.registry import SCHEDULES, build

SIZES = [(p, m) for p in (1, 2, 3, 4, 6) for m in (1, 2, 3, 5, 8, 12)]


def made(name: str, num_workers: int, num_microbatches: int) -> Schedule:
    """The schedule, or a skip where these numbers are not its own."""
    try:
        return build(name, num_workers=num_workers, num_microbatches=num_microbatches)
    except ScheduleError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_completes(name, size):
    check(made(name, *size))


@pytest.mark.parametrize("name", SCHEDULES)
def test_text_goes_both_ways(name):
    schedule = made(name, 4, 8)
    again = Schedule.from_text(schedule.to_text(), topology=schedule.topology)
    assert again == schedule
    if schedule.topology.num_routes == 1:
        assert Schedule.from_text(schedule.to_text()) == schedule


def test_gpipe_picture():
    assert build("gpipe", num_workers=2, num_microbatches=2).to_text() == "0F0,0F1,0B0,0B1\n1F0,1F1,1B0,1B1\n"


def test_one_f_one_b_picture():
    assert build("1f1b", num_workers=3, num_microbatches=4).to_text() == (
        "0F0,0F1,0F2,0B0,0F3,0B1,0B2,0B3\n"
        "1F0,1F1,1B0,1F2,1B1,1F3,1B2,1B3\n"
        "2F0,2B0,2F1,2B1,2F2,2B2,2F3,2B3\n")


@pytest.mark.parametrize(
    "topology", [Topology.linear(3), Topology.looped(2, 3), Topology.v(3), Topology.bidirectional(2)]
)
def test_forward_only_completes(topology):
    check(forward_schedule(topology.num_workers, 4, topology))


def test_topologies():
    assert Topology.looped(2, 2).worker_of == (0, 1, 0, 1)
    assert Topology.v(3).worker_of == (0, 1, 2, 2, 1, 0)
    assert Topology.v(3).stages_of(1) == (1, 4)
    assert Topology.bidirectional(2).stages_of(0) == (0, 3)


def test_own_function_and_own_schedule_are_accepted():
    def mine(num_workers, num_microbatches):
        return Schedule.from_text("0F0,0B0\n1F0,1B0\n", name="mine")
    assert build(mine, num_workers=2, num_microbatches=1).name == "mine"
    assert build(mine(2, 1), num_workers=2, num_microbatches=1).name == "mine"
    with pytest.raises(ScheduleError, match="2 workers and 1 micro-batches, the run has 3 and 1"):
        build(mine(2, 1), num_workers=3, num_microbatches=1)


def test_own_text_is_accepted_and_a_broken_one_is_refused_with_its_lines(tmp_path):
    text = "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"
    (tmp_path / "mine.csv").write_text(text)
    for schedule in (text, str(tmp_path / "mine.csv")):
        assert build(schedule, num_workers=2, num_microbatches=2) == build("1f1b", num_workers=2, num_microbatches=2)
    circle = "worker 0, line 2: 0B0 waits for worker 1, line 4: 1B0"
    broken = "0F0,0B0,0F1,0B1\n1F1,1F0,1B1,1B0\n"
    for schedule in (broken, Schedule.from_text(broken), lambda p, m: Schedule.from_text(broken)):
        with pytest.raises(ScheduleError, match=circle):
            build(schedule, num_workers=2, num_microbatches=2)
    with pytest.raises(ScheduleError, match="7 is no schedule"):
        build(lambda p, m: 7, num_workers=2, num_microbatches=2)


def test_unknown_name_is_told_the_nearest():
    with pytest.raises(ScheduleError, match="did you mean '1f1b'.*known: gpipe, 1f1b"):
        build("1f1", num_workers=2, num_microbatches=2)


@pytest.mark.parametrize("text, message", [
    ("0F0,0X0", "cell 2 is '0X0'"),
    ("0F0,0B0\n2F0,2B0", "no line runs stage 1"),
])
def test_text_that_is_no_schedule(text, message):
    with pytest.raises(ScheduleError, match=message):
        Schedule.from_text(text)


DRAWN = {
    "gpipe": (3, 3),
    "1f1b": (3, 4),
    "interleaved-1f1b": (2, 3),
    "bfs": (2, 3),
    "zb-h1": (3, 4),
    "zb-h2": (3, 5),
    "interleaved-zb": (2, 4),
    "zb-v": (2, 3),
    "v-half": (3, 3),
    "v-min": (3, 3),
    "dualpipe": (4, 8),
    "dualpipe-v": (2, 4),
}


@pytest.mark.parametrize("name", DRAWN)
def test_docstrings_show_the_schedule(name):
    """Each picture is what the schedule does when F, I and W of a stage take one slot each."""
    schedule = build(name, num_workers=DRAWN[name][0], num_microbatches=DRAWN[name][1])
    stages = schedule.topology.num_stages
    drawn = timeline_text(simulate(schedule, Costs([1] * stages, [1] * stages, [1] * stages)), 110)
    assert drawn in cleandoc(SCHEDULES[name].__doc__).replace("\n    ", "\n")


def test_stages_per_worker_are_those_asked_for_or_an_error():
    assert build(
        "interleaved-1f1b", num_workers=3, num_microbatches=4, stages_per_worker=1
    ).topology == Topology.linear(3)
    assert build("zb-v", num_workers=3, num_microbatches=6, stages_per_worker=2).topology == Topology.v(3)
    for name, asked in (("zb-v", 1), ("zb-v", 3), ("1f1b", 2)):
        with pytest.raises(ScheduleError, match=f"{asked} were asked for; use (6|3) stages on 3 workers"):
            build(name, num_workers=3, num_microbatches=6, stages_per_worker=asked)
