"""Workers as threads of one process, and a pipeline that is nothing but its tensors: for tests of what is on disk."""
import threading
from collections.abc import Callable, Mapping

import torch
from torch import nn

from pipeengine.checkpoint import Holdings
from pipeengine.distributed import Wishes
from pipeengine.distributed.activity import Unwatched


class ThreadWorkers:
    """One of ``size`` threads that meet at a barrier; the same promises as the workers of a process group."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, slots: dict):
        self.rank, self.size, self.backend, self.wishes = rank, size, None, Wishes()
        self._barrier, self._slots = barrier, slots
        self.activity = Unwatched()

    def agree(self, facts, problem, names):
        self.all_gather_object(None)

    def all_gather_object(self, value):
        self._slots[self.rank] = value
        self._barrier.wait(30)
        values = [self._slots[rank] for rank in range(self.size)]
        self._barrier.wait(30)
        return values

    def broadcast_object(self, value, source=0):
        return self.all_gather_object(value)[source]

    def run_synchronized(self, what):
        result, problem = None, None
        try:
            result = what()
        except Exception as error:
            problem = error
        for rank, other in enumerate(self.all_gather_object(problem)):
            if other is not None:
                raise other if rank == self.rank else type(other)(f"{other} (on worker {rank})")
        return result


class Fake:
    """A trained thing: ``model`` on every worker, each tensor owned by the worker that ``owner`` says."""

    def __init__(self, model: nn.Module, owner: Mapping[str, int], workers: ThreadWorkers):
        self.model, self.workers = model, workers
        self.first = {name: name for name, _ in model.named_parameters()}
        self.held = frozenset(name for name, rank in owner.items() if rank == workers.rank)
        self.numbers = {"step": 0, "calls": 0}

    def holdings(self) -> Holdings:
        return Holdings(self.model, self.first, self.held, self.held, self.workers, "gpipe", self.workers.size, dict,
                        lambda: dict(self.numbers), self.numbers.update, lambda: None,
                        lambda what, harmless=(): what())

    def parameters(self):
        return [p for name, p in self.model.named_parameters() if name in self.held]


def model(fill: float) -> nn.Module:
    made = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(fill)
    return made


def as_threads(size: int, work: Callable[[ThreadWorkers], object]) -> list:
    """``work(workers)`` on ``size`` threads at once; what each returns. The first error is raised."""
    barrier, slots, results, errors = threading.Barrier(size), {}, [None] * size, []

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadWorkers(rank, size, barrier, slots))
        except BaseException as error:
            errors.append(error)
            barrier.abort()
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return results


def owners(size: int) -> dict[str, int]:
    return {f"{layer}.{kind}": layer % size for layer in range(3) for kind in ("weight", "bias")}
