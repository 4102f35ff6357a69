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
from contextlib import ExitStack
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
    """Name of every tensor on disk -> its file."""
    if (folder / INDEX).exists():
        return json.loads((folder / INDEX).read_text())["weight_map"]
    if (folder / SINGLE).exists():
        with safetensors().safe_open(folder / SINGLE, framework="pt") as reader:
            return dict.fromkeys(reader.keys(), SINGLE)
    raise InputError(f"{folder} is no checkpoint: it has neither {INDEX} nor {SINGLE}")


def read(
    folder: Path, files: Mapping[str, str], sources: Collection[Source]
) -> Iterator[tuple[Source, Mapping[str, torch.Tensor]]]:
    """What each source gives, one after the other; nothing else is read."""
    with ExitStack() as stack:
        readers = {}
        for source in sources:
            for file in {files[key] for key in source.keys} - set(readers):
                readers[file] = stack.enter_context(safetensors().safe_open(folder / file, framework="pt"))
            yield source, source.convert([readers[files[key]].get_tensor(key) for key in source.keys])


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
