"""Topologies, lanes and what is kept of a schedule: laws over many sizes, and words for what cannot be."""
import random

import numpy as np
import pytest

from pipeengine.errors import ScheduleError
from pipeengine.program import check
from pipeengine.schedules import PUBLISHED, Edge, Lane, Schedule, Topology, call_schedule
from pipeengine.schedules.schedule import LETTERS, from_keys
from pipeengine.schedules.v_shaped import PERIOD, LaneBuilder, _alive, _block

TOPOLOGIES = [topology for p in (1, 2, 3, 5) for topology in (
    Topology.linear(p), Topology.v(p), Topology.bidirectional(p), Topology.looped(p, 3), Topology.wave(p, 3))]


def schedules():
    """Every published schedule in the sizes that it is made for."""
    for name, function in PUBLISHED.items():
        for p, m in ((1, 2), (2, 4), (2, 5), (3, 7), (4, 8)):
            try:
                yield pytest.param(call_schedule(function, p, m), id=f"{name}-{p}-{m}")
            except ScheduleError:
                continue


ALL = list(schedules())


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda t: f"{t.num_stages} on {t.num_workers}")
def test_every_stage_has_one_worker_and_every_worker_its_shares(topology):
    held = [topology.stages_of(worker) for worker in range(topology.num_workers)]
    assert sorted(sum(held, ())) == list(range(topology.num_stages))
    assert all(stages == tuple(sorted(stages)) and stages for stages in held)
    shares = topology.shares()
    assert [sum(shares[stage] for stage in stages) for stages in held] == pytest.approx(
        [topology.num_routes] * topology.num_workers)


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda t: f"{t.num_stages} on {t.num_workers}")
def test_a_chain_leads_through_each_route_once(topology):
    """One edge fewer than stages on every route; each stage but a first has one source."""
    edges = topology.chain()
    assert len(edges) == topology.num_stages - topology.num_routes
    assert len({edge.target for edge in edges}) == len({edge.source for edge in edges}) == len(edges)
    assert all(topology.route_of[edge.source] == topology.route_of[edge.target] for edge in edges)
    assert all(edge == Edge(edge.source, edge.target) for edge in edges)


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda t: f"{t.num_stages} on {t.num_workers}")
@pytest.mark.parametrize("m", (0, 1, 4, 7))
def test_a_micro_batch_visits_the_stages_of_one_route(topology, m):
    visits = topology.visits(m)
    assert visits.shape == (topology.num_stages, m)
    for k in range(m):
        routes = {topology.route_of[stage] for stage in np.flatnonzero(visits[:, k])}
        assert routes == {k * topology.num_routes // m}
    assert visits.sum() == m * topology.num_stages // topology.num_routes


def test_workers_without_a_stage_are_refused():
    for wrong in ((), (0, 2), (1,), (0, 0, 3)):
        with pytest.raises(ScheduleError, match="each with at least one stage"):
            Topology(wrong)
    lane = Lane.of((0, 1), (0, 0), (0, 0))
    with pytest.raises(ScheduleError, match="lanes for 1 workers, its topology has 2; give every worker one lane"):
        Schedule("short", Topology.linear(2), 1, (lane,))


@pytest.mark.parametrize("schedule", ALL)
def test_tables_find_every_action_again(schedule):
    op, stage, microbatch = schedule.columns
    visits = schedule.topology.visits(schedule.num_microbatches)
    for table, letters in zip(schedule.tables, ("F", "BI", "W")):
        for s, k in np.argwhere(table >= 0):
            at = table[s, k]
            assert LETTERS[op[at]] in letters and (stage[at], microbatch[at]) == (s, k)
        assert (table >= 0).sum() == np.isin(op, [LETTERS.index(letter) for letter in letters]).sum()
        assert not (table >= 0)[~visits].any()
    assert ((schedule.tables[0] >= 0) == visits).all() and not schedule.forward_only


@pytest.mark.parametrize("schedule", ALL)
def test_what_is_kept_is_the_order_without_the_rest(schedule):
    """Complete for every smaller number; nothing changes its place; more than there are cannot be kept."""
    if schedule.topology.num_routes > 1:
        with pytest.raises(ScheduleError, match="on 2 routes"):
            schedule.keep(1)
        return
    for count in range(1, schedule.num_microbatches + 1):
        kept = schedule.keep(count)
        check(kept)
        for worker in range(schedule.topology.num_workers):
            assert kept.actions(worker) == [a for a in schedule.actions(worker) if a[2] < count]
    assert schedule.keep(schedule.num_microbatches) == schedule
    with pytest.raises(ScheduleError, match=f"keep at most these, of one route, not {schedule.num_microbatches + 1}"):
        schedule.keep(schedule.num_microbatches + 1)


def test_a_block_that_loses_half_is_no_block():
    """The first pair stays one, the second loses its backward."""
    schedule = Schedule.from_text("0F0,(0F1;0B0)OVERLAP_F_B,(0B1;0F2)OVERLAP_F_B,0B2\n")
    assert schedule.to_text() == "0F0,(0F1;0B0)OVERLAP_F_B,(0B1;0F2)OVERLAP_F_B,0B2\n"
    assert schedule.visible.tolist() == [0, 2, 2, 4, 4, 5]
    kept = schedule.keep(2)
    assert kept.to_text() == "0F0,(0F1;0B0)OVERLAP_F_B,0B1\n" and kept.visible.tolist() == [0, 2, 2, 3]


@pytest.mark.parametrize("schedule", ALL)
def test_equal_is_what_runs_the_same(schedule):
    again = Schedule("another name", schedule.topology, schedule.num_microbatches, schedule.lanes, schedule.pairs)
    assert again == schedule and schedule != schedule.to_text()
    first = schedule.lanes[0]
    swapped = Lane(*(np.concatenate([column[1::-1], column[2:]]) for column in first))
    other = Schedule(schedule.name, schedule.topology, schedule.num_microbatches, (swapped, *schedule.lanes[1:]),
                     schedule.pairs)
    assert other != schedule
    with pytest.raises(TypeError, match="unhashable"):
        hash(schedule)


@pytest.mark.parametrize("seed", range(12))
def test_keys_are_a_stable_sort(seed):
    """Equal keys keep the order in which their groups are given, and that of their numbers."""
    draw = np.random.default_rng(seed)
    groups = []
    for op in range(3):
        count = int(draw.integers(0, 9))
        groups.append((op, np.full(count, op % 2), np.arange(count), draw.integers(0, 4, count)))
    made = from_keys("drawn", Topology((0, 0)), 9, [groups])
    flat = [(key, LETTERS[op], int(stage), int(k)) for op, stages, ks, keys in groups
            for stage, k, key in zip(stages, ks, keys)]
    assert made.actions(0) == [entry[1:] for entry in sorted(flat, key=lambda entry: entry[0])]


# -- what V schedules are built with ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_a_lane_builder_counts_each_letter_of_each_stage(seed):
    """Against counters kept by hand; a fused backward counts as both halves."""
    draw, builder = random.Random(seed), LaneBuilder((2, 5), (range(10, 99), range(50, 99)))
    expected, counters = [], {(chunk, half): 0 for chunk in (0, 1) for half in "FIW"}
    for _ in range(draw.randint(1, 40)):
        letter, chunk = draw.choice("FBIW"), draw.randint(0, 1)
        builder.append(f"{letter}{chunk}")
        halves = {"F": "F", "I": "I", "W": "W", "B": "IW"}[letter]
        # Both halves of a fused backward have the same micro-batch in a schedule; here the last one written wins.
        number = counters[chunk, halves[-1]]
        for half in halves:
            counters[chunk, half] += 1
        expected.append((letter, (2, 5)[chunk], (10, 50)[chunk] + number))
    op, stage, microbatch = builder.lane()
    assert list(zip((LETTERS[o] for o in op), stage.tolist(), microbatch.tolist())) == expected
    assert not builder.pairs().any()


def test_blocks_are_marked_at_their_first_action():
    builder = LaneBuilder((0, 1), (range(9), range(9)))
    builder.append("F0", times=2)
    builder.append_blocks("F0", "B0", times=2)
    builder.append_blocks("F1", "B1", times=0)
    builder.append("B0")
    assert builder.pairs().tolist() == [False, False, True, False, True, False, False]


@pytest.mark.parametrize("down", (1, 2))
@pytest.mark.parametrize("p", range(1, 14))
def test_repeated_blocks_never_meet_and_keep_the_order_of_a_micro_batch(p, down):
    """Six actions of a worker at six slots; F before I before W, and each message after what it carries."""
    block = _block(p, down)
    for slots in block:
        assert {slot % PERIOD for slot in slots.values()} == set(range(PERIOD))
        for chunk in (0, 1):
            f, i, w = (slots[op, chunk] for op in (0, 2, 3))
            assert f < i < w <= i + PERIOD
    for here, there in zip(block, block[1:]):
        assert here[0, 0] < there[0, 0] and there[0, 1] < here[0, 1], "there and back"
        assert here[2, 1] < there[2, 1] and there[2, 0] < here[2, 0], "gradients too"
    assert block[-1][0, 0] < block[-1][0, 1] < block[0][2, 1]


@pytest.mark.parametrize("p", (2, 4, 7))
def test_what_a_repeated_block_keeps_is_counted_micro_batch_by_micro_batch(p):
    """Of micro-batches that start six slots apart, those between their F and the end of their W, stages counted."""
    for slots in _block(p, 1):
        alive = [sum(slots[0, chunk] + PERIOD * k <= t <= slots[3, chunk] + PERIOD * k for chunk in (0, 1)
                     for k in range(-60, 60)) for t in range(200, 200 + PERIOD)]
        assert _alive(slots) == max(alive)
