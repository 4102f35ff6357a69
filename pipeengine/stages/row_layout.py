"""Where the rows of a batch lie in every value of a recording.

Two recordings of one model are read side by side, of a micro-batch and of the full batch: a dimension holds rows if and
only if its size is another one in the second. Shapes do not tell the order in which rows follow one another, so that it
is followed from node to node; what no rule says is ``Mixed``, never guessed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from pipeengine.tracing import Node, Recording, Ref, TensorSpec, node_refs


@dataclass(frozen=True)
class Free:
    """The same numbers whatever the rows are, and however many."""


@dataclass(frozen=True)
class Rows:
    """Dimension ``dim`` is ``outer`` x rows x entries per row, in this order: 1 where rows follow one another."""

    dim: int
    outer: int = 1


@dataclass(frozen=True)
class Reduced:
    """Depends on rows and has no dimension for them: a sum, a mean, one chosen row."""


@dataclass(frozen=True)
class Mixed:
    """Rows that do not follow one another, or numbers that depend on the other rows. ``order``: only the order is not
    known, and picking entries by an index may put it right. ``parted``: more rows take another path up to here."""

    reason: str
    order: bool = False
    parted: bool = False


@dataclass(frozen=True)
class Numbers:
    """The numbers of the rows, in order: as an index, every row picks its own entry."""


Layout = Free | Rows | Reduced | Mixed | Numbers
_FILLED = {"zeros", "ones", "empty", "zeros_like", "ones_like", "empty_like", "new_zeros", "new_ones", "new_empty"}
_SIZED = {"view", "reshape", "expand", "unflatten", "broadcast_to", "full", "new_full", "arange", "repeat", "tile",
          "repeat_interleave", "split", "getitem", "narrow", "resize", "as_strided"}
_RESHAPES = {"view", "reshape", "flatten", "unflatten", "ravel", "Flatten", "Unflatten", "view_as", "reshape_as"}
_VIEWS = {"getitem", "unsqueeze", "view", "reshape", "to", "expand", "long", "clone", "contiguous"}
_BROADCASTS = {"expand", "expand_as", "broadcast_to", "repeat", "tile", "repeat_interleave"}
_SLICES = {"getitem", "chunk", "split", "narrow", "tensor_split", "unbind", "select"}
_PICKS = {"getitem", "gather", "index_select", "take_along_dim", "index_add", "index_copy", "scatter", "scatter_add",
          "scatter_reduce", "setitem", "index_put"}
# Position of the dimension along which a function orders or adds up entries, and where it works without one.
_ALONG = {"flip": (1, None), "fliplr": (9, 1), "flipud": (9, 0), "roll": (2, 0), "rot90": (2, 0),
          "sort": (1, -1), "argsort": (1, -1), "topk": (2, -1), "cumsum": (1, None), "cumprod": (1, None),
          "cummax": (1, None), "cummin": (1, None), "logcumsumexp": (1, None), "softmax": (1, None),
          "log_softmax": (1, None), "normalize": (2, 1), "renorm": (2, 0), "diff": (2, -1),
          "scaled_dot_product_attention": (9, -2)}
_ORDERS = {"flip", "fliplr", "flipud", "roll", "rot90", "sort", "argsort", "topk"}


def find_layouts(micro: Recording, full: Recording, split: Collection[int], model: torch.nn.Module
                 ) -> tuple[Layout, ...]:
    """The layout of every value of ``micro``; ``split`` are the inputs (by position) that are cut into micro-batches.

    Nothing is said of what comes after the two have parted.
    """
    return _Reader(micro, full, split, model).read()


class _Reader:
    def __init__(self, micro: Recording, full: Recording, split: Collection[int], model: torch.nn.Module):
        self._micro, self._full, self._model = micro, full, model
        self._found: list[Layout] = [Free()] * len(micro.values)
        for position, value in enumerate(micro.inputs):
            if position in split:
                moved = self._moved(value)
                self._found[value] = Rows(moved[0]) if moved and len(moved) == 1 else Mixed("an input is not rows")

    def read(self) -> tuple[Layout, ...]:
        nodes, twins = self._micro.nodes, self._full.nodes
        together = next((number for number, (a, b) in enumerate(zip(nodes, twins))
                         if a.name != b.name or a.results != b.results), min(len(nodes), len(twins)))
        for node, twin in zip(nodes[:together], twins):
            for value in node.results:
                self._found[value] = self._result(node, twin, value)
            if node.writes:
                self._write(node)
        for node in nodes[together:]:
            parted = Mixed(f"comes another way through the model where there are more rows (from {node.name} on)",
                           parted=True)
            for value, made in enumerate(self._micro.values):
                if value in node.results or made.storage in node.writes:
                    self._found[value] = parted
        return tuple(self._found)

    def _write(self, node: Node) -> None:
        """What shares memory with something changed in place has got the numbers that were written."""
        layouts = [self._found[value] for value in node_refs(node)]
        mixed = next((layout for layout in layouts if isinstance(layout, (Mixed, Reduced))), None)
        depends = any(isinstance(layout, (Rows, Numbers)) for layout in layouts)
        for value, made in enumerate(self._micro.values):
            if made.storage not in node.writes or made.kind == "result" and made.node > self._micro.index_of(node):
                continue
            if isinstance(mixed, Mixed) and not isinstance(self._found[value], Mixed):
                self._found[value] = mixed
            elif mixed is not None or depends:
                self._found[value] = self._found[value] if isinstance(self._found[value], Rows) and mixed is None else \
                    Mixed(f"mixes rows in place (at {node.name})") if self._moved(value) else Reduced()

    def _moved(self, value: int) -> tuple[int, ...] | None:
        """The dimensions whose size moves with the rows; None where their number does."""
        a, b = self._shape(value), self._full.values[value].spec.shape
        return tuple(d for d in range(len(a)) if a[d] != b[d]) if len(a) == len(b) else None

    def _shape(self, value: int) -> tuple[int, ...]:
        return self._micro.values[value].spec.shape

    def _result(self, node: Node, twin: Node, value: int) -> Layout:
        name, moved = self._name(node), self._moved(value)
        if name in _FILLED:
            return Rows(moved[0]) if moved else Free() if moved is not None else Mixed("the rows shape it")
        given = {v: self._found[v] for v in node_refs(node)}
        if self._counts_rows(name, node, twin, bool(moved)):
            return Mixed(f"depends on how many rows there are (at {node.name})")
        if node.random and not moved:
            return Mixed(f"holds random numbers, which are others in every micro-batch (at {node.name})")
        depending = {v: layout for v, layout in given.items() if not isinstance(layout, Free)}
        if name in ("type_as", "to", "expand_as", "view_as", "reshape_as") and len(node.args) > 1:
            depending.pop(getattr(node.args[1], "value", -1), None)     # only its shape or its type is read
        ragged = self._by_mask(name, node)
        if ragged is not None:
            return ragged
        if moved is None or len(moved) > 1:
            return Mixed("has more than one dimension whose size moves with the rows")
        if not moved:
            return self._without_rows(depending, value)
        if not depending:
            return self._made(name, node, moved[0])
        return self._with_rows(name, node, value, moved[0], depending)

    def _name(self, node: Node) -> str:
        if node.is_module:
            return type(self._model.get_submodule(str(node.target))).__name__
        return getattr(node.target, "__name__", "").strip("_")

    @staticmethod
    def _counts_rows(name: str, node: Node, twin: Node, moved: bool) -> bool:
        """Whether a number that follows from the number of rows goes into the result, other than as a size."""
        if name in ("full", "new_full"):
            return _constants((node.args[-1:], node.kwargs)) != _constants((twin.args[-1:], twin.kwargs))
        own, other = _constants((node.args, node.kwargs)), _constants((twin.args, twin.kwargs))
        return own != other and not (moved and name in _SIZED)

    def _by_mask(self, name: str, node: Node) -> Layout | None:
        """Entries chosen by a mask of the rows stay in their order; how many they are says nothing."""
        if name not in ("getitem", "masked_select") or len(node.args) < 2 or not isinstance(node.args[1], Ref):
            return None
        source, mask = node.args[0].value, node.args[1].value
        if self._micro.values[mask].spec.dtype != torch.bool or isinstance(self._found[mask], Free):
            return None
        whole = Rows(0)
        if self._found[mask] == whole and self._found[source] in (whole, Free()):
            return whole
        return Mixed("is chosen by a mask in which rows do not come first")

    def _without_rows(self, depending: Mapping[int, Layout], value: int) -> Layout:
        mixed = [layout for layout in depending.values() if isinstance(layout, Mixed)]
        if mixed and not mixed[0].order:
            return mixed[0]
        shape = self._shape(value)
        for given, layout in depending.items():     # as many chosen by a mask in the micro-batch as in the full batch
            if isinstance(layout, Rows) and not self._moved(given) and shape[:1] == self._shape(given)[:1]:
                return layout
        return Reduced() if depending else Free()

    def _made(self, name: str, node: Node, dim: int) -> Layout:
        """What has rows though nothing that it is made from has."""
        if name in _BROADCASTS or name in ("full", "new_full") or node.random:
            return Rows(dim)
        if name == "arange" and len(node.args) == 1 and set(node.kwargs) <= {"device", "dtype"}:
            return Numbers()
        return Mixed(f"is made from the number of rows (at {node.name})")

    def _with_rows(self, name: str, node: Node, value: int, dim: int, depending: Mapping[int, Layout]) -> Layout:
        if name in _PICKS and (picked := self._pick(name, node, dim)) is not None:
            return picked
        for layout in depending.values():
            if isinstance(layout, Mixed):
                return layout
        if len(depending) == 1 and Numbers() in depending.values() and name in _VIEWS:
            return Numbers()
        if any(isinstance(layout, (Reduced, Numbers)) for layout in depending.values()):
            return Mixed(f"mixes rows (at {node.name})")
        rows = {v: layout for v, layout in depending.items() if isinstance(layout, Rows)}
        if (along := self._along(name, node, rows)) is not None:
            return along
        if name in ("cat", "concat", "concatenate"):
            return self._joined(node, value, dim, rows)
        if len(rows) > 1 or name not in (*_RESHAPES, *_BROADCASTS, *_SLICES, "as_strided"):
            return self._kept(node, value, dim, rows)
        ((given, layout),) = rows.items()
        if name == "as_strided":
            return self._strided(node, given, layout, value, dim)
        return self._changed(name, node, given, layout, value, dim)

    def _pick(self, name: str, node: Node, dim: int) -> Layout | None:
        """Entries picked by an index; None where the index is none or leaves rows alone."""
        source = self._found[node.args[0].value] if isinstance(node.args[0], Ref) else Free()
        index = node.args[1:] if name != "getitem" or not isinstance(node.args[1], tuple) else node.args[1]
        tensors = [self._found[i.value] for i in index if isinstance(i, Ref)]
        if not tensors:
            return None
        if isinstance(source, Mixed) and source.order:
            return Rows(dim)                    # put in order again
        if isinstance(source, Rows) and name == "getitem":
            at = index[source.dim] if source.dim < len(index) else None
            if not isinstance(at, Ref):
                return None
            if isinstance(self._found[at.value], Numbers) and source.outer == 1:
                return Rows(dim)
        elif not isinstance(source, Rows) or not isinstance(index[0], int) or \
                index[0] % len(self._shape(node.args[0].value)) != source.dim:
            return None
        return Mixed(f"picks rows by an index (at {node.name})", order=True)

    def _along(self, name: str, node: Node, rows: Mapping[int, Rows]) -> Mixed | None:
        """Not rows after one another any more: ordered, or added up, along them."""
        if name not in _ALONG:
            return None
        position, default = _ALONG[name]
        dims = node.kwargs.get("dim", node.kwargs.get("dims", node.kwargs.get("axis")))
        dims = dims if dims is not None else node.args[position] if len(node.args) > position else default
        first, layout = next(iter(rows.items()))
        count = len(self._shape(first))
        wanted = range(count) if dims is None else [d % count for d in (dims if isinstance(dims, (tuple, list)) else
                                                                       [dims])]
        return Mixed(f"is ordered or added up along the rows (at {node.name})", name in _ORDERS) \
            if layout.dim in wanted else None

    def _joined(self, node: Node, value: int, dim: int, rows: Mapping[int, Rows]) -> Layout:
        given = node.args[0] if node.args else node.kwargs["tensors"]
        parts = [part.value for part in given if isinstance(part, Ref) and 0 not in self._shape(part.value)]
        if self._shape(value)[dim] == self._shape(parts[0])[dim]:       # along another dimension
            return self._kept(node, value, dim, rows)
        alike = {self._shape(part)[dim] for part in parts}
        if len(alike) == 1 and all(self._found[part] == Rows(dim) for part in parts):
            return Rows(dim, len(parts))
        return Mixed(f"has rows and something else in one dimension (at {node.name})")

    def _kept(self, node: Node, value: int, dim: int, rows: Mapping[int, Rows]) -> Layout:
        """Rows in, rows out: as many of them, in the same order."""
        size, full = self._shape(value)[dim], self._full.values[value].spec.shape[dim]
        orders = set()
        for given, layout in rows.items():
            before = self._shape(given)[layout.dim], self._full.values[given].spec.shape[layout.dim]
            if before[0] != before[1] and before != (size, full):
                return Mixed(f"has another number of entries per row than what it is made from (at {node.name})")
            orders.add(layout.outer)
        return Rows(dim, orders.pop()) if len(orders) == 1 else Mixed(f"joins rows of several orders (at {node.name})")

    def _strided(self, node: Node, given: int, layout: Rows, value: int, dim: int) -> Layout:
        """Memory read in other steps: rows where every entry of ``dim`` stays within the memory of its own row."""
        steps = [_steps(recording.values[given].spec, layout.dim, recording.values[value].spec, dim)
                 for recording in (self._micro, self._full)]
        from_the_start = len(node.args) <= 3 and "storage_offset" not in node.kwargs
        return Rows(dim, layout.outer) if steps[0] is not None and steps[0] == steps[1] and from_the_start else \
            Mixed(f"reads memory across rows (at {node.name})")

    def _changed(self, name: str, node: Node, given: int, layout: Rows, value: int, dim: int) -> Layout:
        """One value in another shape, repeated or in part."""
        before, after = self._shape(given), self._shape(value)
        kept = self._kept(node, value, dim, {given: layout})
        if name in _RESHAPES:
            ahead, left = prod(before[:layout.dim]) * layout.outer, prod(after[:dim])
            return Rows(dim, ahead // left) if ahead % left == 0 and after[dim] % (ahead // left) == 0 else \
                Mixed(f"spreads rows over several dimensions (at {node.name})")
        if name in ("repeat", "tile") and len(before) == len(after) and before[layout.dim] != after[dim]:
            return Rows(dim, layout.outer * (after[dim] // before[layout.dim]))
        if name == "repeat_interleave" and layout.outer == 1:
            return Rows(dim)
        if name in _SLICES and after[dim] * layout.outer == before[layout.dim]:
            return Rows(dim)                    # one of the blocks that were joined
        return kept


def _steps(source: TensorSpec, dim: int, result: TensorSpec, at: int) -> list[tuple[int, int, bool]] | None:
    """How far apart entries of one row lie in a value and in another on its memory, in rows or in all rows together;
    None where what dimension ``at`` calls a row is none of dimension ``dim``."""
    step, told = source.stride[dim], []
    everything = step * source.shape[dim]
    if not everything or (result.stride[at], result.shape[at]) != (step, source.shape[dim]):
        return None
    for spec, rows in ((source, dim), (result, at)):
        others = [(size, stride, bool(stride) and stride % everything == 0)
                  for d, (size, stride) in enumerate(zip(spec.shape, spec.stride)) if d != rows and size > 1]
        if 1 + sum((size - 1) * stride for size, stride, outside in others if not outside) > step:
            return None
        told += [(size, stride // everything if outside else stride, outside) for size, stride, outside in others]
    return told


def _constants(structure: object) -> object:
    """``structure`` without its tensors, comparable."""
    if isinstance(structure, Ref):
        return "tensor"
    if isinstance(structure, dict):
        return [(key, _constants(item)) for key, item in structure.items()]
    if isinstance(structure, Sequence) and not isinstance(structure, (str, bytes)):
        return [_constants(item) for item in structure]
    return structure if isinstance(structure, (int, float, str, bool, type(None))) else type(structure)
