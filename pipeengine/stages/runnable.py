"""A stage of one recording with every position worked out that running it will need."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipeengine.autograd import Deferral
from pipeengine.stages.codegen import Compiled
from pipeengine.stages.message import Layout, layout
from pipeengine.stages.splitting import Split, StageBoundary
from pipeengine.tracing import Recording


@dataclass(frozen=True)
class BoundaryLayout:
    """A ``StageBoundary`` as one of its two stages runs it: its messages' layouts, and where its values stand there."""

    source: int
    target: int
    layout: Layout
    gradient_layout: Layout
    positions: tuple[int, ...]                  # of its values among the returns of the source
    gradient_positions: tuple[int, ...]         # among the roots of the source's backward
    received: tuple[int, ...]                   # of the values that want a gradient, among all the target receives


@dataclass(frozen=True)
class Runnable:
    """One stage of one recording, ready for the executor.

    ``run(*inputs, *received)`` gives the part's returns as a tuple: ``inputs`` are positions among the micro-batch's
    tensors; received are the values of all ``receives`` in order, and ``wants`` says which of them want a gradient.
    """

    run: Callable[..., tuple]
    inputs: tuple[int, ...]
    receives: tuple[BoundaryLayout, ...]
    sends: tuple[BoundaryLayout, ...]
    wants: tuple[bool, ...]                     # of each received value
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
    """Work out every position that running the part will need.

    With ``outputs``, the values of the model's output, the stage runs forward only and keeps those that it has.
    """
    part, recording = compiled.part, split.recording
    at = {value: index for index, value in enumerate(part.returns)}
    arrived = [v for boundary in part.receives for v in boundary.values]
    training = outputs is None
    returning = list(dict.fromkeys(v for boundary in part.sends for v in boundary.gradients)) if training else []
    roots = [v for v in returning if v not in arrived]
    relays = [v for v in returning if v in arrived]
    has_loss = split.loss_stage == part.stage
    if has_loss and training:
        roots.append(recording.loss)
    starts = roots + relays
    return Runnable(
        run=compiled.run, inputs=compiled.inputs,
        receives=tuple(_incoming(recording, boundary, arrived) for boundary in part.receives),
        sends=tuple(_outgoing(recording, boundary, starts, at) for boundary in part.sends),
        wants=compiled.needs_gradient,
        roots=tuple(at[v] for v in roots), relays=tuple(arrived.index(v) for v in relays),
        loss=at[recording.loss] if has_loss else None,
        loss_root=roots.index(recording.loss) if has_loss and training else None,
        random=compiled.random, keeps=tuple(at[v] for v in outputs or () if v in at),
        deferral=compiled.deferral, recompute=recompute and training)


def _incoming(recording: Recording, boundary: StageBoundary, arrived: Sequence[int]) -> BoundaryLayout:
    """The boundary as its target sees it; ``arrived`` are all the values that the target receives."""
    return BoundaryLayout(boundary.source, boundary.target, *_layouts(recording, boundary), positions=(),
                          gradient_positions=(), received=tuple(arrived.index(v) for v in boundary.gradients))


def _outgoing(recording: Recording, boundary: StageBoundary, starts: Sequence[int],
              at: Mapping[int, int]) -> BoundaryLayout:
    """The boundary as its source sees it: its backward begins at ``starts``, its returns stand ``at``."""
    return BoundaryLayout(boundary.source, boundary.target, *_layouts(recording, boundary),
                          positions=tuple(at[v] for v in boundary.values),
                          gradient_positions=tuple(starts.index(v) for v in boundary.gradients) if starts else (),
                          received=())


def _layouts(recording: Recording, boundary: StageBoundary) -> tuple[Layout, Layout]:
    """Of the message that goes, and of the one that comes back."""
    return (layout([recording.values[v].spec for v in boundary.values]),
            layout([recording.values[v].spec for v in boundary.gradients]))
