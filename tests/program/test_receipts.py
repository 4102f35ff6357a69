"""Receipts: what a message proves is true in whatever order workers come to run, and proved once."""
import random

import pytest

from pipeengine.errors import ScheduleError
from pipeengine.program import UNDERWAY, WINDOW, Program, lower, receipts
from pipeengine.program.receipts import message_of
from pipeengine.schedules import Edge
from pipeengine.synthesis import SCHEDULES, build

SKIPS = (Edge(0, 1), Edge(1, 2), Edge(0, 2), Edge(0, 3, gradient=False), Edge(2, 3), Edge(1, 3))


def computed_with(action, program):
    """The messages that a computation needs."""
    owner = program.topology.worker_of
    stage, m = action.stage, action.microbatch
    if action.op == "F":
        return [(0, e.source, stage, m) for e in program.edges
                if e.target == stage and e.activation and owner[e.source] != owner[stage]]
    if action.op in ("B", "I"):
        return [(1, stage, e.target, m) for e in program.edges
                if e.source == stage and e.gradient and owner[e.target] != owner[stage]]
    return []


def run_at_random(program: Program, draw: random.Random):
    """Workers in any order that messages allow; yields each message when it is sent, with all that was used before."""
    lanes = [program.actions(w) for w in range(len(program.lanes))]
    at, sent, used = [0] * len(lanes), set(), set()
    while any(position < len(lane) for position, lane in zip(at, lanes)):
        able = [w for w, lane in enumerate(lanes) if at[w] < len(lane)
                and sent.issuperset(computed_with(lane[at[w]], program))]
        worker = draw.choice(able)
        action = lanes[worker][at[worker]]
        at[worker] += 1
        used.update(computed_with(action, program))
        if action.op in ("SA", "SG"):
            sent.add(message_of(action))
            yield message_of(action), used


def programs(name, edges=None):
    for count in (3, 8):
        try:
            schedule = build(name, num_workers=4, num_microbatches=count)
        except ScheduleError:
            continue
        if edges is None or schedule.topology.num_stages == 4:
            yield lower(schedule, edges, window=WINDOW)


@pytest.mark.parametrize("edges", [None, SKIPS], ids=["chain", "skips"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_what_a_message_proves_is_so(name, edges):
    """A buffer that is let go of too early would send other values than its own."""
    for program in programs(name, edges):
        proved = [receipts(program, worker) for worker in range(4)]
        everything = [message for found in proved for arrived in found.values() for message in arrived]
        assert len(everything) == len(set(everything)), "one message is proved twice"
        for seed in range(3):
            for message, used in run_at_random(program, random.Random(seed)):
                for found in proved:
                    assert used.issuperset(found.get(message, ()))


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "v-half", "v-min"])
def test_nobody_waits_for_what_was_sent(name):
    """Where every message is answered, few are unproved at any time: none has to be asked after before the end."""
    for program in programs(name):
        for worker in range(4):
            found, underway = receipts(program, worker), set()
            for action in program.actions(worker):
                if action.op in ("SA", "SG"):
                    underway.add(message_of(action))
                    assert len(underway) <= UNDERWAY
                elif action.op in ("F", "B", "I"):
                    for message in computed_with(action, program):
                        underway.difference_update(found.get(message, ()))
