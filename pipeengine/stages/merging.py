"""How each output of the model for the whole batch is made from those of its micro-batches."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Protocol

import torch

from pipeengine.errors import InputError
from pipeengine.stages.guards import needed_nodes
from pipeengine.stages.loss_terms import find_terms
from pipeengine.stages.loss_weight import TermWeights
from pipeengine.stages.row_layout import Free, Layout, Mixed, Reduced, Rows, find_layouts
from pipeengine.tracing import (
    Dataflow,
    Inputs,
    Missing,
    Rebuilt,
    Recording,
    Ref,
    analyse,
    capture,
    node_refs,
    refs,
    usable_loss,
)

_MOST = 128
_SUMS = {"add", "iadd", "radd", "mul", "imul", "rmul", "to", "float", "mean", "sum", "stack", "div", "truediv"}
_WAY_OUT = ("evaluate a batch of as many rows as a micro-batch has, make the pipeline with num_microbatches=1, or let "
            "the model return something with a dimension of rows")


@dataclass(frozen=True)
class Join:
    """One output: ``kind`` is ``"rows"`` (one after another in dimension ``dim``, which is ``outer`` x rows x entries
    per row), ``"same"`` (once), ``"total"`` (added up), ``"mean of rows"`` or ``"weighted"`` (added up, micro-batch i
    times ``shares[i]``: its share of the rows, or of something else)."""

    kind: str
    dim: int = 0
    outer: int = 1
    shares: tuple[float, ...] = ()


def refused(where: str, why: str) -> InputError:
    """What says that the output ``where`` cannot be put together."""
    return InputError(f"output {where} cannot be merged from micro-batches: it {why}; {_WAY_OUT}")


def refuse_missing(recording: Recording) -> None:
    """Raise ``InputError`` where the model's output holds an object that cannot be returned, by name."""
    for where, leaf in paths(recording.output):
        if isinstance(leaf, Missing) and leaf.why:
            raise InputError(f"output {where}, a {leaf.kind}, cannot be returned: {leaf.why}; let the model return "
                             "tensors, or ask it for less (use_cache=False, where it is a cache)")


def output_layouts(micro: Recording, doubled: Recording, split: Collection[int], model: torch.nn.Module
                   ) -> tuple[Layout, ...]:
    """The layout of every value of ``micro``, recorded again with twice the rows as ``doubled``.

    Raises ``InputError`` where the output holds Python numbers that follow from the number of rows.
    """
    layouts = find_layouts(micro, doubled, split, model)
    ours, theirs = list(paths(micro.output)), list(paths(doubled.output))
    if len(ours) != len(theirs):
        raise refused("of the model", f"has {len(ours)} parts for the rows of a micro-batch, {len(theirs)} for twice "
                                      "as many")
    for (where, leaf), (_, other) in zip(ours, theirs):
        if not isinstance(leaf, Ref) and isinstance(leaf, (int, float)) and leaf != other:
            raise refused(where, f"is {leaf} for the rows of a micro-batch and {other} for twice as many")
    by_shape = {}
    for (_, leaf), (_, other) in zip(ours, theirs):
        if isinstance(leaf, Ref) and isinstance(other, Ref) and (found := layouts[leaf.value]) and \
                isinstance(found, Mixed) and found.parted:
            a, b = micro.values[leaf.value].spec.shape, doubled.values[other.value].spec.shape
            by_shape[leaf.value] = _entry_per_row(a, b, _rows_of(micro, layouts)) or found
    return tuple(by_shape.get(value, layout) for value, layout in enumerate(layouts))


def _rows_of(micro: Recording, layouts: Sequence[Layout]) -> int:
    """Rows of the micro-batch, by its first input that has some."""
    return next((micro.values[value].spec.shape[layout.dim] for value in micro.inputs
                 if isinstance(layout := layouts[value], Rows)), 0)


def _entry_per_row(shape: tuple[int, ...], doubled: tuple[int, ...], rows: int) -> Rows | None:
    """Of a value that comes another way with more rows (some models do so for one alone): rows where exactly one
    dimension has one entry for each of them."""
    moved = [dim for dim, (a, b) in enumerate(zip(shape, doubled)) if a != b]
    if len(shape) != len(doubled) or len(moved) != 1:
        return None
    return Rows(moved[0]) if (shape[moved[0]], doubled[moved[0]]) == (rows, 2 * rows) else None


