"""The recordings of one model: one for every kind of micro-batch that has come by.

What eager execution would do depends on shapes, modes and on what the forward reads from its inputs (guards). A
micro-batch of a kind not seen before is recorded anew; the plan, keyed by names, says where everything goes.
"""
from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from pipeengine.autograd import Recompute, Replacement, check_recomputable, find_deferrable
from pipeengine.errors import InputError
from pipeengine.rng import RngStreams
from pipeengine.schedules import Edge
from pipeengine.stages.codegen import compile_part
from pipeengine.stages.guards import guard_check
from pipeengine.stages.lookups import Lookup, find_lookups
from pipeengine.stages.loss_terms import Term, find_terms
from pipeengine.stages.loss_weight import Kind, LossWeights, Weights, target_count, weigh_terms
from pipeengine.stages.merging import BatchLike, Join, Merging, paths, refuse_missing
from pipeengine.stages.pieces import Pieces
from pipeengine.stages.placement import SettledPlacement
from pipeengine.stages.runnable import Runnable, make_runnable
from pipeengine.stages.splitting import Split, split
from pipeengine.tracing import (
    Dataflow,
    Inputs,
    Missing,
    ModelFlags,
    PythonWatch,
    Recording,
    analyse,
    capture,
    refs,
    usable_loss,
)

_MOST = 128


@dataclass(frozen=True)
class Specialization:
    """One recording, cut by the plan and compiled for the stages of this worker.

    ``guards(tensors, random_key)`` tells whether a micro-batch takes the recorded path (None: every one does),
    ``count_targets(tensors)`` what its mean cross-entropy is a mean over (None: the loss is no such mean). ``edges``
    are the pairs of stages between which something passes, ``outputs`` the values of the model's output in an
    evaluation. ``digest`` is equal on two workers when they cut the same recording in the same way.
    """

    recording: Recording
    split: Split
    stages: Runnables
    guards: Callable[[Sequence[torch.Tensor], int | None], bool] | None
    count_targets: Callable[[Sequence[torch.Tensor]], float] | None
    edges: frozenset[Edge]
    outputs: tuple[int, ...]
    digest: int
    # of the recording as it was made, without inputs for the weights of terms
    flow: Dataflow
    terms: tuple[Term, ...]                     # of the loss
    lookups: tuple[Lookup, ...]                 # what indices of the inputs must lie within

    @property
    def missing(self) -> tuple[tuple[str, str], ...]:
        """Where the model's output has caches that nobody asked for, and of which type."""
        return tuple((where, leaf.kind) for where, leaf in paths(self.recording.output) if isinstance(leaf, Missing))

    @property
    def kind(self) -> Kind:
        """What the weight of a micro-batch follows from."""
        return self.flow, self.terms, self.count_targets


class Runnables:
    """The stages of this worker for one kind of micro-batch, each compiled once, when it is first needed.

    ``make(stage, split_backward)`` compiles one: ``split_backward`` where backward is two actions, I and W, so that
    weight gradients can wait.
    """

    def __init__(self, own: Sequence[int], make: Callable[[int, bool], Runnable]):
        self._own, self._make = tuple(own), cache(make)
        self._known: dict[frozenset[int], dict[int, Runnable]] = {}

    def of(self, split_backward_stages: frozenset[int] = frozenset()) -> dict[int, Runnable]:
        """What runs a micro-batch whose backward is I and W on ``split_backward_stages``, by stage of this worker."""
        runnables = self._known.get(split_backward_stages)
        if runnables is None:
            runnables = {stage: self._make(stage, stage in split_backward_stages) for stage in self._own}
            self._known[split_backward_stages] = runnables
        return runnables


@dataclass
class _Known:
    """A specialization, and the last state of Python (a watch's version) for which it was seen to hold."""

    specialization: Specialization
    version: int


