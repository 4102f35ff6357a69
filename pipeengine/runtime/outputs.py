"""One output for the whole batch, made from those of its micro-batches."""
from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeengine.runtime.executor import Task
from pipeengine.stages import Specialization
from pipeengine.tracing import fill, refs, tensors, tree_map


def merge_outputs(specializations: Sequence[Specialization], outputs: Sequence | None, tasks: Sequence[Task],
                  loss: torch.Tensor | None) -> object:
    """One output for the whole batch from those of the micro-batches; without ``outputs`` the structure with the loss
    alone."""
    first = specializations[0].recording
    if outputs is None:
        return fill(first.output, lambda value: loss if value == first.loss else None)
    made = [fill(specialization.recording.output, dict(zip(specialization.outputs, values)).__getitem__)
            for specialization, values in zip(specializations, outputs)]
    columns = iter(zip(*(tensors(output) for output in made)))
    order = [value for value in refs(first.output)]
    position = iter(order)

    def merge(leaf: object) -> object:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        parts, value = next(columns), next(position)
        if value == first.loss:
            return loss
        return _join(parts, tasks)
    return tree_map(made[0], merge)


def _join(parts: tuple, tasks) -> torch.Tensor:
    """Micro-batches' tensors as one: rows one after another; scalars by weight; what is the same for all, once."""
    if len(parts) == 1:
        return parts[0]
    if parts[0].dim() == 0:
        if not parts[0].is_floating_point():
            return parts[0]
        return sum(part * task.weight for part, task in zip(parts, tasks))
    if all(part.shape[1:] == parts[0].shape[1:] for part in parts):
        return torch.cat(parts)
    return parts[0]
