"""From a batch to micro-batches: what is split, what goes whole, and what the micro-batches weigh."""
from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch

from pipeengine.data.checksum import checksum, combine
from pipeengine.data.packed_images import PACKED_NAMES, packed_entries
from pipeengine.errors import InputError
from pipeengine.tracing import Inputs, is_cache, tree_encode, tree_map


@dataclass(frozen=True)
class Batch:
    """A batch, taken apart; ``take_apart`` makes it.

    ``tensors`` are its distinct tensors in a fixed order, ``dims`` the dimension along which each is split (None: goes
    whole to every micro-batch). ``key`` is everything but the numbers. ``packed``: of some tensors, by index, how many
    entries of dimension 0 belong to each row.
    """

    inputs: Inputs
    tensors: tuple[torch.Tensor, ...]
    dims: tuple[int | None, ...]
    rows: int
    key: tuple
    packed: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def amount(self) -> tuple[int, str]:
        """How much the batch holds: (elements, "tokens") of its first two-dimensional tensor of integers that is split
        along dimension 0, else (rows, "rows")."""
        for tensor, dim in zip(self.tensors, self.dims):
            if dim == 0 and tensor.dim() == 2 and tensor.dtype in (torch.int64, torch.int32):
                return tensor.numel(), "tokens"
        return self.rows, "rows"

    def sizes(self, num_microbatches: int) -> tuple[int, ...]:
        """Rows of each micro-batch, as ``tensor_split`` makes them; at most one micro-batch per row."""
        count = min(num_microbatches, self.rows)
        return tuple(self.rows // count + (i < self.rows % count) for i in range(count))

    def on(self, device: torch.device) -> Callable[[], list[torch.Tensor]]:
        """What gives the whole tensors on ``device``, once somebody needs them: most losses are weighed without."""
        return cache(lambda: self._moved(device))

    def _moved(self, device: torch.device) -> list[torch.Tensor]:
        """The tensors on ``device``. The host does not wait for copies out of pinned memory, as a DataLoader makes
        it."""
        if device.type == "cpu":
            return [tensor.to(device) for tensor in self.tensors]
        return [tensor.to(device, non_blocking=tensor.device.type == "cpu" and tensor.is_pinned())
                for tensor in self.tensors]

    def join(self, parts: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
        """The tensors of the batch that such micro-batches make up: what ``split`` takes apart."""
        return [own[0] if dim is None and index not in self.packed else torch.cat(own, dim or 0)
                for index, (own, dim) in enumerate(zip(zip(*parts), self.dims))]

    def split(self, num_microbatches: int, device: torch.device) -> list[list[torch.Tensor]]:
        """For each micro-batch its tensors, in the order of ``tensors``, on ``device``."""
        count = min(num_microbatches, self.rows)
        moved = self._moved(device)
        entries = list(zip(*self.packed_sizes(num_microbatches)))
        cut = dict(zip(self.packed, entries))
        parts = [torch.split(tensor, cut[index]) if index in cut else
                 [tensor] * count if dim is None else torch.tensor_split(tensor, count, dim)
                 for index, (tensor, dim) in enumerate(zip(moved, self.dims))]
        return [list(part) for part in zip(*parts)]

    def packed_sizes(self, num_microbatches: int) -> tuple[tuple[int, ...], ...]:
        """For each micro-batch, how many entries of each packed tensor it gets."""
        sizes = self.sizes(num_microbatches)
        if not self.packed:
            return ((),) * len(sizes)
        starts = [sum(sizes[:number]) for number in range(len(sizes) + 1)]
        return tuple(tuple(sum(rows[a:b]) for rows in self.packed.values()) for a, b in zip(starts, starts[1:]))

    def again(self, tensors: Sequence[torch.Tensor]) -> Inputs:
        """The inputs with other tensors in the place of ``tensors``, in their order; shared tensors stay shared."""
        at = {id(tensor): index for index, tensor in enumerate(self.tensors)}
        args, kwargs, target = tree_map(self.inputs.everything(), lambda leaf: tensors[at[id(leaf)]]
                                       if isinstance(leaf, torch.Tensor) else leaf)
        return Inputs(args, kwargs, target)

    def digest(self) -> int:
        """A number of 32 bits that tells batches apart, by every byte of every tensor; ``benchmarks/watch.py`` says
        what that costs.

        Objects that are no tensors, numbers or texts count by their type: they have no bytes to compare.
        """
        return combine(repr(_without_identities(self.key)), [checksum(tensor) for tensor in self.tensors])


def take_apart(inputs: Inputs, *, names: Sequence[str], batch_dims: Mapping[str, int | None] | None) -> Batch:
    """Find the rows of a batch and how each tensor is split.

    ``names`` are those of positional arguments. ``batch_dims`` says by name along which dimension a tensor is split,
    or None for what goes whole. The rows are those of the first tensor with such a dimension, else dimension 0 of the
    first tensor that has one; a tensor not named is split if its dimension 0 has as many, or if it holds the images of
    all rows one after another (see ``packed_images``). A tensor that stands under several names is split once, as the
    first of them says. Raises ``InputError`` for what cannot be a batch.
    """
    dims = dict(batch_dims or {})
    named = [*((names[i] if i < len(names) else f"argument {i}", value) for i, value in enumerate(inputs.args)),
             *inputs.kwargs.items(), ("target", inputs.target)]
    unknown = set(dims) - {name for name, _ in named} - set(names)
    if unknown:
        raise InputError(f"batch_dims names {sorted(unknown)}, the inputs are {[name for name, _ in named]}")
    tensors: list[torch.Tensor] = []
    wanted: list[object] = []
    owners: list[str] = []
    seen: dict[int, int] = {}

    def leaf(name: str, value: object) -> object:
        if not isinstance(value, torch.Tensor):
            if is_cache(value):
                raise InputError(f"input {name} is a cache ({type(value).__name__}), which the model would write to, "
                                 "and which a pipeline cannot split into micro-batches; leave it out, and generate "
                                 "with a model that holds all weights (see save_weights)")
            return ("object", type(value).__name__, id(value))
        if value.requires_grad:
            raise InputError(f"input {name} needs a gradient; a pipeline gives none to its inputs: pass "
                             f"{name}.detach()")
        if id(value) not in seen:
            seen[id(value)] = len(tensors)
            tensors.append(value)
            wanted.append(dims.get(name, "rows"))
            owners.append(name)
        return ("tensor", seen[id(value)], tuple(value.shape), value.dtype,
                tuple(value.stride()) if value.layout == torch.strided else value.layout)
    key = tuple((name, _hashable(tree_encode(value, lambda x, name=name: leaf(name, x)))) for name, value in named)
    # What holds the images of all rows says nothing about their number, where something else does.
    order = sorted(range(len(tensors)), key=lambda index: owners[index] in PACKED_NAMES)
    rows = _rows([tensors[index] for index in order], [wanted[index] for index in order])
    for tensor, want, name in zip(tensors, wanted, owners):
        if name == "target" and want == "rows" and tensor.dim() and tensor.shape[0] not in (1, rows):
            raise InputError(f"target has {tensor.shape[0]} rows, the batch has {rows}; give as many, or pass "
                             "batch_dims={'target': None} if every micro-batch shall have the whole of it")
    packed = packed_entries({name: t for t, want, name in zip(tensors, wanted, owners) if want == "rows"}, rows)
    return Batch(inputs, tuple(tensors), tuple(_dim(t, want, rows) for t, want in zip(tensors, wanted)), rows, key,
                 {index: packed[name] for index, name in enumerate(owners) if name in packed})


def _rows(tensors: Sequence[torch.Tensor], wanted: Sequence[object]) -> int:
    counts = [(t.shape[want], t) for t, want in zip(tensors, wanted) if isinstance(want, int)]
    counts += [(t.shape[0], t) for t, want in zip(tensors, wanted) if want == "rows" and t.dim()]
    if not counts:
        raise InputError(f"the batch holds {len(tensors)} tensors and none with rows; pass at least one tensor whose "
                         "dimension 0 counts the rows")
    if counts[0][0] == 0:
        raise InputError(f"the batch is empty: its first tensor has shape {tuple(counts[0][1].shape)}, 0 rows; skip "
                         "such batches in the loader")
    return counts[0][0]


def _dim(tensor: torch.Tensor, want: object, rows: int) -> int | None:
    if want == "rows":
        return 0 if tensor.dim() and tensor.shape[0] == rows else None
    if want is not None and tensor.shape[want] != rows:
        raise InputError(f"batch_dims says dimension {want}, which has {tensor.shape[want]} entries; the batch has "
                         f"{rows} rows")
    return want


def _without_identities(key: object) -> object:
    """A key in which objects stand by their type: the same object is another one in another process."""
    if isinstance(key, tuple):
        if len(key) == 3 and key[0] == "object":
            return key[:2]
        return tuple(map(_without_identities, key))
    return key


def _hashable(value: object) -> object:
    if isinstance(value, dict):
        return tuple((key, _hashable(item)) for key, item in value.items())
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return tuple(_hashable(item) for item in value)
    if isinstance(value, slice):
        return "slice", _hashable((value.start, value.stop, value.step))
    if hasattr(value, "parts"):
        return str(getattr(value.build, "args", value.build)), _hashable(value.parts)
    return (type(value).__name__, value) if isinstance(value, (bool, int, float)) else value


def argument_names(model: torch.nn.Module) -> tuple[str, ...]:
    """Names of the positional arguments of the model's forward."""
    return tuple(name for name, p in inspect.signature(model.forward).parameters.items()
                 if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
