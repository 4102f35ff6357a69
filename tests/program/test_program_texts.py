"""Programs as text, and the messages that they name: both ways, in our words and in torch's."""
import numpy as np
import pytest

from pipeengine.errors import ScheduleError
from pipeengine.program import Program, check, lower
from pipeengine.program.program import Action
from pipeengine.program.receipts import message_of
from pipeengine.program.reductions import with_reductions
from pipeengine.schedules import PUBLISHED, Edge, Topology, call_schedule
from pipeengine.simulation import SA
from pipeengine.synthesis import build

SKIPS = (Edge(0, 1), Edge(1, 2), Edge(0, 2), Edge(0, 3, gradient=False), Edge(2, 3))


def programs():
    for name, function in PUBLISHED.items():
        for p, m in ((2, 4), (3, 6), (4, 8)):
            try:
                yield pytest.param(lower(call_schedule(function, p, m)), id=f"{name}-{p}-{m}")
            except ScheduleError:
                continue
    yield pytest.param(lower(build("1f1b", num_workers=4, num_microbatches=5), edges=SKIPS), id="skips")


ALL = list(programs())


def columns(program):
    return [[column.tolist() for column in lane] for lane in program.lanes]


@pytest.mark.parametrize("program", ALL)
def test_text_goes_both_ways(program):
    again = Program.from_text(program.to_text(), topology=program.topology, edges=program.edges, name=program.name)
    assert columns(again) == columns(program) and again.num_microbatches == program.num_microbatches
    check(again)
    summed = with_reductions(program)
    read = Program.from_text(summed.to_text(), topology=program.topology, edges=program.edges)
    assert columns(read) == columns(summed)


@pytest.mark.parametrize("program", ALL)
def test_the_computations_are_the_schedule_that_was_lowered(program):
    schedule = program.schedule
    for worker in range(len(program.lanes)):
        computed = [tuple(action[:3]) for action in program.actions(worker) if action.peer < 0]
        assert schedule.actions(worker) == computed
    check(schedule)


@pytest.mark.parametrize("program", ALL)
def test_every_message_is_sent_once_and_received_once(program):
    """By one worker and another, under one name."""
    sent, received = [], []
    for worker in range(len(program.lanes)):
        for action in program.actions(worker):
            if action.peer >= 0:
                (sent if action.op in ("SA", "SG") else received).append((message_of(action), worker))
    assert len({message for message, _ in sent}) == len(sent)
    assert sorted(message for message, _ in sent) == sorted(message for message, _ in received)
    owner, to = program.topology.worker_of, dict(received)
    for (back, source, target, _), worker in sent:
        assert worker == owner[target if back else source]
        assert to[back, source, target, _] == owner[source if back else target] != worker
    edges = {(edge.source, edge.target): edge for edge in program.edges}
    assert all(edges[source, target].gradient if back else edges[source, target].activation
               for (back, source, target, _), _ in sent)


@pytest.mark.parametrize("action, text, message", [
    (Action("F", 2, 7, -1), "2F7", None), (Action("R", 3, -1, -1), "3R", None),
    (Action("SA", 0, 3, 1), "0SA3@1", (0, 0, 1, 3)), (Action("RA", 1, 3, 0), "1RA3@0", (0, 0, 1, 3)),
    (Action("SG", 1, 3, 0), "1SG3@0", (1, 0, 1, 3)), (Action("RG", 0, 3, 1), "0RG3@1", (1, 0, 1, 3))])
def test_a_line_and_the_message_it_is_about(action, text, message):
    """Both ends of a message name it alike: kind, source, target, micro-batch."""
    assert str(action) == text and (message is None or message_of(action) == message)


def test_torchs_words_are_ours():
    """Between neighbouring stages; cells about parameters are no lines."""
    theirs = "0UNSHARD,0F0,0SEND_F0,0RECV_B0,0B0,0REDUCE_GRAD\n1RECV_F0,1F0,1B0,1SEND_B0\n"
    ours = "0F0,0SA0@1,0RG0@1,0B0\n1RA0@0,1F0,1B0,1SG0@0\n"
    topology = Topology.linear(2)
    found = Program.from_text(theirs, topology=topology)
    assert columns(found) == columns(Program.from_text(ours, topology=topology)) and found.to_text() == ours
    check(found)


@pytest.mark.parametrize("cell", ("0F", "F0", "0Q0", "0SA0@", "0F0@x", "0 F0", "-1F0"))
def test_what_is_no_line_is_shown(cell):
    with pytest.raises(ScheduleError, match="is no line of a program; one is a stage, an operation and a micro-batch"):
        Program.from_text(f"0F0,{cell}\n", topology=Topology.linear(1))


@pytest.mark.parametrize("program", ALL)
def test_a_reduction_stands_after_all_that_its_stage_still_does(program):
    """One for each stage; the rest stays in its order, with its times."""
    summed = with_reductions(program)
    seen = []
    for worker in range(len(summed.lanes)):
        actions = summed.actions(worker)
        assert [action for action in actions if action.op != "R"] == program.actions(worker)
        for at, action in enumerate(actions):
            if action.op == "R":
                seen.append(action.stage)
                later = [other for other in actions[at + 1:] if other.op in "FBIW" and other.stage == action.stage]
                assert not later and summed.topology.worker_of[action.stage] == worker
                # What the stage still had to send goes first.
                assert not (actions[at + 1:] and actions[at + 1].op in ("SA", "SG")
                            and actions[at + 1].stage == action.stage)
        if summed.planned is not None:
            others = [op != "R" for op, *_ in actions]
            assert np.array_equal(summed.planned[worker][others], program.planned[worker])
    assert sorted(seen) == list(range(program.topology.num_stages))
    check(summed)


def test_a_program_without_backward_sums_nothing():
    forward = lower(build("gpipe", num_workers=2, num_microbatches=2))
    kept = tuple(type(lane)(*(column[np.isin(lane.op, (0, SA, SA + 1))] for column in lane)) for lane in forward.lanes)
    only = Program("forward", forward.topology, 2, (Edge(0, 1, gradient=False),), kept)
    assert with_reductions(only) is only and only.schedule.forward_only


def test_a_worker_without_a_line_keeps_its_place():
    text = "0F0,0B0\n\n2F1\n"
    program = Program.from_text(text, topology=Topology((0, 1, 2)))
    assert [len(lane.op) for lane in program.lanes] == [2, 0, 1]
    assert program.num_microbatches == 2 and program.to_text() == text
