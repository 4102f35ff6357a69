"""Programs: messages are complete, in one order, and cannot deadlock; the checker finds what breaks that."""
import random
from dataclasses import replace

import numpy as np
import pytest

from pipeengine.errors import ScheduleError
from pipeengine.program.checking import check
from pipeengine.program.lowering import lower
from pipeengine.program.program import Program, ProgramLane
from pipeengine.program.single_channel import simulate_channel
from pipeengine.schedules.schedule import Edge, Schedule, Topology
from pipeengine.simulation.costs import Costs
from pipeengine.simulation.simulator import simulate
from pipeengine.simulation.timeline import OPS
from pipeengine.synthesis.registry import SCHEDULES, build


def runs_with_blocking_sends(program: Program) -> bool:
    """Step the program by hand: sends block, one channel per worker in program order, receives are posted."""
    lanes = [program.actions(w) for w in range(len(program.lanes))]
    at, posted, through = [0] * len(lanes), [[] for _ in lanes], set()
    owner = program.topology.worker_of

    def key(action):
        send_side = action.op in ("SA", "RG")
        pair = (action.stage, action.peer) if send_side else (action.peer, action.stage)
        return "A" in action.op, *pair, action.microbatch

    def needs(action):
        s, m = action.stage, action.microbatch
        if action.op == "F":
            return [(True, e.source, s, m) for e in program.edges if e.target == s and e.activation
                    and owner[e.source] != owner[s]]
        if action.op in ("B", "I"):
            return [(False, s, e.target, m) for e in program.edges if e.source == s and e.gradient
                    and owner[e.target] != owner[s]]
        return []

    moved = True
    while moved:
        moved = False
        for w, lane in enumerate(lanes):
            while at[w] < len(lane):
                action = lane[at[w]]
                if action.op in ("RA", "RG"):
                    posted[w].append(key(action))
                elif action.op in ("SA", "SG"):
                    other = owner[action.peer]
                    if posted[w] or not posted[other] or posted[other][0] != key(action):
                        break
                    through.add(posted[other].pop(0))
                elif not all(k in through for k in needs(action)):
                    break
                at[w] += 1
                moved = True
    return all(a == len(lane) for a, lane in zip(at, lanes))


EDGES = [None, [Edge(0, 1), Edge(1, 2), Edge(0, 2), Edge(0, 3, gradient=False), Edge(2, 3), Edge(1, 3)]]


