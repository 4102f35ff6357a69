"""Ten thousand seeded faults, each wrong by construction, and the checker finds every one; no false alarm on the
rest."""
import random
from collections import Counter
from functools import cache

import numpy as np
import pytest

from pipeengine.errors import ScheduleError
from pipeengine.program.checking import check
from pipeengine.program.lowering import lower
from pipeengine.program.program import Program, ProgramLane
from pipeengine.schedules.schedule import Lane, Schedule
from pipeengine.synthesis.registry import SCHEDULES, build

NUM_FAULTS = 10_000
NAMES = [name for name in SCHEDULES if name not in ("auto", "dualpipe")]


@cache
def sound(name, p, m):
    """A schedule, its program, and the program's rows as lists of (op, stage, micro-batch, peer)."""
    schedule = build(name, num_workers=p, num_microbatches=m)
    check(schedule)
    program = lower(schedule)
    check(program)
    return schedule, program, [[tuple(action) for action in program.actions(w)] for w in range(p)]


def remade(program, rows):
    codes = ("F", "B", "I", "W", "SA", "RA", "SG", "RG")
    lanes = tuple(ProgramLane(*(np.array(column, kind) for column, kind in zip(
        zip(*((codes.index(op), *rest) for op, *rest in row)), (np.uint8, *(np.int32,) * 3)))) for row in rows)
    return Program(program.name, program.topology, program.num_microbatches, program.edges, lanes)


def drop(draw, rows, _):
    row = draw.choice(rows)
    row.pop(draw.randrange(len(row)))


def duplicate(draw, rows, _):
    row = draw.choice(rows)
    row.insert(draw.randrange(len(row)), draw.choice(row))


def wrong_worker(draw, rows, _):
    source = draw.randrange(len(rows))
    target = draw.choice([w for w in range(len(rows)) if w != source])
    action = rows[source].pop(draw.randrange(len(rows[source])))
    rows[target].insert(draw.randrange(len(rows[target]) + 1), action)


def swap(draw, rows, _):
    """An action and one that needs it, on one worker."""
    row = draw.choice(rows)
    place = {action[:3]: i for i, action in enumerate(row)}
    backward = draw.choice([action for action in row if action[0] in "BI"])
    i, j = place["F", *backward[1:3]], place[backward[:3]]
    row[i], row[j] = row[j], row[i]


def send_too_early(draw, rows, _):
    row = draw.choice([row for row in rows if any(action[0] == "SA" for action in row)])
    send = draw.choice([i for i, action in enumerate(row) if action[0] == "SA"])
    made = row.index(("F", *row[send][1:3], -1))
    row.insert(made, row.pop(send))


def fifo(draw, rows, _):
    """Two receives from one worker change places: a channel without tags delivers the wrong one."""
    choices = []
    for row in rows:
        places = {}
        for i, (op, stage, _, peer) in enumerate(row):
            if op in ("RA", "RG"):
                places.setdefault((op, stage, peer), []).append(i)
        choices += [(row, i, j) for same in places.values() for i, j in zip(same, same[1:])]
    if not choices:
        return drop(draw, rows, None)
    row, i, j = draw.choice(choices)
    row[i], row[j] = row[j], row[i]


def late_receive(draw, rows, _):
    """A receive is posted after the action that needs it."""
    row = draw.choice([row for row in rows if any(action[0] in ("RA", "RG") for action in row)])
    receive = draw.choice([action for action in row if action[0] in ("RA", "RG")])
    needs = ("F",) if receive[0] == "RA" else ("B", "I")
    at = next(i for i, action in enumerate(row) if action[0] in needs and action[1:3] == receive[1:3])
    row.insert(at, row.pop(row.index(receive)))


def wrong_peer(draw, rows, program):
    """One side of a message names another stage."""
    row = draw.choice([row for row in rows if any(action[3] >= 0 for action in row)])
    i = draw.choice([i for i, action in enumerate(row) if action[3] >= 0])
    others = [s for s in range(program.topology.num_stages) if s != row[i][3]]
    row[i] = (*row[i][:3], draw.choice(others))


def wrong_kind(draw, rows, _):
    """An activation is taken for a gradient, or the other way round."""
    row = draw.choice([row for row in rows if any(action[3] >= 0 for action in row)])
    i = draw.choice([i for i, action in enumerate(row) if action[3] >= 0])
    row[i] = (row[i][0][0] + ("G" if row[i][0][1] == "A" else "A"), *row[i][1:])


def cycle(draw, rows, program):
    """Stage s runs backward k before forward j, though the next stage runs forward j before backward k."""
    owner = program.topology.worker_of
    s = draw.randrange(program.topology.num_stages - 1)
    here = [a for a in rows[owner[s]] if a[0] in "FBI" and a[1] == s]
    there = [a[0] in "F" and ("F", a[2]) or ("B", a[2]) for a in rows[owner[s + 1]] if a[0] in "FBI" and a[1] == s + 1]
    k = draw.choice([a[2] for a in here if a[0] != "F"])
    before = [m for letter, m in there[:there.index(("B", k))] if letter == "F"]
    j = draw.choice(before)
    row = rows[owner[s]]
    back = next(a for a in row if a[0] in "BI" and a[1:3] == (s, k))
    row.remove(back)
    row.insert(row.index(("F", s, j, -1)), back)


FAULTS = (drop, duplicate, wrong_worker, swap, send_too_early, late_receive, wrong_peer, wrong_kind, fifo, cycle)


def test_every_seeded_fault_is_found():
    draw, found = random.Random(0), Counter()
    sizes = [(2, 4), (2, 5), (3, 6), (4, 8)]
    for number in range(NUM_FAULTS):
        _, program, rows = sound(draw.choice(NAMES), *sizes[number % len(sizes)])
        rows, fault = [list(row) for row in rows], FAULTS[number % len(FAULTS)]
        fault(draw, rows, program)
        try:
            check(remade(program, rows))
        except ScheduleError:
            found[fault.__name__] += 1
        else:
            pytest.fail(
                f"{fault.__name__} in {program.name}: {program.topology} not found\n{remade(program, rows).to_text()}"
            )
    assert sum(found.values()) == NUM_FAULTS and len(found) == len(FAULTS)


def test_faults_of_schedules_are_found_before_lowering():
    draw = random.Random(1)
    for _ in range(300):
        schedule, _, _ = sound(draw.choice(NAMES), 3, 6)
        lanes = [Lane(*(column.copy() for column in lane)) for lane in schedule.lanes]
        lane, i = draw.choice(lanes), None
        i = draw.randrange(len(lane.op))
        if draw.random() < 0.5:
            lane.microbatch[i] = (lane.microbatch[i] + 1) % 6
        else:
            lane.op[i] = (lane.op[i] + 1 + draw.randrange(3)) % 4
        with pytest.raises(ScheduleError):
            check(Schedule("broken", schedule.topology, 6, tuple(lanes)))


def test_no_false_alarm():
    draw = random.Random(2)
    for _ in range(300):
        name, p, m = draw.choice(NAMES), draw.randint(1, 6), draw.randint(1, 24)
        try:
            schedule = build(name, num_workers=p, num_microbatches=m)
        except ScheduleError:
            continue
        check(schedule)
        check(lower(schedule))
