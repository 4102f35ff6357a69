"""What a checkpoint needs to know of a pipeline, in one value."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from pipeengine.checkpoint.slots import get_tensor, tensor_slots
from pipeengine.checkpoint.whole_tensors import Collect, as_it_is
from pipeengine.distributed import Workers


@dataclass(frozen=True)
class Holdings:
    """One worker's share of a pipeline: tensors of ``model`` by first name, what this worker has (``held``) and what it
    writes (``owned``).

    ``counters`` gives the numbers that steps are keyed by (dropout follows them), ``set_counters`` puts them back.
    ``guarded`` runs what talks to other workers, so that a failure is the same on all. ``plan`` gives the plan as JSON.
    ``writers`` are the workers that write weights, ascending: all, unless some own none because others have copies.
    ``owner`` is the worker that writes each tensor, on which ``collect`` makes it whole where it is sharded.
    """

    model: torch.nn.Module
    first_name: Mapping[str, str]
    held: frozenset[str]
    owned: frozenset[str]
    workers: Workers
    schedule: str
    num_stages: int
    plan: Callable[[], Mapping]
    counters: Callable[[], dict[str, int]]
    set_counters: Callable[[Mapping[str, int]], None]
    check_open: Callable[[], None]
    guarded: Callable[..., object]
    writers: Sequence[int] | None = None
    owner: Mapping[str, int] = field(default_factory=dict)
    collect: Collect = as_it_is

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Held parameters under their first names."""
        return ((name, p) for name, p in self.model.named_parameters() if name in self.held)

    def persistent(self) -> dict[str, torch.Tensor]:
        """Held parameters and persistent buffers under their first names."""
        state = set(self.model.state_dict(keep_vars=True))
        kept = {first for name, first in self.first_name.items() if name in state}
        return {name: get_tensor(*places[0]) for name, places in tensor_slots(self.model).items()
                if name in kept and name in self.held}


class Trained(Protocol):
    """A pipeline, as far as checkpoints know it."""

    def holdings(self) -> Holdings:
        """This worker's share."""
