"""A stage of one recording with every position worked out that running it will need."""
from __future__ import annotations

from dataclasses import dataclass

from pipeengine.autograd import Deferral
from pipeengine.stages.codegen import Compiled
from pipeengine.stages.message import Layout, layout
from pipeengine.stages.splitting import Split, StageBoundary
from pipeengine.tracing import Recording


@dataclass(frozen=True)
class BoundaryLayout:
    """A link, ready for the executor: its layouts, and where its values stand."""

    source: int
    target: int
    layout: Layout
    gradient_layout: Layout
    positions: tuple[int, ...]                  # of its values among the returns of the source
    gradient_positions: tuple[int, ...]         # among the roots of the source's backward
    received: tuple[int, ...]                   # of the values that want a gradient, among all the target receives


@dataclass(frozen=True)
class Runnable:
    """One stage of one recording, ready for the executor."""

    run: object
    inputs: tuple[int, ...]
    receives: tuple[BoundaryLayout, ...]
    sends: tuple[BoundaryLayout, ...]
    wants: tuple[bool, ...]
    roots: tuple[int, ...]                      # positions among the returns from which backward starts
    relays: tuple[int, ...]                     # received values to whose gradient a later stage adds first
    loss: int | None
    loss_root: int | None
    random: bool
    keeps: tuple[int, ...]                      # positions of the returns that are kept as the model's output
    deferral: Deferral | None                   # where weight gradients wait, when the schedule splits backward
    recompute: bool = False                     # run the forward again in backward instead of keeping its activations


def make_runnable(compiled: Compiled, split: Split, *, outputs: tuple[int, ...] | None = None,
                  recompute: bool = False) -> Runnable:
    """Work out every position that running the part will need."""
    part, recording = compiled.part, split.recording
    at = {value: index for index, value in enumerate(part.returns)}
    arrived = [v for link in part.receives for v in link.values]
    training = outputs is None
    returning = list(dict.fromkeys(v for link in part.sends for v in link.gradients)) if training else []
    roots = [v for v in returning if v not in arrived]
    relays = [v for v in returning if v in arrived]
    has_loss = split.loss_stage == part.stage
    if has_loss and training:
        roots.append(recording.loss)
    starts = roots + relays
    return Runnable(
        compiled.run, compiled.inputs, tuple(_boundary_layout(recording, link, starts, arrived, at, False) for link in part.receives),
        tuple(_boundary_layout(recording, link, starts, arrived, at, True) for link in part.sends), compiled.needs_gradient,
        tuple(at[v] for v in roots), tuple(arrived.index(v) for v in relays), at[recording.loss] if has_loss else None,
        roots.index(recording.loss) if has_loss and training else None, compiled.random,
        tuple(at[v] for v in outputs or () if v in at), compiled.deferral,
        recompute and training)


def _boundary_layout(recording: Recording, link: StageBoundary, starts: list[int], arrived: list[int], at: dict[int, int], outgoing: bool) -> BoundaryLayout:
    return BoundaryLayout(link.source, link.target, layout([recording.values[v].spec for v in link.values]),
                 layout([recording.values[v].spec for v in link.gradients]),
                 tuple(at[v] for v in link.values) if outgoing else (),
                 tuple(starts.index(v) for v in link.gradients) if outgoing and starts else (),
                 () if outgoing else tuple(arrived.index(v) for v in link.gradients))
