"""One output for the whole batch, made from those of its micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeengine.errors import InputError
from pipeengine.runtime.executor import Task
from pipeengine.stages import Specialization
from pipeengine.tracing import fill, refs, tensors, tree_map


def merge_outputs(
    specializations: Sequence[Specialization],
    outputs: Sequence | None,
    tasks: Sequence[Task],
    loss: torch.Tensor | None,
) -> object:
    """One output for the whole batch from those of the micro-batches; without ``outputs`` the structure with the loss
    alone.
    """
    first = specializations[0].recording
    if outputs is None:
        return fill(first.output, lambda value: loss if value == first.loss else None)
    made = [
        fill(specialization.recording.output, dict(zip(specialization.outputs, values)).__getitem__)
        for specialization, values in zip(specializations, outputs)
    ]
    return join_outputs(specializations[0], made, [task.rows for task in tasks], [task.weight for task in tasks], loss)


def join_outputs(
    specialization: Specialization,
    outputs: Sequence[object],
    rows: Sequence[int],
    weights: Sequence[float],
    loss: torch.Tensor | None,
) -> object:
    """One output from those of several parts of a batch, of so many ``rows`` each, whose losses count for ``weights``.

    Raises ``InputError`` for what has no rows and differs.
    """
    first = specialization.recording
    columns = iter(zip(*(tensors(output) for output in outputs)))
    position = iter([value for value in refs(first.output)])

    def merge(leaf: object) -> object:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        parts, value = next(columns), next(position)
        if value == first.loss:
            return loss
        try:
            return _join(parts, rows, weights, value in specialization.totals)
        except ValueError as error:
            raise InputError(
                f"output {first.values[value].name} of the {len(parts)} micro-batches cannot be merged: {error}; "
                "evaluate a batch of as many rows as a micro-batch has, or let the model return what has a dimension "
                "of rows"
            ) from None

    return tree_map(outputs[0], merge)


def _join(
    parts: Sequence[torch.Tensor], rows: Sequence[int], weights: Sequence[float], is_total: bool
) -> torch.Tensor:
    """Micro-batches' tensors as one: rows one after another; totals added, other scalars by weight; what is the same,
    once.
    """
    if len(parts) == 1:
        return parts[0]
    if parts[0].dim() == 0:
        return _join_scalars(parts, rows, weights, is_total)
    dim = row_dim([tuple(part.shape) for part in parts], rows)
    alike = all(part.shape == parts[0].shape for part in parts)
    if alike and (dim is None or parts[0].shape[dim] != rows[0]) and all(torch.equal(part, parts[0]) for part in parts):
        return parts[0]
    if dim is None:
        raise ValueError(
            f"their shapes are {', '.join(sorted({str(tuple(part.shape)) for part in parts}))} for {min(rows)} to "
            f"{max(rows)} rows, so no dimension holds rows, and they differ"
        )
    return torch.cat(tuple(parts), dim)


def _join_scalars(parts, rows: Sequence[int], weights: Sequence[float], is_total: bool) -> torch.Tensor:
    if is_total:
        return sum(parts[1:], parts[0])
    if not parts[0].is_floating_point():
        if all(torch.equal(part, parts[0]) for part in parts):
            return parts[0]
        raise ValueError(
            f"they are whole numbers from {min(map(int, parts))} to {max(map(int, parts))} that are no sum over rows"
        )
    total = sum(weights)
    if not 0 < total < 1 + 1e-6:  # those of a loss that is a sum
        weights = [count / sum(rows) for count in rows]
    elif total < 1 - 1e-6:  # of one replica's part of the batch
        weights = [weight / total for weight in weights]
    return sum(part * weight for part, weight in zip(parts, weights))


def row_dim(shapes: Sequence[tuple[int, ...]], rows: Sequence[int]) -> int | None:
    """The dimension along which tensors of ``shapes``, made from so many ``rows`` each, follow one another; None if
    there is none.

    The first that has an entry per row; else dimension 0 if it has the same number of entries for every row (rows and
    positions in one), or another number for every micro-batch (chosen by a mask). All others must be equal.
    """

    def others_agree(dim: int) -> bool:
        return len({(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}) == 1

    if len({len(shape) for shape in shapes}) > 1:
        return None
    dims = [dim for dim in range(len(shapes[0])) if others_agree(dim)]
    for dim in dims:
        if all(shape[dim] == count for shape, count in zip(shapes, rows)):
            return dim
    if 0 not in dims:
        return None
    differs = len({shape[0] for shape in shapes}) > 1
    per_row = len({shape[0] / count for shape, count in zip(shapes, rows)}) == 1 and shapes[0][0] % rows[0] == 0
    return 0 if differs or per_row else None
