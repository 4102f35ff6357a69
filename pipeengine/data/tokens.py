"""Files of tokens as data: sequences of one length, read from disk as they are asked for."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.utils.data import Dataset

from pipeengine.errors import InputError


class TokenDataset(Dataset[dict[str, torch.Tensor]]):
    """Sequences of ``length`` tokens from token files, memory-mapped: map-style, for files of any size.

    - ``files``: a ``.bin`` file of bare numbers or a ``.npy`` file of one dimension, or several of them. A sequence
      never goes over the end of a file; what does not fill one is left out.
    - ``dtype``: that of the numbers in a ``.bin`` file, such as "uint16" (what nanoGPT writes); a ``.npy`` file says
      it.
    - ``stride`` (``length``): tokens between the beginnings of two sequences; 1 gives every window.
    - ``shift`` (False): whether the targets are those one token on, for models that compare place by place. Hugging
      Face models shift by themselves.
    - ``names`` ("input_ids", "labels"): what the model calls tokens and targets.

    An item is a dict of two int64 tensors of shape (length,). Raises ``InputError`` for files that are none.
    """

    def __init__(self, files: str | Path | Sequence[str | Path], length: int, *, dtype: str | None = None,
                 stride: int | None = None, shift: bool = False, names: tuple[str, str] = ("input_ids", "labels")):
        self.files = tuple(Path(file) for file in ([files] if isinstance(files, (str, Path)) else files))
        self.length, self.dtype, self.names = length, dtype, names
        self.stride = length if stride is None else stride
        self._window = length + shift
        if length < 1 or self.stride < 1:
            raise InputError(f"length is {length} and stride {self.stride}; give at least 1 token")
        self._tokens: tuple[numpy.ndarray, ...] | None = None
        sizes = [len(tokens) for tokens in self._mapped()]
        counts = [max(0, (size - self._window) // self.stride + 1) for size in sizes]
        self._ends = numpy.cumsum(counts, dtype=numpy.int64)
        if not sum(counts):
            raise InputError(f"the longest of {len(self.files)} token files has {max(sizes, default=0):,} tokens, a "
                             f"sequence needs {self._window:,}; give a smaller length, or more tokens")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        index %= len(self)
        file = int(numpy.searchsorted(self._ends, index, side="right"))
        start = (index - (int(self._ends[file - 1]) if file else 0)) * self.stride
        window = torch.from_numpy(self._mapped()[file][start:start + self._window].astype(numpy.int64))
        return {self.names[0]: window[:self.length].clone(), self.names[1]: window[-self.length:].clone()}

    def __getstate__(self) -> dict[str, Any]:
        """What goes to a loader's worker process: where the files are, not what is in them."""
        return {**self.__dict__, "_tokens": None}

    def _mapped(self) -> tuple[numpy.ndarray, ...]:
        if self._tokens is None:
            self._tokens = tuple(_open(file, self.dtype) for file in self.files)
        return self._tokens


def _open(file: Path, dtype: str | None) -> numpy.ndarray:
    """The numbers of a file, mapped into memory."""
    if not file.is_file():
        raise InputError(f"{file} is no file; give the path of a .bin or .npy file of tokens")
    if file.suffix == ".npy":
        try:
            tokens = numpy.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise InputError(f"{file} is no .npy file that can be mapped: {error}") from error
        if tokens.ndim != 1:
            raise InputError(f"{file} has shape {tokens.shape}; tokens lie in 1 dimension, so save them flat")
    elif dtype is None:
        raise InputError(f'{file} does not say what numbers it holds; pass dtype="uint16", or as they were written')
    else:
        item, size = numpy.dtype(dtype).itemsize, file.stat().st_size
        if size % item or not size:
            raise InputError(f"{file} has {size:,} bytes, not a positive multiple of the {item} bytes of a {dtype}; "
                             "pass the dtype with which it was written")
        tokens = numpy.memmap(file, dtype=dtype, mode="r")
    if tokens.dtype.kind not in "iu":
        raise InputError(f"{file} holds {tokens.dtype}; tokens are whole numbers")
    return tokens
