"""The rules that every schedule and program must keep, and errors that show the lines that break them."""
from __future__ import annotations

from typing import TYPE_CHECKING, Sequence

import numpy as np

from pipeengine.critical_path import Stuck, Wait, solve
from pipeengine.errors import ScheduleError
from pipeengine.schedules.form import LETTERS, B, Edge, F, I, Schedule, W
from pipeengine.timeline import OPS, RA, RG, SA, SG, Costs, peak_activations, tables, waits

if TYPE_CHECKING:
    from pipeengine.program import Program


def check_schedule(schedule: Schedule, edges: Sequence[Edge], max_peak: float | Sequence[float] | None,
                   costs: Costs | None) -> None:
    """Rules on computations: in range, owned, each once, possible in this order, under the cap."""
    _in_range(schedule)
    _each_once(schedule)
    _local_order(schedule, edges)
    _completes(schedule, edges)
    if max_peak is not None:
        _under_cap(schedule, max_peak, costs)


def _at(order: Schedule | Program, index: int) -> str:
    """Where an entry of ``columns`` is, for a person: ``worker 1, line 3: 1F2``."""
    worker = int(np.searchsorted(order.starts, index, side="right")) - 1
    return f"worker {worker}, line {index - int(order.starts[worker]) + 1}: {_text(order, index)}"


def _text(order: Schedule | Program, index: int) -> str:
    op, stage, microbatch, *peer = (column[index] for column in order.columns)
    return f"{stage}{OPS[op]}{microbatch}" + (f"@{peer[0]}" if peer and peer[0] >= 0 else "")


def _in_range(schedule: Schedule) -> None:
    op, stage, microbatch = schedule.columns
    topology = schedule.topology
    outside = (op > W) | (stage < 0) | (stage >= topology.num_stages) | (microbatch < 0) | (
        microbatch >= schedule.num_microbatches)
    if outside.any():
        i = int(outside.argmax())
        raise ScheduleError(f"worker line {i}: action ({op[i]}, stage {stage[i]}, micro-batch {microbatch[i]}) is outside "
                            f"{len(LETTERS)} letters, {topology.num_stages} stages, {schedule.num_microbatches} micro-batches")
    worker = np.repeat(np.arange(topology.num_workers), np.diff(schedule.starts))
    wrong = np.asarray(topology.worker_of)[stage] != worker
    if wrong.any():
        i = int(wrong.argmax())
        raise ScheduleError(f"{_at(schedule, i)}: stage {stage[i]} belongs to worker {topology.worker_of[stage[i]]}, "
                            f"not {worker[i]}; move the action or change the topology")


def _each_once(schedule: Schedule) -> None:
    op, stage, microbatch = schedule.columns
    shape = schedule.topology.num_stages, schedule.num_microbatches
    flat = stage.astype(np.int64) * shape[1] + microbatch
    count = {letter: np.bincount(flat[op == letter], minlength=shape[0] * shape[1]).reshape(shape)
             for letter in (F, B, I, W)}
    visits = schedule.topology.visits(shape[1])
    for letter in (F, B, I, W):
        if (count[letter] > visits).any():
            s, m = np.argwhere(count[letter] > visits)[0]
            lines = np.flatnonzero((op == letter) & (stage == s) & (microbatch == m))
            limit = "; one is enough" if visits[s, m] else f"; micro-batch {m} takes another route"
            raise ScheduleError(f"{count[letter][s, m]} times {s}{LETTERS[letter]}{m}: "
                                f"{' and '.join(_at(schedule, i) for i in lines[:2])}{limit}")
    _none_missing(count, visits, schedule.forward_only)


def _none_missing(count: dict[int, np.ndarray], visits: np.ndarray, forward_only: bool) -> None:
    def refuse(wrong: np.ndarray, what: str) -> None:
        if wrong.any():
            s, m = np.argwhere(wrong)[0]
            raise ScheduleError(f"stage {s}, micro-batch {m}: {what} ({int(wrong.sum())} such pairs)")
    refuse(count[F] < visits, "no F; every stage runs every micro-batch of its route forward once")
    if forward_only:
        return
    refuse((count[B] > 0) & (count[I] + count[W] > 0), "both B and I or W; B stands for I and W together, keep one form")
    refuse((count[B] + count[I] < visits), "no B and no I; give one B, or one I and one W")
    refuse((count[I] != count[W]), "I without W or W without I; the two halves of backward come in pairs")


def _local_order(schedule: Schedule, edges: Sequence[Edge]) -> None:
    forward, backward, weight = tables(schedule)
    pairs = [(forward, backward, "its forward"), (backward, weight, "its input gradient")]
    for before, after, what in pairs:
        wrong = (before >= 0) & (after >= 0) & (before > after)
        if wrong.any():
            s, m = np.argwhere(wrong)[0]
            raise ScheduleError(f"{_at(schedule, after[s, m])} comes before {what}, {_at(schedule, before[s, m])}; swap them")
    for on, _ in waits(schedule, edges, local=True):
        late = np.flatnonzero(on > np.arange(len(on)))
        if len(late):
            i = int(late[0])
            raise ScheduleError(f"{_at(schedule, i)} needs what {_at(schedule, int(on[i]))} makes, later on the same worker; "
                                "swap them")


