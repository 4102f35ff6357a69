"""From a batch to tasks: one per micro-batch, with everything that running it needs.

Whatever can go wrong with a batch goes wrong here, before anything is sent.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from pipeengine.data import Batch, argument_names, take_apart
from pipeengine.errors import InputError
from pipeengine.rng import mix
from pipeengine.runtime.executor import Task
from pipeengine.runtime.programs import ProgramCache
from pipeengine.schedules import Edge
from pipeengine.stages import Specialization, SpecializationCache, Weights, even_weights
from pipeengine.tracing import Inputs, current_modes

_EVALUATION = 1 << 40       # random numbers of evaluations are not those of any step


@dataclass(frozen=True)
class BatchReader:
    """Takes a model's inputs apart: what is split into micro-batches, and how."""

    model: torch.nn.Module
    signature: inspect.Signature
    names: tuple[str, ...]
    device: torch.device
    num_microbatches: int
    loss_fn: Callable | None
    batch_dims: Mapping[str, int | None] | None

    @classmethod
    def of(cls, model: torch.nn.Module, device: torch.device, num_microbatches: int, *, loss_fn: Callable | None = None,
           batch_dims: Mapping[str, int | None] | None = None) -> BatchReader:
        """A reader for what ``model.forward`` takes."""
        return cls(model, inspect.signature(model.forward), argument_names(model), device, num_microbatches, loss_fn,
                   batch_dims)

    def inputs(self, args: tuple, kwargs: dict, target: object) -> Inputs:
        """``target`` is for ``loss_fn``; without one it may be an argument of the model's own."""
        if target is not None and self.loss_fn is None and "target" in self.signature.parameters:
            return Inputs(args, {**kwargs, "target": target})
        return Inputs(args, kwargs, target)

    def read(self, inputs: Inputs) -> Batch:
        """The batch, taken apart. Raises ``InputError`` for what the model does not take."""
        try:
            self.signature.bind(*inputs.args, **inputs.kwargs)
        except TypeError as error:
            raise InputError(f"the model does not take these inputs: {error}; its forward is "
                             f"{type(self.model).__name__}.forward{self.signature}") from None
        return take_apart(inputs, names=self.names, batch_dims=self.batch_dims)

    def check_target(self, inputs: Inputs, training: bool) -> None:
        """Raise ``InputError`` where a target is missing, or nobody would take it."""
        if self.loss_fn is not None and training and inputs.target is None:
            raise InputError("the pipeline has a loss_fn; call step(..., target=...)")
        if self.loss_fn is None and inputs.target is not None:
            raise InputError(
                "target= is given, but the pipeline has no loss_fn that would take it; make it with loss_fn="
            )


@dataclass(frozen=True)
class Prepared:
    """A batch, ready to run. ``digest`` is of the batch, ``recorded`` of what was recorded for it, ``python`` of what
    that read from Python.
    """

    tasks: tuple[Task, ...]
    specializations: tuple[Specialization, ...]
    digest: int
    recorded: int
    python: int

    @property
    def edges(self) -> frozenset[Edge]:
        """Which pairs of stages exchange what, for any of the micro-batches."""
        return frozenset().union(*(specialization.edges for specialization in self.specializations))


@dataclass(frozen=True)
class TaskMaker:
    """Makes the tasks of a batch: finds or records what each micro-batch runs, and weighs it."""

    reader: BatchReader
    specializations: SpecializationCache
    programs: ProgramCache
    seed: int
    loss_weight: Callable | None = None

    def prepare(self, inputs: Inputs, *, training: bool, step: int, call: int) -> Prepared:
        """Tasks for ``inputs``; random numbers follow ``step`` in training, else ``call``. Raises ``InputError``."""
        self.reader.check_target(inputs, training)
        batch = self.reader.read(inputs)
        parts = batch.split(self.reader.num_microbatches, self.reader.device)
        sizes = batch.sizes(self.reader.num_microbatches)
        keys = [mix(self.seed, step if training else _EVALUATION + call, index) for index in range(len(parts))]
        kind = batch.key, (training, *self.specializations.look(), current_modes().autocast), batch.dims
        chosen = self._specialize(batch, kind, parts, sizes, keys, training)
        weights = self._weigh(chosen, parts, sizes, batch, kind)
        split = self.programs.split_backward_stages(len(parts)) if training else (frozenset(),) * len(parts)
        tasks = tuple(
            Task([*specialization.own_copies(tensors), *terms], specialization.stages.of(stages), weight, key, size)
            for tensors, specialization, terms, weight, key, stages, size in zip(
                parts, chosen, weights.terms, weights.loss, keys, split, sizes))
        recorded = python = 0
        for specialization in chosen:
            recorded = mix(recorded, specialization.digest)
            python = mix(python, specialization.recording.python.digest)
        return Prepared(tasks, chosen, batch.digest(), recorded, python)

    def _specialize(self, batch: Batch, kind: tuple, parts: Sequence[list[torch.Tensor]], sizes: Sequence[int],
                    keys: Sequence[int], training: bool) -> tuple[Specialization, ...]:
        alike: dict[int, Specialization] = {}       # by rows, where no guard tells micro-batches apart
        chosen = []
        for tensors, size, key in zip(parts, sizes, keys):
            specialization = alike.get(size) or self.specializations.find(
                (kind, size), tensors, partial(batch.again, tensors), key, outputs=not training)
            if specialization.guards is None:
                alike[size] = specialization
            chosen.append(specialization)
        return tuple(chosen)

    def _weigh(self, chosen: Sequence[Specialization], parts: Sequence[list[torch.Tensor]], sizes: Sequence[int],
               batch: Batch, kind: tuple) -> Weights:
        """What each micro-batch's loss, and each of its terms, counts for in the loss of the full batch."""
        if self.loss_weight is not None:
            raw = [self._own_weight(self.loss_weight, batch.again(tensors)) for tensors in parts]
            return even_weights(raw, sizes, [len(specialization.terms) for specialization in chosen])
        whole = [tensor.to(self.reader.device) for tensor in batch.tensors]
        return self.specializations.weigh(kind, chosen, parts, sizes, whole, lambda: batch.again(whole))

    @staticmethod
    def _own_weight(loss_weight: Callable, inputs: Inputs) -> float:
        """What the user's function says that the loss of these inputs counts for."""
        if inputs.target is None:
            return float(loss_weight(*inputs.args, **inputs.kwargs))
        return float(loss_weight(*inputs.args, target=inputs.target, **inputs.kwargs))