@pytest.mark.parametrize("edges", EDGES, ids=["chain", "skips"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_lowered_programs_complete(name, edges):
    for m in (8, 9, 12):
        try:
            schedule = build(name, num_workers=4, num_microbatches=m)
        except ScheduleError:
            continue
        if schedule.topology.num_stages != 4 and edges:
            pytest.skip("edges are for four stages")
        draw = random.Random(m)
        costs = Costs(*([draw.uniform(0, 2) for _ in range(schedule.topology.num_stages)] for _ in range(3)), hop=0.1)
        program = lower(schedule, edges, costs)
        check(program)
        assert program.schedule == replace(schedule, pairs=())
        assert runs_with_blocking_sends(program)


def test_messages_of_one_f_one_b():
    program = lower(build("1f1b", num_workers=2, num_microbatches=2))
    assert program.to_text() == (
        "0F0,0SA0@1,0F1,0SA1@1,0RG0@1,0RG1@1,0B0,0B1\n"
        "1RA0@0,1RA1@0,1F0,1B0,1SG0@0,1F1,1B1,1SG1@0\n")
    assert Program.from_text(program.to_text(), topology=program.topology).to_text() == program.to_text()


def test_stages_of_one_worker_hand_over_without_messages():
    program = lower(Schedule.from_text("0F0,1F0,1B0,0B0\n2F0,2B0\n"), [Edge(0, 1), Edge(1, 2), Edge(0, 2)])
    assert [a.op for a in program.actions(1)].count("RA") == 2
    assert not any(a.peer == 1 and a.stage == 0 for a in program.actions(0))


def test_receives_in_flight_are_bounded():
    """A fast first stage must not make the second one hold every micro-batch's buffer."""
    program = lower(
        build("gpipe", num_workers=2, num_microbatches=64), costs=Costs([1, 10], backward=[1, 10]), window=2
    )
    check(program)
    open_now = most = 0
    for action in program.actions(1):
        open_now += {"RA": 1, "F": -1}.get(action.op, 0)
        most = max(most, open_now)
    assert most <= 4


def swapped(program: Program, worker: int, i: int, j: int) -> Program:
    lanes = [ProgramLane(*(column.copy() for column in lane)) for lane in program.lanes]
    for column in lanes[worker]:
        column[[i, j]] = column[[j, i]]
    return Program(program.name, program.topology, program.num_microbatches, program.edges, tuple(lanes))


def test_sends_in_another_order_than_receives_are_found():
    program = lower(build("gpipe", num_workers=2, num_microbatches=3))
    at = [i for i, a in enumerate(program.actions(1)) if a.op == "RA"]
    with pytest.raises(ScheduleError, match="would deliver the wrong one"):
        check(swapped(program, 1, at[0], at[1]))


def test_two_blocking_sends_face_to_face_are_found():
    """Both workers send first and receive second: fine with buffers, a deadlock without."""
    good = ("0F0,0SA0@1,0F1,0SA1@1,0RG0@1,0B0,0RG1@1,0B1\n"
            "1RA0@0,1F0,1B0,1RA1@0,1SG0@0,1F1,1B1,1SG1@0\n")
    bad = good.replace("1RA1@0,1SG0@0", "1SG0@0,1RA1@0")
    topology = Topology.linear(2)
    check(Program.from_text(good, topology=topology))
    assert runs_with_blocking_sends(Program.from_text(good, topology=topology))
    assert not runs_with_blocking_sends(Program.from_text(bad, topology=topology))
    with pytest.raises(ScheduleError, match="deadlock when sends block: .* wait in a circle"):
        check(Program.from_text(bad, topology=topology))


@pytest.mark.parametrize("text, message", [
    ("0F0,0F0,0B0\n1F0,1B0", "2 times 0F0: worker 0, line 1: 0F0 and worker 0, line 2"),
    ("0F0\n1F0,1B0", "no B and no I"),
    ("0B0,0F0\n1F0,1B0", "worker 0, line 1: 0B0 comes before its forward"),
    ("0F0,0I0\n1F0,1B0", "I without W"),
    ("0F0,0F1,0B0,0B1\n1F0,1B0,1F1", "no B and no I"),
    ("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0", "wait in a circle"),
])
def test_broken_schedules_are_refused_with_the_lines(text, message):
    with pytest.raises(ScheduleError, match=message):
        check(Schedule.from_text(text))


def test_peak_over_the_cap_is_refused():
    schedule = build("gpipe", num_workers=2, num_microbatches=4)
    check(schedule, max_peak=4)
    with pytest.raises(ScheduleError, match="worker 0 keeps 4 of activations, the cap is 3"):
        check(schedule, max_peak=3)


def test_a_message_more_or_less_is_found():
    program = lower(build("gpipe", num_workers=2, num_microbatches=3))
    at = [i for i, a in enumerate(program.actions(1)) if a.op == "RA"][1]
    for keep, message in (
        (np.arange(len(program.lanes[1].op)) != at, "no receive of the activation between stages 0 and 1"),
    ):
        lane = ProgramLane(*(column[keep] for column in program.lanes[1]))
        with pytest.raises(ScheduleError, match=message):
            check(Program("x", program.topology, 3, program.edges, (program.lanes[0], lane)))


def channel_loss(name, p, m, hop, spread):
    """What one shared in-order channel per worker costs, as a part of the makespan; stages differ by ``spread``."""
    schedule = build(name, num_workers=p, num_microbatches=m)
    draw = random.Random(100 * p + m)
    costs = Costs(*([share * draw.uniform(1 - spread, 1 + spread) for share in schedule.topology.shares()]
                    for _ in range(3)), hop=hop)
    program = lower(schedule, costs=costs)
    free, shared = simulate(program, costs).makespan, simulate_channel(program, costs).makespan
    assert free * (1 - 1e-9) <= shared
    return shared / free - 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_shared_channel_loses_at_most_a_hundredth(name):
    """All messages of a worker in order on one communicator, against messages that never queue."""
    for p, m in [(2, 8), (3, 9), (4, 8), (4, 16), (5, 13), (8, 16)] if name != "auto" else [(4, 8)]:
        if name != "dualpipe" or not p % 2:
            for hop in (0.02, 0.05, 0.1):
                assert channel_loss(name, p, m, hop, 0.0) <= 0.01, (p, m, hop)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in ("auto", "dualpipe")])
def test_one_shared_channel_with_unequal_stages(name):
    """Where stages differ by 30 %, or a hop is long, some messages cannot but collide; on average it is less."""
    for hop, mean in ((0.05, 0.003), (0.1, 0.006), (0.2, 0.017)):
        losses = [channel_loss(name, p, m, hop, 0.3) for p, m in ((2, 8), (3, 9), (4, 16), (5, 13), (8, 16))]
        assert sum(losses) / len(losses) <= mean, hop