def _completes(schedule: Schedule, edges: Sequence[Edge]) -> None:
    columns = waits(schedule, edges)
    try:
        solve(schedule.starts, np.ones(schedule.num_actions), columns)
    except Stuck as stuck:
        raise ScheduleError(_cycle(schedule, columns, stuck.position)) from None


def _cycle(order: Schedule | Program, columns: Sequence[Wait], position: np.ndarray) -> str:
    """The circle of lanes that wait for each other, as text."""
    def blocker(lane: int) -> int | None:
        i = int(position[lane])
        ons = [int(on[i]) for on, _ in columns if on[i] >= 0]
        for on in ons:
            there = int(np.searchsorted(order.starts, on, side="right")) - 1
            if on >= position[there]:
                return on
        return None
    lane = next(w for w in range(len(position)) if position[w] < order.starts[w + 1])
    seen: list[int] = []
    while lane not in seen:
        seen.append(lane)
        lane = int(np.searchsorted(order.starts, blocker(lane), side="right")) - 1
    circle = seen[seen.index(lane):]
    lines = [f"  {_at(order, int(position[w]))} waits for {_at(order, blocker(w))}" for w in circle]
    return (f"order {order.name} cannot complete: {len(circle)} worker{'s' * (len(circle) > 1)} wait in a circle\n"
            + "\n".join(lines) + "\nmove one of the awaited actions up")


def _under_cap(schedule: Schedule, max_peak: float | Sequence[float], costs: Costs | None) -> None:
    peak = peak_activations(schedule, costs)
    cap = np.broadcast_to(np.asarray(max_peak, float), peak.shape)
    over = peak > cap * (1 + 1e-9)
    if over.any():
        w = int(np.argmax(peak - cap))
        raise ScheduleError(f"worker {w} keeps {peak[w]:,.6g} of activations, the cap is {cap[w]:,.6g}; "
                            "try a schedule with a smaller peak, or more micro-batches of fewer rows")


def check_messages(program: Program, edges: Sequence[Edge]) -> None:
    """Rules on messages: each sent and received once where it belongs, first in first out per pair, no deadlock."""
    send, receive = _matched(program, edges)
    _between(program, send, receive, edges)
    _first_in_first_out(program, send, receive)
    _no_deadlock(program, send, receive)


