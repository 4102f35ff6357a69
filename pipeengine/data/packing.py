"""Short sequences side by side in rows of one length, each attending to itself only."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy
import torch
from torch.utils.data import Dataset

from pipeengine.errors import InputError

IGNORED = -100


class Sequences(Protocol):
    """Map-style data: ``len()`` and items by number."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


class PackedDataset(Dataset[dict[str, torch.Tensor]]):
    """Rows of ``length`` tokens, each filled with whole sequences of ``data``: no padding but at a row's end.

    - ``data``: map-style; an item is a sequence of token numbers, or a dict with ``input_ids`` and, where they differ,
      ``labels``. Sequences longer than ``length`` are cut into pieces.
    - ``lengths`` (read from the items once): tokens of every item.
    - ``mask`` (True): whether a row has an ``attention_mask``, bool of shape (1, length, length), true where a token
      may look: at itself and what stands before it in its own sequence. Without it a model must tell sequences apart
      by ``position_ids``; models of Transformers do, but only with ``use_cache=False``, and silently do not
      otherwise.
    - ``segments`` (False): whether a row has ``segment_ids``.
    - ``pad`` (0): the token that fills the end of a row.

    A row is a dict of int64 tensors of shape (length,): ``input_ids``; ``labels``, -100 at the first token of each
    sequence (which nothing in its sequence predicts) and in the padding; ``position_ids``, which begin at 0 in every
    sequence; ``segment_ids`` where asked for, 1, 2, ... and 0 in the padding. The padding is a sequence of its own.
    Rows are filled by best fit, longest sequences first (Johnson et al., SIAM J. Comput. 3, 1974), the same way every
    time.
    """

    def __init__(self, data: Sequences, length: int, *, lengths: Iterable[int] | None = None, mask: bool = True,
                 segments: bool = False, pad: int = 0):
        if length < 2:
            raise InputError(f"length is {length}; a row needs at least 2 tokens")
        self.data, self.length, self.mask, self.segments, self.pad = data, length, mask, segments, pad
        sizes = numpy.asarray([len(_fields(data[i])[0]) for i in range(len(data))] if lengths is None
                              else list(lengths), dtype=numpy.int64)
        if len(sizes) != len(data):
            raise InputError(f"there are {len(sizes)} lengths for {len(data)} sequences; give one for each")
        self._pieces, self._ends = best_fit(*_cut(sizes, length), length)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        pieces = self._pieces[self._ends[index - 1] if index else 0:self._ends[index]]
        tokens, labels = torch.full((self.length,), self.pad), torch.full((self.length,), IGNORED)
        positions, segments = torch.zeros(2, self.length, dtype=torch.int64)
        at = 0
        for number, (item, start, size) in enumerate(pieces.tolist(), 1):
            row, own_labels = _fields(self.data[item])
            here = slice(at, at + size)
            tokens[here] = torch.as_tensor(row[start:start + size])
            labels[here] = torch.as_tensor(own_labels[start:start + size])
            labels[at] = IGNORED
            positions[here], segments[here] = torch.arange(size), number
            at += size
        positions[at:] = torch.arange(self.length - at)
        packed = {"input_ids": tokens, "labels": labels, "position_ids": positions}
        if self.segments:
            packed["segment_ids"] = segments
        if self.mask:
            same = segments[:, None] == segments[None, :]
            packed["attention_mask"] = (same & torch.ones_like(same).tril())[None]
        return packed


def _fields(item: Any) -> tuple[Any, Any]:
    """Tokens and labels of an item, which may stand for both."""
    if not isinstance(item, dict):
        return item, item
    return item["input_ids"], item.get("labels", item["input_ids"])


def _cut(sizes: numpy.ndarray, length: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Pieces of at most ``length`` tokens: (item, start) of each, and their sizes."""
    counts = -(-sizes // length)
    items = numpy.repeat(numpy.arange(len(sizes)), counts)
    first = numpy.repeat(numpy.cumsum(counts) - counts, counts)
    starts = (numpy.arange(len(items)) - first) * length
    return numpy.stack([items, starts], 1), numpy.minimum(sizes[items] - starts, length)


def best_fit(pieces: numpy.ndarray, sizes: numpy.ndarray, capacity: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Put every piece into the fullest row that still takes it, longest first.

    Returns the rows (item, start, size) of all pieces, row by row, and where each row ends. O(n (log n + capacity /
    64)).
    """
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]     # by the room that is left
    rooms = 0                                                          # bit r: some row has room r
    for piece in numpy.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            rooms ^= (not open_rows[room]) << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(piece)
        if room > size:
            open_rows[room - size].append(row)
            rooms |= 1 << (room - size)
    order = numpy.asarray([piece for row in rows for piece in row], dtype=numpy.int64)
    packed = numpy.concatenate([pieces[order], sizes[order, None]], 1)
    return packed, numpy.cumsum([len(row) for row in rows], dtype=numpy.int64)
