"""Forwards that run twice: activations that are computed again in backward instead of being kept."""
from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from pipeengine.errors import InputError
from pipeengine.rng import RngStreams
from pipeengine.tracing import Node, Recording

Span = tuple[int, int]
"""Nodes ``start <= index < end`` of a recording."""


@dataclass(frozen=True)
class Recompute:
    """Whole ``stages``, and ``modules`` by path, whose forward runs again in backward."""

    stages: frozenset[int] = frozenset()
    modules: frozenset[str] = frozenset()

    @classmethod
    def of(cls, asked: bool | Collection[int | str], num_stages: int, model: torch.nn.Module) -> Recompute:
        """What the user has asked for: all stages, or the stages and modules that are named.

        Raises ``InputError`` for a stage or a module that there is not.
        """
        if isinstance(asked, bool):
            return cls(frozenset(range(num_stages) if asked else ()))
        asked = (asked,) if isinstance(asked, str) else asked
        stages = frozenset(one for one in asked if not isinstance(one, str))
        if stages - set(range(num_stages)):
            raise InputError(f"recompute names stages {sorted(stages - set(range(num_stages)))}; there are stages 0 to "
                             f"{num_stages - 1}")
        modules = frozenset(one for one in asked if isinstance(one, str))
        unknown = sorted(modules - {path for path, _ in model.named_modules() if path})
        if unknown:
            some = [path for path, _ in model.named_modules() if path][:3]
            raise InputError(f"recompute names {unknown[0]!r}, which is no module of the model; its modules are "
                             f"{', '.join(some)} ...")
        return cls(stages, modules)

    def also(self, modules: Collection[str]) -> Recompute:
        """With these modules besides."""
        return Recompute(self.stages, self.modules | frozenset(modules))

    def spans(self, recording: Recording) -> tuple[Span, ...]:
        """Where the named modules run, one in another counted once."""
        found = [(call.start, call.end) for call in recording.calls if call.path in self.modules]
        found += [(index, index + 1) for index, node in enumerate(recording.nodes)
                  if node.is_module and node.target in self.modules]
        outermost: list[Span] = []
        for start, end in sorted(found, key=lambda span: (span[0], -span[1])):
            if end > start and (not outermost or start >= outermost[-1][1]):
                outermost.append((start, end))
        return tuple(outermost)


def check_recomputable(recording: Recording, nodes: Sequence[Node], what: str) -> None:
    """Raise ``InputError`` when running ``nodes`` again would change again what is there outside of them."""
    made = {v for node in nodes for v in node.results}
    outside = {value.storage for v, value in enumerate(recording.values) if v not in made}
    for node in nodes:
        if node.writes & outside:
            changed = next(value for v, value in enumerate(recording.values)
                           if v not in made and value.storage in node.writes)
            raise InputError(f"{what} cannot be recomputed: {node.name} changes {changed.name} in place, and would "
                             "change it again in the second forward; leave it out of recompute")


def checkpoint_block(block: Callable, rng: RngStreams | None, *arguments: torch.Tensor) -> tuple:
    """Run ``block`` now, and once more in backward, with the same random numbers."""
    key = None if rng is None else rng.key

    def run(*arguments: torch.Tensor) -> tuple:
        states = rng.enter(key)
        try:
            return block(*arguments)
        finally:
            rng.leave(states)
    # Every place in the model has its own stream of random numbers, so no state needs to be kept.
    return checkpoint(block if rng is None else run, *arguments, use_reentrant=False, preserve_rng_state=False)


def checkpoint_module(module: Callable, *args, **kwargs):
    """Call a module that keeps only its inputs and runs again in backward, as its user has set it up to."""
    return checkpoint(module, *args, use_reentrant=False, **kwargs)