def test_a_busy_channel_is_played_through_also_where_messages_are_many():
    """8 stages per worker: messages fill half of a channel's time; by the times of free ones alone 17 % would be
    lost."""
    schedule = build("interleaved-1f1b", num_workers=8, num_microbatches=64, stages_per_worker=8)
    costs = Costs.uniform(schedule.topology, hop=0.05)
    program = lower(schedule, costs=costs)
    assert program.num_actions - schedule.num_actions > 2 * 4096
    assert simulate_channel(program, costs).makespan <= simulate(program, costs).makespan * 1.01


def test_messages_on_a_shared_channel_follow_each_other():
    program = lower(build("zb-v", num_workers=4, num_microbatches=8))
    timeline = simulate_channel(program, Costs.uniform(program.topology, hop=0.3))
    owner, busy = program.topology.worker_of, {}
    for i in np.flatnonzero(~timeline.computes):
        grad, stage = timeline.op[i] == OPS.index("SG"), timeline.stage[i]
        for worker in (timeline.worker[i], owner[stage - 1 if grad else stage + 1]):
            busy.setdefault(worker, []).append((timeline.start[i], timeline.end[i]))
    for spans in busy.values():
        spans.sort()
        assert all(end <= start + 1e-9 for (_, end), (start, _) in zip(spans, spans[1:]))


@pytest.mark.parametrize("name", ["1f1b", "interleaved-1f1b", "zb-v"])
def test_a_planned_order_is_verified_not_believed(name):
    """Without the planned times, or with wrong ones, the checker finds the same by stepping."""
    program = lower(build(name, num_workers=4, num_microbatches=9))
    check(replace(program, planned=None))
    check(replace(program, planned=tuple(np.zeros_like(times) for times in program.planned)))
    receives = [i for i, a in enumerate(program.actions(1)) if a.op == "RA" and a.stage == 1]
    with pytest.raises(ScheduleError):
        check(replace(swapped(program, 1, *receives[:2]), planned=program.planned))


def moved(draw, program):
    """``program`` with one message elsewhere in both lanes, its planned time that of its new place in one of them."""
    lanes, times = [list(zip(*lane)) for lane in program.lanes], [list(t) for t in program.planned]
    giver = draw.choice([w for w, lane in enumerate(lanes) if any(line[0] in (4, 6) for line in lane)])
    op, stage, microbatch, peer = line = draw.choice([line for line in lanes[giver] if line[0] in (4, 6)])
    taker = program.topology.worker_of[peer]
    places = {giver: lanes[giver].index(line), taker: lanes[taker].index((op + 1, peer, microbatch, stage))}
    time = None
    for worker in draw.sample(sorted(places), 2):
        lane, at = lanes[worker], places[worker]
        taken, old = lane.pop(at), times[worker].pop(at)
        at = min(max(at + draw.choice((0, 0, -2, -1, 1, 2, 3)), 0), len(lane))
        if time is None or draw.random() < 0.2:
            near = times[worker][max(at - 1, 0):at + 1]
            time = draw.choice([old, sum(near) / len(near), near[0] + 1e-3, near[-1] - 1e-3])
        lane.insert(at, taken)
        times[worker].insert(at, time)
    lanes = tuple(
        ProgramLane(*(np.array(column, kind) for column, kind in zip(zip(*lane), (np.uint8, *(np.int32,) * 3))))
        for lane in lanes
    )
    return replace(program, lanes=lanes, planned=tuple(map(np.array, times)))


def test_planned_times_prove_nothing_false():
    """Wherever messages are moved to and whatever times are claimed: what the quick proof accepts, stepping accepts."""
    draw, accepted, refused = random.Random(0), 0, 0
    programs = [
        lower(build(name, num_workers=p, num_microbatches=6))
        for name in ("1f1b", "interleaved-1f1b", "zb-v", "gpipe")
        for p in (2, 3)
    ]
    for _ in range(4000):
        program = draw.choice(programs)
        for _ in range(draw.choice((1, 2))):
            program = moved(draw, program)
        try:
            check(program)
        except ScheduleError as error:
            refused += 1
            assert "deadlock" not in str(error) or not runs_with_blocking_sends(program), program.to_text()
            continue
        accepted += 1
        assert runs_with_blocking_sends(program), program.to_text()
        check(replace(program, planned=None))
    assert accepted > 500 and refused > 500
