"""The rules that every schedule and program must keep, and errors that show the lines that break them."""
from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pipeengine.errors import ScheduleError
from pipeengine.program.program import Program
from pipeengine.program.reductions import check_reductions
from pipeengine.schedules import LETTERS, B, Edge, F, I, Schedule, W
from pipeengine.simulation import OPS, RA, RG, SA, SG, Costs, Stuck, Wait, completes, peak_activations, waits


def check(order: Schedule | Program, *, edges: Sequence[Edge] | None = None,
          max_peak: float | Sequence[float] | None = None, costs: Costs | None = None) -> None:
    """Raise ``ScheduleError`` unless ``order`` completes, whatever the times.

    Every action once and on the worker that owns its stage; every dependency reachable; peak activations (of
    ``costs``, else in micro-batches of a whole worker) at most ``max_peak``. A program also: every message sent
    and received once, in the same order by both workers of each pair, and no deadlock even when each send blocks
    until it is received and all messages of a worker share one in-order channel.
    """
    if isinstance(order, Schedule):
        check_schedule(order, tuple(order.topology.chain() if edges is None else edges), max_peak, costs)
    else:
        check_program(order, tuple(order.edges if edges is None else edges), max_peak, costs)



def check_schedule(schedule: Schedule, edges: Sequence[Edge], max_peak: float | Sequence[float] | None,
                   costs: Costs | None) -> None:
    """Rules on computations: in range, owned, each once, possible in this order, under the cap."""
    _each_where_it_belongs(schedule, edges)
    _completes(schedule, edges)
    if max_peak is not None:
        _under_cap(schedule, max_peak, costs)


def check_program(program: Program, edges: Sequence[Edge], max_peak: float | Sequence[float] | None,
                  costs: Costs | None) -> None:
    """Those rules, and each message sent and received once where it belongs, first in first out per pair, no
    deadlock."""
    schedule = program.schedule
    check_reductions(program, program.topology.worker_of)
    _each_where_it_belongs(schedule, edges)
    send, receive = _matched(program, edges)
    consumer = _between(program, send, receive)
    proved = _in_order_of_time(program, send, receive)
    # All that crosses workers is a message: where messages are proved to complete, so is the schedule.
    if not proved:
        _completes(schedule, edges)
        _first_in_first_out(program, send, receive)
        _no_deadlock(program, send, receive, consumer)
    if max_peak is not None:
        _under_cap(schedule, max_peak, costs)


def _each_where_it_belongs(schedule: Schedule, edges: Sequence[Edge]) -> None:
    _in_range(schedule)
    _each_once(schedule)
    _local_order(schedule, edges)


def _at(order: Schedule | Program, index: int) -> str:
    """Where an entry of ``columns`` is, for a person: ``worker 1, line 3: 1F2``."""
    worker = int(np.searchsorted(order.starts, index, side="right")) - 1
    return f"worker {worker}, line {index - int(order.starts[worker]) + 1}: {_text(order, index)}"


def _text(order: Schedule | Program, index: int) -> str:
    op, stage, microbatch, *peer = (column[index] for column in order.columns)
    number = str(microbatch) if microbatch >= 0 else ""
    return f"{stage}{OPS[op]}{number}" + (f"@{peer[0]}" if peer and peer[0] >= 0 else "")


def _in_range(schedule: Schedule) -> None:
    op, stage, microbatch = schedule.columns
    topology = schedule.topology
    outside = (op > W) | (stage < 0) | (stage >= topology.num_stages) | (microbatch < 0) | (
        microbatch >= schedule.num_microbatches)
    if outside.any():
        i = int(outside.argmax())
        raise ScheduleError(
            f"entry {i} has operation {op[i]}, stage {stage[i]} and micro-batch {microbatch[i]}, outside "
            f"the {len(LETTERS)} letters, {topology.num_stages} stages and {schedule.num_microbatches} "
            "micro-batches; number all from 0"
        )
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
    refuse(
        (count[B] > 0) & (count[I] + count[W] > 0), "both B and I or W; B stands for I and W together, keep one form"
    )
    refuse((count[B] + count[I] < visits), "no B and no I; give one B, or one I and one W")
    refuse((count[I] != count[W]), "I without W or W without I; the two halves of backward come in pairs")


def _local_order(schedule: Schedule, edges: Sequence[Edge]) -> None:
    forward, backward, weight = schedule.tables
    pairs = [(forward, backward, "its forward"), (backward, weight, "its input gradient")]
    for before, after, what in pairs:
        wrong = (before >= 0) & (after >= 0) & (before > after)
        if wrong.any():
            s, m = np.argwhere(wrong)[0]
            raise ScheduleError(f"{_at(schedule, after[s, m])} comes before {what}, {_at(schedule, before[s, m])}; "
                                "swap them")
    for on, _ in waits(schedule, edges, local=True):
        late = np.flatnonzero(on > np.arange(len(on)))
        if len(late):
            i = int(late[0])
            raise ScheduleError(f"{_at(schedule, i)} needs what {_at(schedule, int(on[i]))} makes, later on the same "
                                "worker; swap them")


