"""From a batch to tasks: one per micro-batch, with everything that running it needs.

Whatever can go wrong with a batch goes wrong here, before anything is sent.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from pipeengine.data import Batch, argument_names, take_apart
from pipeengine.errors import InputError
from pipeengine.rng import mix
from pipeengine.runtime.executor import Task
from pipeengine.runtime.programs import ProgramCache
from pipeengine.schedules import Edge
from pipeengine.stages import Join, Shares, Specialization, SpecializationCache, Weights, check_lookups, even_weights
from pipeengine.tracing import Inputs, current_modes, needs_target, settings_digest, settings_of

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
        first = inputs.args[0] if len(inputs.args) == 1 and not inputs.kwargs else None
        if isinstance(first, Mapping) and first and first.keys() <= self.signature.parameters.keys():
            raise InputError(f"one dict is given as {self.names[0]}, and it holds the model's {', '.join(first)}; "
                             "unpack it, as in step(**batch)")
        return take_apart(inputs, names=self.names, batch_dims=self.batch_dims)

    def check_target(self, inputs: Inputs, training: bool) -> None:
        """Raise ``InputError`` where a target is missing, or nobody would take it."""
        if training and inputs.target is None and needs_target(self.loss_fn):
            raise InputError("the pipeline has a loss_fn; call step(..., target=...)")
        if self.loss_fn is None and inputs.target is not None:
            raise InputError(
                "target= is given, but the pipeline has no loss_fn that would take it; make it with loss_fn="
            )


class Facts(NamedTuple):
    """Digests that workers compare: of what is set on the model and around it, of the batch, of what its recordings
    read from Python, and of the recordings."""

    settings: int = 0
    batch: int = 0
    python: int = 0
    recorded: int = 0


@dataclass(frozen=True)
class Prepared:
    """A batch, ready to run. ``facts`` are those of its ``Look``, ``amount`` says how many tokens or rows it holds,
    ``joins`` how the outputs of an evaluation are put together (nothing where there is one micro-batch in all)."""

    tasks: tuple[Task, ...]
    specializations: tuple[Specialization, ...]
    facts: Facts
    amount: tuple[int, str]
    joins: tuple[Join, ...] = ()

    @property
    def digest(self) -> int:
        """The digest of the batch."""
        return self.facts.batch

    @property
    def recorded(self) -> int:
        """The digest of what was recorded for it."""
        return self.facts.recorded

    @property
    def edges(self) -> frozenset[Edge]:
        """Which pairs of stages exchange what, for any of the micro-batches."""
        return frozenset().union(*(specialization.edges for specialization in self.specializations))


@dataclass(frozen=True)
class Look:
    """A batch, looked at: its micro-batches' tensors ``parts``, rows ``sizes``, random keys and what runs each of them.

    ``kind`` is everything besides the numbers that eager execution would depend on.
    """

    batch: Batch
    kind: tuple
    parts: Sequence[list[torch.Tensor]]
    sizes: tuple[int, ...]
    keys: tuple[int, ...]
    chosen: tuple[Specialization, ...]
    training: bool
    facts: Facts
    joins: tuple[Join, ...] = ()


@dataclass(frozen=True)
class TaskMaker:
    """Makes the tasks of a batch: finds or records what each micro-batch runs, and weighs it."""

    reader: BatchReader
    specializations: SpecializationCache
    programs: ProgramCache
    seed: int
    loss_weight: Callable | None = None

    def look(self, inputs: Inputs, *, training: bool, step: int, call: int, first: int = 0, joined: bool = False
             ) -> Look:
        """What will run ``inputs``; random numbers follow ``step`` in training, else ``call``, and the number of the
        micro-batch, counted from ``first``. ``joined``: the outputs will be put together with those of other batches.
        Raises ``InputError``."""
        self.reader.check_target(inputs, training)
        batch = self.reader.read(inputs)
        parts = batch.split(self.reader.num_microbatches, self.reader.device)
        sizes = batch.sizes(self.reader.num_microbatches)
        keys = tuple(mix(self.seed, step if training else _EVALUATION + call, first + i) for i in range(len(parts)))
        flags, autocast = self.specializations.look(), current_modes().autocast
        kind = batch.key, (training, *flags, autocast), batch.dims
        chosen = self._specialize(batch, kind, parts, sizes, keys, training)
        check_lookups(chosen[0].lookups, batch.tensors)
        recorded = python = 0
        for specialization in chosen:
            recorded = mix(recorded, specialization.digest)
        for specialization in {id(one): one for one in chosen}.values():
            python = mix(python, specialization.recording.python.digest)
        joins = self.specializations.merge(chosen, parts, batch) if not training and (joined or len(parts) > 1) else ()
        facts = Facts(settings_digest(flags, autocast), batch.digest(), python, recorded)
        return Look(batch, kind, parts, sizes, keys, chosen, training, facts, joins)

    def set_and_read(self, chosen: Sequence[Specialization]) -> dict[str, str]:
        """By name, as text, what is set on the model and around it, and what those recordings read from Python: what
        to compare where workers disagree."""
        settings = {name: str(value) for name, value in settings_of(self.reader.model).items()}
        return settings | {label: value for one in chosen for label, value in one.recording.python.told().items()}

    def prepare(self, look: Look, weights: Weights) -> Prepared:
        """The tasks of a batch whose micro-batches count for ``weights``."""
        split = self.programs.split_backward_stages(len(look.parts)) if look.training else \
            (frozenset(),) * len(look.parts)
        tasks = tuple(
            Task([*tensors, *terms], specialization.stages.of(stages), weight, key, size)
            for tensors, specialization, terms, weight, key, stages, size in zip(
                look.parts, look.chosen, weights.terms, weights.loss, look.keys, split, look.sizes))
        return Prepared(tasks, look.chosen, look.facts, look.batch.amount(), look.joins)

    def _specialize(self, batch: Batch, kind: tuple, parts: Sequence[list[torch.Tensor]], sizes: Sequence[int],
                    keys: Sequence[int], training: bool) -> tuple[Specialization, ...]:
        alike: dict[tuple, Specialization] = {}     # by rows, where no guard tells micro-batches apart
        chosen = []
        packed = batch.packed_sizes(self.reader.num_microbatches)
        for tensors, size, key in zip(parts, zip(sizes, packed), keys):
            specialization = alike.get(size) or self.specializations.find(
                (kind, size), tensors, partial(batch.again, tensors), key, outputs=not training)
            if specialization.guards is None:
                alike[size] = specialization
            chosen.append(specialization)
        return tuple(chosen)

    def weigh(self, look: Look) -> Weights:
        """What each micro-batch's loss, and each of its terms, counts for in the loss of this batch."""
        if self.loss_weight is not None:
            return even_weights(self._own_weights(look), look.sizes,
                                [len(specialization.terms) for specialization in look.chosen])
        whole = look.batch.on(self.reader.device)
        return self.specializations.weigh(look.kind, look.chosen, look.parts, look.sizes, whole, look.batch.again)

    def shares(self, look: Look) -> Shares:
        """The same, before it is known what the other replicas have."""
        shares = Shares.of([specialization.kind for specialization in look.chosen], look.parts, look.sizes)
        if self.loss_weight is None:
            return shares
        return Shares(shares.sizes, tuple(self._own_weights(look)), True, shares.num_terms)

    def weigh_part(self, whole: Inputs, look: Look, replicas: Sequence[Inputs], firsts: Sequence[int], replica: int
                   ) -> Weights:
        """What each micro-batch of ``look``, the batch of ``replica``, counts for in the loss of the batch ``whole``.

        ``replicas`` are all its parts in order, ``firsts`` the numbers of their first micro-batches.
        """
        batch = self.reader.read(whole)
        looks = [look if number == replica else self._look_again(self.reader.read(part), look, first)
                 for number, (part, first) in enumerate(zip(replicas, firsts))]
        weights = self.specializations.weigh(
            (batch.key, *look.kind[1:]), [one for other in looks for one in other.chosen],
            [part for other in looks for part in other.parts], [size for other in looks for size in other.sizes],
            batch.on(self.reader.device), batch.again)
        own = slice(sum(len(other.parts) for other in looks[:replica]), None)
        return Weights(weights.loss[own][:len(look.parts)], weights.terms[own][:len(look.parts)])

    def _look_again(self, batch: Batch, look: Look, first: int) -> Look:
        """What would run ``batch`` of another replica: in the same modes as ``look``."""
        parts, sizes = batch.split(self.reader.num_microbatches, self.reader.device), batch.sizes(
            self.reader.num_microbatches)
        kind = batch.key, look.kind[1], batch.dims
        keys = tuple(range(first, first + len(parts)))
        chosen = self._specialize(batch, kind, parts, sizes, keys, look.training)
        return Look(batch, kind, parts, sizes, keys, chosen, look.training, Facts())

    def _own_weights(self, look: Look) -> list[float]:
        assert self.loss_weight is not None, "asked for only where there is one"
        return [self._own_weight(self.loss_weight, look.batch.again(tensors)) for tensors in look.parts]

    @staticmethod
    def _own_weight(loss_weight: Callable, inputs: Inputs) -> float:
        """What the user's function says that the loss of these inputs counts for."""
        if inputs.target is None:
            return float(loss_weight(*inputs.args, **inputs.kwargs))
        return float(loss_weight(*inputs.args, target=inputs.target, **inputs.kwargs))
