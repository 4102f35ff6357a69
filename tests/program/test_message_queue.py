"""Messages of one channel per worker: against a slow, plain simulation of the same rules, and one exact picture."""
import random

import numpy as np
import pytest

from pipeengine.program.message_queue import Queue, one_at_a_time


def plain(starts, duration, queue):
    """Every moment at which something may change, in order; at each: what ends, what is computed, what is sent."""
    lanes, count = len(starts) - 1, len(queue.made)
    begin, sent, ready = {}, {}, {}
    at, now = list(starts[:-1]), 0

    def ended(action):
        return action in begin and begin[action] + duration[action] <= now

    def through(message):
        return message in sent and sent[message] + queue.latency[message] <= now

    def carries(worker):
        return any(worker in (queue.sender[m], queue.receiver[m]) and not through(m) for m in sent)

    while True:
        for lane in range(lanes):
            i = at[lane]
            if i < starts[lane + 1] and (i == starts[lane] or ended(i - 1)) and all(
                    through(m) for m in range(count) if queue.used[m] == i):
                begin[i], at[lane] = now, i + 1
        for m in range(count):
            if m not in ready and ended(queue.made[m]) and (queue.after[m] < 0 or queue.after[m] in begin):
                ready[m] = now
        for m in sorted(set(ready) - set(sent), key=lambda m: (queue.urgency[m], m)):
            ends = {queue.sender[m], queue.receiver[m]}
            # One that is being made, will be there sooner and is more urgent by all of this one's time goes first.
            better = any(queue.made[other] in begin and not ended(queue.made[other])
                         and ends & {queue.sender[other], queue.receiver[other]}
                         and begin[queue.made[other]] + duration[queue.made[other]] < now + queue.latency[m]
                         and queue.urgency[other] < queue.urgency[m] - queue.latency[m] for other in range(count))
            if not better and not any(map(carries, ends)):
                sent[m] = now
        moments = [begin[i] + duration[i] for i in begin] + [sent[m] + queue.latency[m] for m in sent]
        later = [moment for moment in moments if moment > now]
        if not later:
            return begin, ready, sent
        now = min(later)


def random_case(seed):
    """Three lanes in a row, whole seconds, so that many things happen at once; messages go to later actions."""
    draw = random.Random(seed)
    sizes = [draw.randint(1, 6) for _ in range(3)]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    rank = {}
    for lane, size in enumerate(sizes):
        for k, place in enumerate(sorted(draw.random() for _ in range(size))):
            rank[starts[lane] + k] = (place, lane)
    rows = []
    for _ in range(draw.randint(0, 10)):
        giver, taker = draw.sample(range(3), 2)
        made, used = draw.randrange(*starts[giver:giver + 2]), draw.randrange(*starts[taker:taker + 2])
        if rank[made] < rank[used]:
            after = draw.choice([-1, *(i for i in range(*starts[taker:taker + 2]) if rank[i] < rank[used])])
            rows.append((giver, taker, made, used, draw.randint(1, 4), draw.randint(0, 12), after))
    columns = [np.array(column) for column in zip(*rows)] or [np.zeros(0, int)] * 7
    return starts, np.array([draw.randint(1, 5) for _ in rank]), Queue(*columns)


@pytest.mark.parametrize("block", range(6))
def test_times_are_those_of_a_plain_simulation(block):
    for seed in range(100 * block, 100 * block + 100):
        starts, duration, queue = random_case(seed)
        begin, ready, sent = plain(starts.tolist(), duration.tolist(), Queue(*(c.tolist() for c in queue)))
        times = one_at_a_time(starts, duration, queue)
        for name, truth in (("begin", begin), ("ready", ready), ("sent", sent)):
            assert dict(enumerate(getattr(times, name).tolist())) == pytest.approx(truth), (seed, name)


def test_an_urgent_message_passes_one_that_was_made_before():
    """Both are made by the first lane's two actions; the second lane needs the later one first."""
    queue = Queue(*(np.array(column) for column in zip((0, 1, 0, 3, 4, 9, -1), (0, 1, 1, 2, 4, 2, -1))))
    times = one_at_a_time(np.array([0, 2, 4]), np.array([1.0, 1.0, 1.0, 1.0]), queue)
    assert times.sent.tolist() == [6.0, 2.0] and times.begin.tolist() == [0.0, 1.0, 6.0, 10.0]
