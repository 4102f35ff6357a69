"""Programs of one worker: made once per batch size, complete, and those of the schedule that was asked for."""
import pytest

from pipeengine.errors import ScheduleError
from pipeengine.runtime.programs import ProgramCache, ScheduleChoice, splits_backward
from pipeengine.schedules import Edge, Schedule
from pipeengine.simulation import Costs
from pipeengine.synthesis import build

CHAIN = frozenset(Edge(stage, stage + 1, True, True) for stage in range(3))
EVEN = Costs(forward=(1.0,) * 4, backward=(2.0,) * 4)
NAMES = ("gpipe", "1f1b", "zb-h1", "zb-h2", "auto")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 3, 8])
def test_workers_do_everything_once(name, count):
    """Every stage runs every micro-batch forward and backward once; what one sends the other receives."""
    choice = ScheduleChoice(name, 4, 8, 4)
    lanes = [ProgramCache(choice, worker, EVEN).share(count, CHAIN, training=True).actions for worker in range(4)]
    done = [action for lane in lanes for action in lane]
    forwards = sorted((stage, k) for op, stage, k, _ in done if op == "F")
    assert forwards == [(stage, k) for stage in range(4) for k in range(count)]
    halves = sorted((stage, k) for op, stage, k, _ in done if op in ("B", "I"))
    assert halves == forwards and all(stage == worker for worker, lane in enumerate(lanes) for _, stage, _, _ in lane)
    for send, receive in (("SA", "RA"), ("SG", "RG")):
        sent = sorted((stage, peer, k) for op, stage, k, peer in done if op == send)
        assert (
            sent == sorted((peer, stage, k) for op, stage, k, peer in done if op == receive) and len(sent) == 3 * count
        )


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_runs_forward_only(name):
    cache = ProgramCache(ScheduleChoice(name, 4, 8, 4), 1, EVEN)
    assert {op for op, *_ in cache.share(3, CHAIN, training=False).actions} == {"F", "SA", "RA"}


def test_each_program_is_made_once():
    cache = ProgramCache(ScheduleChoice("1f1b", 4, 8, 4), 0, EVEN)
    assert cache.share(8, CHAIN, training=True) is cache.share(8, CHAIN, training=True)
    assert cache.schedule(8) is cache.schedule(8)
    assert cache.share(8, CHAIN, training=True) is not cache.share(7, CHAIN, training=True)


def test_split_stages_are_those_with_two_actions():
    """Of ZB-H1 every backward is two actions; of 1F1B none is."""
    for name, expected in (("zb-h1", frozenset(range(4))), ("1f1b", frozenset())):
        choice = ScheduleChoice(name, 4, 8, 4)
        assert ProgramCache(choice, 0, EVEN).split_backward_stages(8) == (expected,) * 8
        assert splits_backward(choice.build()) == bool(expected)


def test_own_schedules_are_called_by_their_names():
    mine = Schedule.from_text("0F0,0B0\n1F0,1B0\n", name="mine")
    assert ScheduleChoice(mine, 2, 1, 2).name == "mine" and ScheduleChoice("1f1b", 2, 1, 2).name == "1f1b"

    def backwards(num_workers, num_microbatches):
        return build("gpipe", num_workers=num_workers, num_microbatches=num_microbatches)
    assert ScheduleChoice(backwards, 2, 4, 2).name == "backwards"


def test_what_cannot_hold_the_stages_says_how_many_would_do():
    with pytest.raises(ScheduleError, match="use 8 stages on 4 workers"):
        ScheduleChoice("zb-v", 4, 8, 4).build()
    assert ScheduleChoice("zb-v", 8, 8, 4).build().topology.num_stages == 8
    assert ScheduleChoice("1f1b", 4, 8, 1).worker_of(build("1f1b", num_workers=4, num_microbatches=8)) == (0,) * 4