def join_of(where: str, value: int, layout: Layout, micro: Dataflow, layouts: Sequence[Layout],
            shares: Callable[[], Sequence[tuple[float, ...]] | None], rows: Sequence[int]) -> Join:
    """How to put the output ``value`` together, whose layout in every kind of micro-batch is ``layout``.

    ``shares()`` gives, for each micro-batch, what each term of the value counts for, None where a term is no sum
    over rows. Raises ``InputError`` where nothing does.
    """
    if isinstance(layout, Rows):
        return Join("rows", layout.dim, layout.outer)
    if isinstance(layout, Free):
        return Join("same")
    by_rows = tuple(count / sum(rows) for count in rows)
    if isinstance(layout, Mixed):
        if value in _parts_of_loss(micro):      # such as the router's loss, which the loss adds up in the same way
            return Join("mean of rows", shares=by_rows)
        raise refused(where, layout.reason)
    if not isinstance(layout, Reduced):
        raise refused(where, "numbers the rows of its own micro-batch")
    mixed = next((m for m in _ancestors(micro, value, layouts) if isinstance(m, Mixed)), None)
    found = shares() if mixed is None else None
    if found is not None and all(len(set(share)) == 1 for share in found):
        each = tuple(share[0] for share in found)
        if all(share == 1 for share in each):
            return Join("total")
        if micro.recording.values[value].spec.dtype.is_floating_point:
            return Join("mean of rows" if _close(each, by_rows) else "weighted", shares=each)
    if value in _parts_of_loss(micro):      # which is computed by micro-batch, whatever it is
        return Join("mean of rows", shares=by_rows)
    why = mixed.reason if mixed is not None else "depends on the rows and is neither a sum nor a mean over them"
    raise refused(where, f"has no dimension of rows and {why.removeprefix('has no dimension of rows and ')}")


def term_shares(values: Sequence[int], micros: Sequence[Dataflow], full: Dataflow, full_value: int,
                model: torch.nn.Module, parts: Sequence[Sequence[torch.Tensor]], whole: Sequence[torch.Tensor],
                rows: Sequence[int]) -> list[tuple[float, ...]] | None:
    """What each term of ``values[i]`` of micro-batch i counts for in that of the full batch; None where some term is no
    sum over rows."""
    known: dict[int, TermWeights] = {}
    goal = _goal(full, full_value)
    shares = []
    for value, micro, part, count in zip(values, micros, parts, rows):
        if id(micro) not in known:
            ours = _goal(micro, value)
            terms = find_terms(ours, goal, model)
            if not terms or any(term.kind == "unknown" for term in terms):
                return None
            known[id(micro)] = TermWeights(ours, goal, model)
        shares.append(known[id(micro)].share(part, whole, count / sum(rows)))
    return shares


def _goal(flow: Dataflow, value: int) -> Dataflow:
    return replace(flow, recording=replace(flow.recording, loss=value))


def _parts_of_loss(flow: Dataflow) -> set[int]:
    """Scalars that the loss adds up, scaled or not."""
    recording, found = flow.recording, set()
    waiting = [] if recording.loss is None else [recording.loss]
    while waiting:
        value = waiting.pop()
        made = recording.values[value]
        if value in found or made.spec.shape:
            continue
        found.add(value)
        changes = [node for node in recording.nodes if made.storage in node.writes]
        for node in (*changes, *([recording.nodes[made.node]] if made.node >= 0 else ())):
            if getattr(node.target, "__name__", "").strip("_") in _SUMS:
                waiting.extend(node_refs(node))
    return found


def _ancestors(flow: Dataflow, value: int, layouts: Sequence[Layout]) -> Iterator[Layout]:
    nodes = flow.recording.nodes
    for index in needed_nodes(flow, {value}, len(nodes)):
        yield from (layouts[result] for result in nodes[index].results)


