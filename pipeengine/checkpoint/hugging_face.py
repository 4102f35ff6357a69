"""Checkpoint folders, read in the names and shapes of the model at hand.

Hugging Face holds some architectures otherwise than their files do: other names, one tensor for what is one per expert
on disk. transformers knows how to turn one into the other; that is followed here for just the tensors that are wanted.
"""
from __future__ import annotations

import copy
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeengine.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Source:
    """Where a tensor of the model comes from: ``convert`` turns what lies under ``keys`` into tensors by name."""

    keys: tuple[str, ...]
    convert: Callable[[Sequence[torch.Tensor]], Mapping[str, torch.Tensor]]


def files_of(folder: Path) -> dict[str, str]:
    """Name of every tensor on disk -> its file in ``folder``.

    Raises ``InputError``, which names the file, where an index or the one shard is damaged or leads out of the folder.
    """
    if (folder / INDEX).exists():
        return _weight_map(folder / INDEX)
    if (folder / SINGLE).exists():
        with _opened(folder / SINGLE) as reader:
            return dict.fromkeys(reader.keys(), SINGLE)
    raise InputError(f"{folder} is no checkpoint: it has neither {INDEX} nor {SINGLE}")


def _weight_map(index: Path) -> dict[str, str]:
    """What an index says, checked: names of tensors -> names of files beside it."""
    try:
        data = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{index} cannot be read as an index: {error}; copy the checkpoint again") from error
    files = data.get("weight_map") if isinstance(data, Mapping) else None
    if not isinstance(files, Mapping) or not files:
        raise InputError(f"{index} has no weight_map, or an empty one; copy the checkpoint again")
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise InputError(
                f"{index} says that {name} lies in {file!r}; shards are files beside the index, given by name"
            )
    return dict(files)


def _opened(shard: Path) -> AbstractContextManager:
    """An open shard. Raises ``InputError``, which names it, for anything but a whole safetensors file."""
    if not shard.is_file():             # a pipe would never end, a folder cannot be read
        what = "is no ordinary file" if shard.exists() else "is missing"
        raise InputError(f"{shard} {what}; copy the checkpoint again")
    try:
        size = shard.stat().st_size
        with shard.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        # Looked at before anybody makes room for a header that lies about its length.
        if size < 8 or header > size - 8:
            raise InputError(
                f"{shard} is damaged or no safetensors file: its header says {header:,} bytes, the file has "
                f"{size:,}; copy the checkpoint again"
            )
        return safetensors().safe_open(shard, framework="pt")
    except InputError:
        raise
    except Exception as error:          # the library has an error type of its own for each kind of damage
        raise InputError(f"{shard} cannot be read: {error}; copy the checkpoint again") from error


def read(
    folder: Path, files: Mapping[str, str], sources: Collection[Source]
) -> Iterator[tuple[Source, Mapping[str, torch.Tensor]]]:
    """What each source gives, one after the other; nothing else is read. Raises ``InputError`` that names the file."""
    with ExitStack() as stack:
        readers = {}
        for source in sources:
            for file in {files[key] for key in source.keys} - set(readers):
                readers[file] = stack.enter_context(_opened(folder / file))
            yield (
                source,
                source.convert([_tensor(readers[files[key]], key, folder / files[key]) for key in source.keys]),
            )


def _tensor(reader: object, key: str, shard: Path) -> torch.Tensor:
    try:
        return reader.get_tensor(key)
    except Exception as error:
        raise InputError(f"{shard} does not give {key}: {error}; copy the checkpoint again") from error


def sources_of(model: torch.nn.Module, keys: Iterable[str]) -> dict[str, Source]:
    """Name of every tensor of the model that ``keys`` provide -> its source."""
    transforms = _transforms(model)
    if transforms is None:
        return {key: _as_it_is(key, key) for key in keys}
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known, prefix = model.state_dict(), getattr(model, "base_model_prefix", None) or None
    found: dict[str, Source] = {}
    parts: dict[str, list[tuple[str, str]]] = defaultdict(list)         # of a name: (pattern, key)
    for key in sorted(keys, key=_natural):
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], prefix, known)
        if pattern is None:
            found[name] = _as_it_is(name, key)
        else:
            parts[name].append((pattern, key))
    for name, entries in parts.items():
        converter = by_pattern[entries[0][0]]
        source = _converted(converter, name, entries, model)
        found |= {name.replace(converter.target_patterns[0], target): source for target in converter.target_patterns}
    return found


def _transforms(model: torch.nn.Module) -> list | None:
    """What transformers does to checkpoints of this model; None for a model without any of its modules."""
    library = sys.modules.get("transformers.modeling_utils")
    if library is None or not any(isinstance(module, library.PreTrainedModel) for module in model.modules()):
        return None
    from transformers.conversion_mapping import get_model_conversion_mapping
    return get_model_conversion_mapping(model)


def _natural(key: str) -> list:
    """Sorts the tenth layer after the ninth."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]


def _as_it_is(name: str, key: str) -> Source:
    return Source((key,), lambda tensors: {name: tensors[0]})


def _converted(converter, name: str, entries: Sequence[tuple[str, str]], model: torch.nn.Module) -> Source:
    def convert(tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        fresh = copy.deepcopy(converter)
        for (pattern, key), tensor in zip(entries, tensors):
            fresh.add_tensor(name, key, pattern, tensor)
        made = fresh.convert(name, model=model, config=getattr(model, "config", None))
        return {target: value[0] if isinstance(value, list) else value for target, value in made.items()}
    return Source(tuple(key for _, key in entries), convert)


def safetensors():
    """The library of that name, imported."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise InputError("weights in safetensors need the package safetensors: pip install safetensors") from error
    return safetensors