def _completes(schedule: Schedule, edges: Sequence[Edge]) -> None:
    columns = waits(schedule, edges)
    try:
        completes(schedule.starts, columns)
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


def match_messages(program: Program) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The lines that send, that receive and that consume each message of a program."""
    send, receive = _matched(program, program.edges)
    return send, receive, _between(program, send, receive)


def _matched(program: Program, edges: Sequence[Edge]) -> tuple[np.ndarray, np.ndarray]:
    """The line of each message's send and of its receive: first activations, then gradients, by edge and
    micro-batch."""
    op = program.columns.op
    codes, expected = _wanted(program, edges)
    matched = []
    for name, first, second in (("send", SA, SG), ("receive", RA, RG)):
        parts = [np.flatnonzero(op == first), np.flatnonzero(op == second)]
        lines = np.concatenate(parts)
        slot = np.concatenate([_slots(program, part, kind, codes) for part, kind in zip(parts, (first, second))])
        # The last entry gathers the lines that have no slot.
        where = np.full(len(expected) + 1, -1, np.int64)
        where[slot] = lines
        if where[-1] >= 0 or not np.array_equal(where[slot], lines) or not np.array_equal(where[:-1] >= 0, expected):
            raise ScheduleError(_mismatch(program, name, lines, slot, expected, codes))
        matched.append(where[:-1][expected])
    _on_own_worker(program, np.concatenate(matched))
    return matched[0], matched[1]


def _wanted(program: Program, edges: Sequence[Edge]) -> tuple[np.ndarray, np.ndarray]:
    """Codes of the edges between workers, ascending, and per slot (kind, edge, micro-batch) whether a message must
    be."""
    stages, owner = program.topology.num_stages, program.topology.worker_of
    visits = program.topology.visits(program.num_microbatches)
    crossing = {edge.source * stages + edge.target: edge for edge in edges if owner[edge.source] != owner[edge.target]}
    codes = np.array(sorted(crossing), np.int64)
    backward = not program.schedule.forward_only
    rows = [(visits[crossing[code].source] & visits[crossing[code].target]) * there
            for kind in (0, 1) for code in codes.tolist()
            for there in [crossing[code].gradient and backward if kind else crossing[code].activation]]
    return codes, np.concatenate(rows).astype(bool) if rows else np.zeros(0, bool)


def _slots(program: Program, lines: np.ndarray, kind: int, codes: np.ndarray) -> np.ndarray:
    """The slot of each message line of one ``kind``, -1 where there is no such edge, direction or micro-batch."""
    stages, batches = program.topology.num_stages, program.num_microbatches
    _, stage, microbatch, peer = (column[lines] for column in program.columns)
    source, target = (stage, peer) if kind in (SA, RG) else (peer, stage)
    outside = (source < 0) | (source >= target) | (target >= stages) | (microbatch < 0) | (microbatch >= batches)
    code = source * np.int64(stages) + target
    code[outside] = stages * stages
    slot = _edges_of(code, codes, stages)
    missing = slot < 0
    slot *= batches
    slot += microbatch
    if kind in (SG, RG):
        slot += len(codes) * batches
    slot[missing] = -1
    return slot


def _edges_of(code: np.ndarray, codes: np.ndarray, stages: int) -> np.ndarray:
    """The number of each ``code`` (source stage * stages + target) among ``codes``, -1 for none."""
    if stages <= 2048:
        number = np.full(stages * stages + 1, -1, np.int64)
        number[codes] = np.arange(len(codes))
        return number[code]
    edge = np.minimum(np.searchsorted(codes, code), max(len(codes) - 1, 0))
    return np.where(codes[edge] == code, edge, -1) if len(codes) else np.full(len(code), -1, np.int64)


def _on_own_worker(program: Program, lines: np.ndarray) -> None:
    owner, stage = np.asarray(program.topology.worker_of), program.columns.stage[lines]
    wrong = (lines < program.starts[owner][stage]) | (lines >= program.starts[owner + 1][stage])
    if wrong.any():
        i = int(wrong.argmax())
        raise ScheduleError(f"{_at(program, lines[i])}: stage {stage[i]} belongs to worker {owner[stage[i]]}; "
                            "move the message there")


def _mismatch(program: Program, name: str, lines: np.ndarray, slot: np.ndarray, expected: np.ndarray,
              codes: np.ndarray) -> str:
    count = np.bincount(slot[slot >= 0], minlength=len(expected))
    total = f"{len(lines)} {name}s for {int(expected.sum())} messages"
    missing = np.flatnonzero(count < expected)
    if len(missing):
        edge, microbatch = divmod(int(missing[0]), program.num_microbatches)
        grad, edge = divmod(edge, len(codes))
        source, target = divmod(int(codes[edge]), program.topology.num_stages)
        return (f"no {name} of the {'gradient' if grad else 'activation'} between stages {source} and {target} for "
                f"micro-batch {microbatch}; {total}")
    extra = np.flatnonzero((slot < 0) | (count[slot] > expected[slot]) if len(expected) else slot < 0)
    return f"{_at(program, lines[extra[-1]])}: this {name} is there twice or belongs to no boundary; {total}"


def _between(program: Program, send: np.ndarray, receive: np.ndarray) -> np.ndarray:
    """A send stands after its producer, a receive before its consumer. Returns the lines of the consumers."""
    position = np.append(np.flatnonzero(program.columns.op < SA), -1)
    forward, backward, _ = program.schedule.tables

    def partner(lines: np.ndarray, forward_op: int) -> np.ndarray:
        op, stage, microbatch, _ = (column[lines] for column in program.columns)
        return position[np.where(op == forward_op, forward[stage, microbatch], backward[stage, microbatch])]
    producer, consumer = partner(send, SA), partner(receive, RA)
    if (producer > send).any():
        i = int((producer > send).argmax())
        raise ScheduleError(f"{_at(program, send[i])} sends before {_at(program, producer[i])} has made it; swap them")
    if (consumer < receive).any():
        i = int((consumer < receive).argmax())
        raise ScheduleError(
            f"{_at(program, receive[i])} is posted after {_at(program, consumer[i])} needs it; swap them"
        )
    return consumer


def _in_order_of_time(program: Program, send: np.ndarray, receive: np.ndarray) -> bool:
    """Whether ``program.planned`` proves both remaining rules, in a few array operations.

    It does when each message has one time, and every worker's messages ascend in (time, number): the least message
    that is not through has on both sides only smaller ones before it, and what is computed before it needs only these.
    So it can go through, whatever blocks.
    """
    if program.planned is None:
        return False
    time = np.concatenate(program.planned)
    if not np.array_equal(time[send], time[receive]):
        return False
    number = np.full(len(time), -1, np.int64)
    number[send] = number[receive] = np.arange(len(send))
    op = program.columns.op
    return _ascending(program.starts, time, number, np.flatnonzero((op >= SA) & (op <= RG)))


def _ascending(starts: np.ndarray, time: np.ndarray, number: np.ndarray, lines: np.ndarray) -> bool:
    """Whether ``lines`` ascend within each lane: in time, at equal times in number."""
    time = time[lines]
    ahead = time[1:] > time[:-1]
    tied = np.flatnonzero(~ahead & (time[1:] == time[:-1]))
    ahead[tied] = number[lines[tied + 1]] > number[lines[tied]]
    borders = np.searchsorted(lines, starts[1:-1]) - 1
    ahead[borders[(borders >= 0) & (borders < len(ahead))]] = True
    return bool(ahead.all())


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


def _no_deadlock(program: Program, send: np.ndarray, receive: np.ndarray, consumer: np.ndarray) -> None:
    """Sends block until received, receives are posted without blocking, all messages of a worker share one channel.

    A send starts when its receive is posted and both workers' earlier messages are through; a computation when the
    sends of all it receives are.
    """
    n = program.num_actions
    none = np.full(n, -1, np.int64)
    sent_by = none.copy()
    sent_by[receive] = send
    earlier = _latest_receive_before(program)
    ons = []
    for lines, on in ((send, receive), (send, np.where(earlier[send] >= 0, sent_by[earlier[send]], -1)),
                      (send, np.where(earlier[receive] >= 0, sent_by[earlier[receive]], -1)),
                      *one_each(consumer, send)):
        column = none.copy()
        column[lines] = on
        ons.append(column)
    columns = tuple(Wait(on, np.zeros(n)) for on in ons)
    try:
        completes(program.starts, columns)
    except Stuck as stuck:
        raise ScheduleError("deadlock when sends block: " + _cycle(program, columns, stuck.position)) from None


def one_each(waiter: np.ndarray, on: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The pairs in groups in which no waiter is there twice."""
    while len(waiter):
        _, first = np.unique(waiter, return_index=True)
        yield waiter[first], on[first]
        waiter, on = np.delete(waiter, first), np.delete(on, first)


def _latest_receive_before(program: Program) -> np.ndarray:
    """For each line the nearest earlier receive of the same worker, -1 for none."""
    op = program.columns.op
    latest = np.where((op == RA) | (op == RG), np.arange(len(op)), -1)
    latest = np.concatenate([[-1], np.maximum.accumulate(latest)[:-1]]) if len(op) else latest
    lane_start = np.repeat(program.starts[:-1], np.diff(program.starts))
    return np.where(latest >= lane_start, latest, -1)
