"""One output for the whole batch, made from those of its micro-batches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from pipeengine.errors import InputError
from pipeengine.stages import Join, Specialization
from pipeengine.tracing import Recording, fill, refs

LOGGER = logging.getLogger("pipeengine.evaluate")


def shaped(specialization: Specialization, values: Sequence[torch.Tensor] | None, loss: torch.Tensor | None) -> object:
    """The model's output with ``values``, in the order of the specialization's outputs, in their places, and with
    ``loss``; without ``values`` the structure with the loss alone.
    """
    recording = specialization.recording
    found: dict[int, torch.Tensor | None] = {} if values is None else dict(zip(specialization.outputs, values))
    if recording.loss is not None:
        found[recording.loss] = loss
    return fill(recording.output, found.get)


def join_outputs(
    specialization: Specialization, outputs: Sequence[Sequence[torch.Tensor]], joins: Sequence[Join]
) -> list[torch.Tensor]:
    """The outputs of a whole batch from those of its parts, each put together as ``joins`` says (in the order of the
    specialization's outputs; nothing where there is one part).

    Raises ``InputError`` where parts do not fit together.
    """
    first = specialization.recording
    counts = sorted({len(part) for part in outputs})
    if len(counts) > 1:
        raise InputError(f"the model returns {counts[0]} tensors for some micro-batches and {counts[-1]} for others, "
                         "which cannot be merged; evaluate a batch of as many rows as a micro-batch has")
    if len(outputs) == 1:
        return list(outputs[0])
    joined = []
    for value, join, *parts in zip(specialization.outputs, joins, *outputs):
        try:
            joined.append(parts[0] if value == first.loss else _join(parts, join))
        except ValueError as error:
            raise InputError(
                f"output {first.values[value].name} of {len(parts)} parts of a batch cannot be merged: {error}; "
                "evaluate a batch of as many rows as a micro-batch has, or pad to one length for the whole batch"
            ) from None
    return joined


def tell_missing(specialization: Specialization, told: set[str]) -> None:
    """Say, of each output once (``told`` remembers), that the model returns a cache and this evaluation does not."""
    for where, kind in specialization.missing:
        if where not in told:
            told.add(where)
            LOGGER.warning("evaluate leaves %s (%s) out of the output, since it is large; pass use_cache=True to have "
                           "it", where, kind)


def across(joins: Sequence[Join], rows: Sequence[int], recording: Recording) -> tuple[Join, ...]:
    """How outputs of batches of so many ``rows`` are put together that have been put together by ``joins`` themselves.

    Raises ``InputError`` where a mean is over something else than rows.
    """
    odd = next((number for number, join in enumerate(joins) if join.kind == "weighted"), None)
    if odd is not None and len(rows) > 1:
        name = recording.values[tuple(dict.fromkeys(refs(recording.output)))[odd]].name
        raise InputError(f"output {name} is a mean over something else than rows, and nothing tells what that of each "
                         f"of the {len(rows)} replicas counts for; evaluate without gather=")
    shares = tuple(count / sum(rows) for count in rows)
    return tuple(replace(join, shares=shares) if join.kind == "mean of rows" else join for join in joins)


def _join(parts: Sequence[torch.Tensor], join: Join) -> torch.Tensor:
    if join.kind == "same":
        return parts[0]
    if join.kind == "total":
        return sum(parts[1:], parts[0])
    if join.kind != "rows":
        return sum(part * share for part, share in zip(parts, join.shares, strict=True))    # type: ignore[return-value]
    dim = join.dim
    if len({(*part.shape[:dim], *part.shape[dim + 1:]) for part in parts}) > 1:
        raise ValueError(f"their shapes are {', '.join(sorted({str(tuple(part.shape)) for part in parts}))}, which "
                         f"differ in more than the rows of dimension {dim}")
    if join.outer == 1:
        return torch.cat(tuple(parts), dim)
    return torch.cat([part.unflatten(dim, (join.outer, -1)) for part in parts], dim + 1).flatten(dim, dim + 1)
