"""Weights into a folder that may hold older ones, so that at any moment either the old or the new are there whole."""
from __future__ import annotations

import re
import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeengine.checkpoint import disk
from pipeengine.checkpoint.collecting import config_files, index_text, weights_file
from pipeengine.checkpoint.hugging_face import INDEX, SINGLE
from pipeengine.checkpoint.slots import get_tensor, tensor_slots
from pipeengine.checkpoint.tensor_file import TensorFile, stream, write_tensors
from pipeengine.checkpoint.whole_tensors import Collect, as_it_is, make_whole
from pipeengine.distributed import Workers, is_sharded
from pipeengine.errors import InputError

_SHARD = re.compile(r"model-(?:[0-9a-f]{8}-)?\d{5}-of-\d{5}\.safetensors")
_LEFTOVER = re.compile(r"\.saving-[0-9a-f]{8}")


def save_weights(model: torch.nn.Module, owned: Collection[str], folder: Path, workers: Workers,
                 writers: Sequence[int] | None = None, owner: Mapping[str, int] | None = None,
                 collect: Collect = as_it_is) -> None:
    """Every worker, or those of ``writers``, writes the tensors it owns, then worker 0 puts them in the place of what
    was there.

    Files are written beside the old ones, flushed, and renamed; the index is replaced last (of one worker's weights the
    one file), and only then what was there before goes. Raises ``InputError`` on every worker where the folder cannot
    be written; what it held is as it was. Sharded tensors are written by their ``owner``, put together by ``collect``.
    """
    tensors = make_whole(_persistent(model, owned), lambda name: (owner or {})[name], collect)
    writers = range(workers.size) if writers is None else writers
    attempt = workers.broadcast_object(uuid.uuid4().hex[:8])
    part = folder / f".saving-{attempt}"

    def begin() -> None:
        if workers.rank == 0:
            disk.make_folder(folder)
            disk.make_folder(part)

    def write() -> dict[str, Any] | None:
        if workers.rank not in writers:
            return None
        if not part.is_dir():
            raise InputError(f"worker {workers.rank} does not see {part}, which worker 0 has made; give a folder that "
                             "all workers share")
        file = TensorFile.of(tensors)
        name = weights_file(writers.index(workers.rank), len(writers))
        return write_tensors(part / name, file, stream(file, tensors))

    def commit() -> None:
        if workers.rank == 0:
            _commit(folder, part, attempt, written, config_files(model))
    try:
        workers.run_synchronized(begin)
        everybody = workers.all_gather_object(workers.run_synchronized(write))
        written = [one for one in everybody if one is not None]
        workers.run_synchronized(commit)
    finally:
        if workers.rank == 0:
            disk.remove_quietly(part)


def _persistent(model: torch.nn.Module, owned: Collection[str]) -> dict[str, torch.Tensor]:
    """The owned parameters and persistent buffers, and those that are sharded, by first name."""
    state = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    tensors = {name: get_tensor(*places[0]) for name, places in tensor_slots(model).items()}
    tensors = {name: tensor for name, tensor in tensors.items() if name in owned or is_sharded(tensor)}
    return {name: tensor.detach() for name, tensor in tensors.items() if id(tensor) in state}


def _commit(folder: Path, part: Path, attempt: str, written: Sequence[Mapping[str, Any]],
            configs: Mapping[str, bytes]) -> None:
    """Worker 0: give all files their names, the one that says which of them count last; then remove the others."""
    size = len(written)
    for name, text in configs.items():
        disk.write_file(part / name, [text])
        disk.replace_file(part / name, folder / name)
    old = {path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name)}
    plain = [weights_file(number, size) for number in range(size)]
    names = [weights_file(number, size, f"{attempt}-") for number in range(size)] if old & set(plain) else plain
    for before, name in zip(plain, names):
        disk.replace_file(part / before, folder / name)
    if size > 1:
        disk.write_file(part / INDEX, [index_text(dict(zip(names, written)))])
        disk.replace_file(part / INDEX, folder / INDEX)
    # What was there before would be read in the place of this, or take room; the index goes first: none lacks a file.
    for name in (SINGLE if size > 1 else INDEX, *sorted(old - set(names))):
        disk.remove_file(folder / name)
    for path in folder.iterdir():
        if _LEFTOVER.fullmatch(path.name) and path != part:
            disk.remove_quietly(path)
