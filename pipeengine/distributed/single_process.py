"""One process that is all workers of a pipeline."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from pipeengine.distributed.activity import Unwatched
from pipeengine.distributed.board import LocalBoard
from pipeengine.distributed.buckets import Copies
from pipeengine.distributed.grid import Grid
from pipeengine.distributed.local import LocalTransport, Transport
from pipeengine.distributed.sharding import Sharding
from pipeengine.distributed.tied_parameters import NoTies, Tie
from pipeengine.distributed.wishes import Wishes
from pipeengine.errors import PipeEngineError

T = TypeVar("T")


class SingleProcess:
    """One process that runs every stage."""

    rank, size = 0, 1
    grid = Grid(1, 1, 0, 0)
    backend = None

    def __init__(self) -> None:
        self.activity = Unwatched()
        self._published: dict[int, str] = {}
        self.wishes, self.board = Wishes(), LocalBoard()

    def arrange(self, num_replicas: int) -> None:
        """One pipeline, as ever."""

    def run_synchronized(self, what: Callable[[], T]) -> T:
        """Do it."""
        return what()

    def agree(self, facts: Sequence[int], problem: PipeEngineError | None, names: Sequence[str],
              told: Sequence[int] = (), explain: Callable[[str], Mapping[str, str]] | None = None
              ) -> Sequence[Sequence[int]]:
        """Raise the ``problem``, if there is one."""
        self.wishes.hear(self.wishes.own())
        if problem is not None:
            raise problem
        return ()

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """The value itself."""
        return value

    def all_gather_object(self, value: T) -> list[T]:
        """A list of the one value."""
        return [value]

    def broadcast(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """The tensor itself."""
        return tensor

    def send_to_first(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """The tensor itself."""
        return tensor

    def all_reduce(self, tensor: torch.Tensor, largest: bool = False) -> torch.Tensor:
        """The tensor itself."""
        return tensor

    def connect_stages(self, worker_of: Sequence[int], device: torch.device) -> Transport:
        """Stages hand values over as they are."""
        return LocalTransport()

    def tie(self, ties: Sequence[Tie], tensors: Mapping[str, torch.Tensor], device: torch.device) -> NoTies:
        """Aliases are one tensor here: nothing to keep equal."""
        return NoTies()

    def replicate(self, copies: Sequence[Copies], tensors: Mapping[str, torch.Tensor],
                  owner: Mapping[str, int] | None, sharding: Sharding | None = None) -> NoTies:
        """One process has no replicas."""
        return NoTies()

    def fail(self, error: BaseException, where: str) -> BaseException:
        """Nobody to tell: the error as it is."""
        return error

    def publish(self, text: str) -> None:
        """Keep the text."""
        self._published = {0: text}

    def published(self) -> dict[int, str]:
        """The text kept last, if any, as that of worker 0."""
        return self._published

    def close(self) -> None:
        """No connections to give up."""