def _keys(program: Program, edges: Sequence[Edge]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of message lines, their key (kind, edge, micro-batch), and the keys that must be there."""
    stages, batches = program.topology.num_stages, program.num_microbatches
    op, stage, microbatch, peer = program.columns
    lines = np.flatnonzero(op >= SA)
    op, stage, peer, microbatch = op[lines], stage[lines].astype(np.int64), peer[lines].astype(np.int64), microbatch[lines]
    at_source = (op == SA) | (op == RG)
    code = np.where(at_source, stage * stages + peer, peer * stages + stage)
    grad = (op == SG) | (op == RG)
    keys = (grad * stages * stages + code) * batches + microbatch
    visits, owner, wanted = program.topology.visits(batches), program.topology.worker_of, []
    for edge in edges:
        if owner[edge.source] != owner[edge.target]:
            both = np.flatnonzero(visits[edge.source] & visits[edge.target])
            for grad, there in ((0, edge.activation), (1, edge.gradient and not program.schedule.forward_only)):
                if there:
                    wanted.append(((grad * stages + edge.source) * stages + edge.target) * batches + both)
    return lines, keys, np.sort(np.concatenate(wanted)) if wanted else np.zeros(0, np.int64)


def _matched(program: Program, edges: Sequence[Edge]) -> tuple[np.ndarray, np.ndarray]:
    """The line of each message's send and of its receive, in the order of the keys."""
    lines, keys, wanted = _keys(program, edges)
    op, stage = program.columns.op[lines], program.columns.stage[lines]
    worker = np.searchsorted(program.starts, lines, side="right") - 1
    wrong = np.asarray(program.topology.worker_of)[stage] != worker
    if wrong.any():
        i = int(wrong.argmax())
        raise ScheduleError(f"{_at(program, lines[i])}: stage {stage[i]} belongs to worker "
                            f"{program.topology.worker_of[stage[i]]}, not {worker[i]}; move the message")
    found = []
    for name, which in (("send", (op == SA) | (op == SG)), ("receive", (op == RA) | (op == RG))):
        order = np.argsort(keys[which], kind="stable")
        have = keys[which][order]
        if len(have) != len(wanted) or (have != wanted).any():
            raise ScheduleError(_mismatch(program, name, have, wanted, lines[which][order]))
        found.append(lines[which][order])
    return found[0], found[1]


def _mismatch(program: Program, name: str, have: np.ndarray, wanted: np.ndarray, lines: np.ndarray) -> str:
    stages, batches = program.topology.num_stages, program.num_microbatches
    missing = np.setdiff1d(wanted, have)
    if len(missing):
        edge, microbatch = divmod(int(missing[0]), batches)
        grad, source, target = edge // stages ** 2, edge // stages % stages, edge % stages
        what = "gradient" if grad else "activation"
        return (f"no {name} of the {what} between stages {source} and {target} for micro-batch {microbatch}; "
                f"{len(have)} {name}s for {len(wanted)} messages")
    extra = np.flatnonzero(~np.isin(have, wanted) | np.concatenate([[False], have[1:] == have[:-1]]))
    return (f"{_at(program, lines[extra[0]])}: this {name} is there twice or belongs to no boundary; "
            f"{len(have)} {name}s for {len(wanted)} messages")


def _between(program: Program, send: np.ndarray, receive: np.ndarray, edges: Sequence[Edge]) -> None:
    """A send stands after its producer, a receive before its consumer."""
    position = np.flatnonzero(program.columns.op < SA)
    forward, backward, _ = (np.where(t >= 0, position[t], -1) for t in tables(program.schedule))
    op, stage, microbatch, _ = (column[send] for column in program.columns)
    producer = np.where(op == SA, forward[stage, microbatch], backward[stage, microbatch])
    if (producer > send).any():
        i = int((producer > send).argmax())
        raise ScheduleError(f"{_at(program, send[i])} sends before {_at(program, producer[i])} has made it; swap them")
    op, stage, microbatch, _ = (column[receive] for column in program.columns)
    consumer = np.where(op == RA, forward[stage, microbatch], backward[stage, microbatch])
    if (consumer < receive).any():
        i = int((consumer < receive).argmax())
        raise ScheduleError(f"{_at(program, receive[i])} is posted after {_at(program, consumer[i])} needs it; swap them")


def _first_in_first_out(program: Program, send: np.ndarray, receive: np.ndarray) -> None:
    workers = program.topology.num_workers
    giver = np.searchsorted(program.starts, send, side="right") - 1
    taker = np.searchsorted(program.starts, receive, side="right") - 1
    order = np.lexsort((send, giver * workers + taker))
    pair, arrived = (giver * workers + taker)[order], receive[order]
    crossed = np.flatnonzero((pair[1:] == pair[:-1]) & (arrived[1:] < arrived[:-1]))
    if len(crossed):
        first, second = order[crossed[0]], order[crossed[0] + 1]
        raise ScheduleError(
            f"sent as {_at(program, send[first])}, then {_text(program, send[second])}, but received as "
            f"{_at(program, receive[second])}, then {_text(program, receive[first])}: a channel without tags would "
            "deliver the wrong one; put both sides in the same order")


def _no_deadlock(program: Program, send: np.ndarray, receive: np.ndarray) -> None:
    """Sends block until received, receives are posted without blocking, all messages of a worker share one channel.

    A send starts when its receive is posted and both workers' earlier messages are through.
    """
    n = program.num_actions
    none = np.full(n, -1, np.int64)
    sent_by = none.copy()
    sent_by[receive] = send
    posted, mine, theirs = none.copy(), none.copy(), none.copy()
    posted[send] = receive
    earlier = _latest_receive_before(program)
    mine[send] = np.where(earlier[send] >= 0, sent_by[earlier[send]], -1)
    theirs[send] = np.where(earlier[receive] >= 0, sent_by[earlier[receive]], -1)
    columns = [Wait(on, np.zeros(n)) for on in (posted, mine, theirs)]
    columns += _arrivals(program, send, receive)
    try:
        solve(program.starts, np.ones(n), tuple(columns))
    except Stuck as stuck:
        raise ScheduleError("deadlock when sends block: " + _cycle(program, columns, stuck.position)) from None


def _latest_receive_before(program: Program) -> np.ndarray:
    """For each line the nearest earlier receive of the same worker, -1 for none."""
    op = program.columns.op
    latest = np.where((op == RA) | (op == RG), np.arange(len(op)), -1)
    latest = np.concatenate([[-1], np.maximum.accumulate(latest)[:-1]]) if len(op) else latest
    lane_start = np.repeat(program.starts[:-1], np.diff(program.starts))
    return np.where(latest >= lane_start, latest, -1)


def _arrivals(program: Program, send: np.ndarray, receive: np.ndarray) -> list[Wait]:
    """Each computation waits for the sends of what it receives."""
    n = program.num_actions
    position = np.flatnonzero(program.columns.op < SA)
    forward, backward, _ = (np.where(t >= 0, position[t], -1) for t in tables(program.schedule))
    op, stage, microbatch, _ = (column[receive] for column in program.columns)
    consumer = np.where(op == RA, forward[stage, microbatch], backward[stage, microbatch])
    columns: list[Wait] = []
    left = np.arange(len(receive))
    while len(left):
        _, first = np.unique(consumer[left], return_index=True)
        on = np.full(n, -1, np.int64)
        on[consumer[left[first]]] = send[left[first]]
        columns.append(Wait(on, np.zeros(n)))
        left = np.delete(left, first)
    return columns