def _close(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(abs(x - y) < 1e-9 for x, y in zip(a, b, strict=True))


def paths(structure: object, where: str = "") -> Iterator[tuple[str, object]]:
    """Every leaf of an encoded output with the keys and numbers that lead to it, such as ``hidden_states[1]``."""
    if isinstance(structure, (Ref, slice)) or not isinstance(structure, (dict, tuple, list)):
        yield where or "of the model", structure
    elif isinstance(structure, Rebuilt):
        names = _field_names(structure)
        for number, part in enumerate(structure.parts):
            step = f"{'.' * bool(where)}{names[number]}" if number < len(names) else f"[{number}]"
            yield from paths(part, where + step)
    else:
        items = structure.items() if isinstance(structure, dict) else enumerate(structure)
        for key, item in items:
            step = f"[{key!r}]" if where or not isinstance(key, str) else key
            yield from paths(item, where + step)


def _field_names(rebuilt: Rebuilt) -> tuple[str, ...]:
    """Names of the parts of a dictionary, a dataclass or a model output, as far as they are told."""
    for given in getattr(rebuilt.build, "args", ()):
        if isinstance(given, (tuple, list)) and len(given) == len(rebuilt.parts) and \
                all(isinstance(name, str) for name in given):
            return tuple(given)
    return ()


class BatchLike(Protocol):
    """What is asked of a batch: see ``pipeengine.data.Batch``."""

    @property
    def dims(self) -> tuple[int | None, ...]:
        """The dimension along which each tensor is split, None for what goes whole."""

    @property
    def packed(self) -> Mapping[int, tuple[int, ...]]:
        """Of some tensors, by index, how many entries of dimension 0 belong to each row."""

    def sizes(self, num_microbatches: int) -> tuple[int, ...]:
        """Rows of each micro-batch."""

    def join(self, parts: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
        """The tensors of the batch that such micro-batches make up."""

    def again(self, tensors: Sequence[torch.Tensor]) -> Inputs:
        """The inputs with other tensors in their place."""

    def on(self, device: torch.device) -> Callable[[], list[torch.Tensor]]:
        """What gives the whole tensors on ``device``."""


class Merging:
    """Says how outputs are put together; remembers the recordings with more rows that it needs for that, one for every
    kind of micro-batch."""

    def __init__(self, model: torch.nn.Module, loss_fn: Callable | None, device: torch.device):
        self._model, self._loss_fn, self._device = model, loss_fn, device
        self._layouts: OrderedDict[int, tuple[Dataflow, tuple[Layout, ...]]] = OrderedDict()

    def joins(self, micros: Sequence[tuple[Dataflow, tuple[int, ...]]], parts: Sequence[Sequence[torch.Tensor]],
              batch: BatchLike, leaf_modules: Mapping[str, str]) -> tuple[Join, ...]:
        """One for each output of the model; ``micros[i]``: the recording of micro-batch i and the values of its output.

        Raises ``InputError`` naming the output that cannot be put together.
        """
        flow, outputs = micros[0]
        every = [(self._layouts_of(one, part, batch, leaf_modules), values)
                 for (one, values), part in zip(micros, parts)]
        names = {leaf.value: where for where, leaf in reversed(list(paths(flow.recording.output)))
                 if isinstance(leaf, Ref)}
        rows = batch.sizes(len(parts))
        whole: Callable[[], Dataflow] = cache(lambda: self._record(batch.on(self._device)(), batch, leaf_modules))

        def shares(number: int) -> list[tuple[float, ...]] | None:
            full = whole()
            wanted = tuple(dict.fromkeys(refs(full.recording.output)))
            if len(wanted) != len(outputs) or any(len(values) != len(outputs) for _, values in micros):
                return None
            return term_shares([values[number] for _, values in micros], [one for one, _ in micros], full,
                               wanted[number], self._model, parts, batch.on(self._device)(), rows)
        joins = []
        for number, value in enumerate(outputs):
            if value == flow.recording.loss:
                joins.append(Join("loss"))
                continue
            found = {layouts[values[number]] for layouts, values in every if number < len(values)}
            mixed = next((layout for layout in found if isinstance(layout, Mixed)), None)
            if mixed is not None:
                found = {mixed}
            if len(found) > 1:
                raise refused(names[value], "has its rows elsewhere in some micro-batches")
            joins.append(join_of(names[value], value, found.pop(), flow, every[0][0], partial(shares, number), rows))
        return tuple(joins)

    def _layouts_of(self, micro: Dataflow, part: Sequence[torch.Tensor], batch: BatchLike,
                    leaf_modules: Mapping[str, str]) -> tuple[Layout, ...]:
        known = self._layouts.get(id(micro))
        if known is None:
            doubled = self._record(batch.join([part, part]), batch, leaf_modules).recording
            split = {index for index, dim in enumerate(batch.dims) if dim is not None or index in batch.packed}
            layouts = output_layouts(micro.recording, doubled, split, self._model)
            known = self._layouts[id(micro)] = micro, layouts       # with what it is of, so that no id is used twice
            while len(self._layouts) > _MOST:
                self._layouts.popitem(last=False)
        return known[1]

    def _record(self, tensors: Sequence[torch.Tensor], batch: BatchLike, leaf_modules: Mapping[str, str]) -> Dataflow:
        given = batch.again(tensors)
        try:
            with torch.no_grad(), warnings.catch_warnings(action="ignore"):
                return analyse(capture(self._model, given, loss_fn=usable_loss(self._loss_fn, given),
                                       device=self._device, known_leaf_modules=leaf_modules), outputs=True)
        except Exception as error:
            raise refused("of the model", f"cannot be told for more rows than a micro-batch has ({error})") from error