class SpecializationCache:
    """Finds or makes the specialization for a micro-batch; the ones used least recently are forgotten.

    ``own`` are the stages of this worker. ``recorded`` counts the recordings that ``find`` had to make.
    """

    def __init__(self, model: torch.nn.Module, placement: SettledPlacement, own: Sequence[int], *,
                 loss_fn: Callable | None, device: torch.device, rng: RngStreams, split_backward: bool = False,
                 recompute: Recompute = Recompute(), pieces: Pieces | None = None):
        self._pieces = pieces
        self._split_backward, self._recompute = split_backward, recompute
        self._model, self._placement, self._own = model, placement, tuple(own)
        self._loss_fn, self._device, self._rng = loss_fn, device, rng
        self._known: OrderedDict[tuple, list[_Known]] = OrderedDict()
        self.recorded = 0
        self._watch, self._python_version, self._fresh = PythonWatch(), 0, False
        self._flags = ModelFlags(model)
        self._first_names = _first_names(model)
        self._weights = LossWeights(model, loss_fn, device, rng)
        self._merging = Merging(model, loss_fn, device)

    def look(self) -> tuple[bytes, bytes, tuple]:
        """Look once, before the micro-batches of a batch are found, at what the recordings read from Python.

        Returns which modules train, which parameters want a gradient, and what else a loop changes. Raises
        ``InputError`` where parameters that were one are no longer, or the other way round.
        """
        version = self._watch.look()
        changed = version != self._python_version
        if changed:
            self._python_version, self._flags = version, ModelFlags(self._model)
        flags = self._flags.now()
        if changed or self._flags.replaced:
            self._refuse_retied()
        return flags

    def hooked_parameters(self) -> list[torch.nn.Parameter]:
        """The model's parameters that have hooks of their own now."""
        return self._flags.hooked_parameters()

    def ran(self) -> None:
        """The micro-batches have run. What a first run has changed in Python is its own, and not watched."""
        if self._fresh:
            self._watch.ignore_written()
            self._fresh = False
        if self._pieces is not None:
            self._pieces.tell()

    def _holds(self, known: _Known) -> bool:
        """Whether Python is as it was when ``known`` was recorded."""
        if known.version != self._python_version:
            if not known.specialization.recording.python.hold(self._watch.ignored):
                return False
            known.version = self._python_version
        return True

    def find(self, key: tuple, tensors: Sequence[torch.Tensor], inputs: Callable[[], Inputs], random_key: int | None, *,
             outputs: bool) -> Specialization:
        """The specialization for the micro-batch ``tensors``; ``inputs()`` gives it as the model wants it.

        ``key`` is everything besides guards and what ``look`` saw that eager execution would depend on. Raises
        ``CaptureError`` when a new kind of micro-batch cannot be recorded, ``PlanError`` when it reads parameters where
        they are not held, ``InputError`` when the model has grown.
        """
        known = self._known.setdefault(key, [])
        self._known.move_to_end(key)
        for candidate in known:
            specialization = candidate.specialization
            if self._holds(candidate) and (
                    specialization.guards is None or specialization.guards(tensors, random_key)):
                return specialization
        self._refuse_grown()
        with torch.set_grad_enabled(not outputs):
            given = inputs()                # an evaluation may have no target: then there is no loss
            recording = capture(self._model, given, loss_fn=usable_loss(self._loss_fn, given),
                                device=self._device, random_key=random_key,
                                known_leaf_modules=self._placement.leaf_modules)
        specialization = self.make(recording, outputs=outputs)
        self.recorded += 1
        self._fresh = True
        self._watch.add(recording.python)
        known.append(_Known(specialization, self._python_version))
        del known[:-_MOST]
        while len(self._known) > _MOST:
            self._known.popitem(last=False)
        return specialization

    def _refuse_grown(self) -> None:
        """A parameter that was not there at construction is on no stage."""
        grown = [name for name in _first_names(self._model) if name not in self._first_names]
        if grown:
            raise InputError(f"the model has {len(grown)} parameters more than the {len(self._first_names)} that the "
                             f"pipeline was made with, such as {grown[0]}, and no stage holds them; make a new one")

    def _refuse_retied(self) -> None:
        """Which stages share a tensor was settled at construction."""
        number_of: dict[str, tuple[int, str]] = {}
        first_of: dict[int, tuple[str, str]] = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            first = self._first_names.get(name)
            if first is None:
                continue
            number, other = number_of.setdefault(first, (id(parameter), name))
            shared, one = first_of.setdefault(id(parameter), (first, name))
            if number != id(parameter) or shared != first:
                were, now = ("one", "two") if number != id(parameter) else ("two", "one")
                raise InputError(f"{other if were == 'one' else one} and {name} were {were} when the pipeline was "
                                 f"made, and now are {now}; which stages share a parameter is settled then: make a new "
                                 "pipeline")

    def make(self, recording: Recording, *, outputs: bool) -> Specialization:
        """Cut and compile a recording; with ``outputs`` for an evaluation, which keeps the model's output.

        Raises ``InputError`` when what is to be recomputed cannot run twice.
        """
        if outputs:
            refuse_missing(recording)
        plain = flow = analyse(recording, outputs=outputs)
        terms = find_terms(plain, plain, self._model)
        recording, weighed = weigh_terms(recording, terms)
        if weighed:
            flow = analyse(recording, outputs=outputs)
        stage_of = self._placement.assign(flow)
        wanted = tuple(dict.fromkeys(refs(recording.output))) if outputs else ()
        recompute_spans = () if outputs else self._recompute.spans(recording)
        for span in recompute_spans:
            nodes = recording.nodes[slice(*span)]
            check_recomputable(recording, nodes, f"module {nodes[0].name.partition(':')[0]}")

        @cache
        def cut_for(split_backward: bool) -> tuple[Split, Mapping[int, Replacement] | None]:
            deferrable = find_deferrable(recording, self._model) if split_backward else None
            apart = {id(recording.nodes[n]) for span in recompute_spans for n in range(*span)}
            apart |= {id(recording.nodes[n]) for n in weighed}
            apart |= {id(node) for node in recording.nodes if node.results and node.results[0] in (deferrable or ())}
            return split(flow, stage_of, self._placement.num_stages, outputs=outputs,
                         keep_apart=lambda node: self._pieces is not None or id(node) in apart), deferrable

        def runnable(stage: int, split_backward: bool) -> Runnable:
            cut, deferrable = cut_for(split_backward)
            if stage in self._recompute.stages and not outputs:
                check_recomputable(recording, cut.parts[stage].nodes, f"stage {stage}")
            compiled = compile_part(cut.parts[stage], recording, self._model, self._rng, deferrable=deferrable,
                                    recompute_spans=recompute_spans, pieces=self._pieces)
            return make_runnable(compiled, cut, outputs=wanted if outputs else None,
                                 recompute=stage in self._recompute.stages)
        cut, _ = cut_for(self._split_backward and not outputs)       # the boundaries are the same either way
        return Specialization(recording, cut, Runnables(self._own, runnable), guard_check(flow, self._model, self._rng),
                              target_count(plain, self._model), cut.edges, wanted, _digest(cut), plain, terms,
                              find_lookups(plain, self._model))

    def weigh(self, key: tuple, specializations: Sequence[Specialization], parts: Sequence[Sequence[torch.Tensor]],
              sizes: Sequence[int], whole: Callable[[], Sequence[torch.Tensor]],
              again: Callable[[Sequence[torch.Tensor]], Inputs]) -> Weights:
        """What each of the micro-batches ``parts``, of ``sizes`` rows, counts for in the loss of the batch of kind
        ``key``, whose tensors ``whole()`` gives and ``again`` puts into its inputs."""
        kinds = [specialization.kind for specialization in specializations]
        return self._weights.weigh((key, self._python_version), kinds, parts, sizes, whole, again,
                                   self._placement.leaf_modules)

    def merge(self, specializations: Sequence[Specialization], parts: Sequence[Sequence[torch.Tensor]],
              batch: BatchLike) -> tuple[Join, ...]:
        """How each of the outputs of an evaluation is made from those of the micro-batches ``parts`` of ``batch``.

        Raises ``InputError`` naming the output that cannot be.
        """
        return self._merging.joins([(one.flow, one.outputs) for one in specializations], parts, batch,
                                   self._placement.leaf_modules)


def _first_names(model: torch.nn.Module) -> dict[str, str]:
    """Every name of a parameter -> the first one it has."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(parameter), name)
            for name, parameter in model.named_parameters(remove_duplicate=False)}


def _digest(cut: Split) -> int:
    values = cut.recording.values
    text = repr([(boundary.source, boundary.target, [(values[v].name, values[v].spec) for v in boundary.values],
                  len(boundary.gradients)) for boundary in cut.boundaries])
    return zlib.crc32(text.encode())
