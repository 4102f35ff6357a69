"""Guards meet by what the store says alone; nobody waits for a meeting that is over."""
import threading

import pytest
import torch.distributed as dist

from pipeengine.distributed import ConnectionLost, GuardSettings
from pipeengine.distributed.guard import Guard
from pipeengine.distributed.waiting import Waiter
from pipeengine.errors import WorkerError


def meet(store: dist.Store, *ranks: int, size: int = 2, seconds: float = 20.0) -> list[int]:
    """The numbers of the meeting that guards of ``ranks``, each on a thread of its own, come to."""
    guards, numbers, errors = [Guard(rank, size, GuardSettings(join=seconds)) for rank in ranks], {}, []

    def come(guard: Guard) -> None:
        try:
            numbers[guard.rank] = guard.connect(store, lambda what: what())
        except WorkerError as error:
            errors.append(error)
    threads = [threading.Thread(target=come, args=(guard,)) for guard in guards]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for guard in guards:
            guard.close()
    if errors:
        raise errors[0]
    return [numbers[rank] for rank in ranks]


@pytest.mark.parametrize("alone", (0, 1))
def test_who_waited_alone_meets_the_others_afterwards(alone):
    """Worker 0 numbers: an attempt of its own that nobody came to is passed over, one of another is not counted."""
    store = dist.HashStore()
    assert meet(store, 0, 1) == [1, 1]
    with pytest.raises(WorkerError, match=f"worker {alone} has waited .* for worker {1 - alone} of 2"):
        meet(store, alone, seconds=0.1)
    assert meet(store, 0, 1) == [3 - alone] * 2
    assert meet(store, 0, 1) == [4 - alone] * 2


def test_who_was_called_off_is_not_counted_by_what_still_waits():
    """The thread that waited for worker 0 went on, came to the next meeting too, and made the one after it too late."""
    store, alone = dist.HashStore(), Guard(1, 2, GuardSettings(join=20.0))
    calls, waiter = [], Waiter(lambda: ConnectionLost("called off"), interval_seconds=0.01)

    def call(what):
        calls.append(threading.Thread(target=what, daemon=True))
        calls[0].start()
        return waiter.run(lambda: threading.Event().wait(0.1))
    with pytest.raises(ConnectionLost):
        alone.connect(store, call)
    assert [meet(store, 0, 1) for _ in range(3)] == [[1, 1], [2, 2], [3, 3]]
    alone.close()
    calls[0].join(5.0)
    assert not calls[0].is_alive()


def test_three_meet_where_one_has_seen_an_attempt_that_failed():
    """Workers 0 and 2 wait in vain for worker 1; it comes later than both, and to the next meeting."""
    store = dist.HashStore()
    with pytest.raises(WorkerError, match="has waited"):
        meet(store, 0, 2, size=3, seconds=0.1)
    assert meet(store, 0, 1, 2, size=3) == [2, 2, 2]
