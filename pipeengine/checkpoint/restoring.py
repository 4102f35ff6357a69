"""A checkpoint put back: everything is read and compared with what is there before anything changes."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch

from pipeengine.checkpoint.disk import read_small
from pipeengine.checkpoint.holdings import Holdings
from pipeengine.checkpoint.hugging_face import safetensors
from pipeengine.checkpoint.manifest import MOST_JSON_BYTES, STATE, Manifest, parse_json
from pipeengine.checkpoint.optimizer_state import is_optimizer, parameter_names, put_state, state_for
from pipeengine.checkpoint.plain import unpack
from pipeengine.checkpoint.tensor_file import DTYPES
from pipeengine.checkpoint.whole_tensors import rows_for
from pipeengine.distributed import put_whole
from pipeengine.errors import InputError


class TensorReader:
    """Tensors of a verified checkpoint by file and name; files stay open until ``close``."""

    def __init__(self, manifest: Manifest):
        self._manifest, self._stack = manifest, ExitStack()
        self._open: dict[str, Any] = {}

    def read(self, file: str, name: str) -> torch.Tensor:
        """A tensor. Raises ``InputError`` that names the file where it is not what the manifest says."""
        entry = self._manifest.files.get(file, {}).get("tensors", {}).get(name)
        path = self._manifest.path / file
        if entry is None:
            raise InputError(f"{path} has no tensor {name[:80]!r}; use another checkpoint")
        try:
            if file not in self._open:
                self._open[file] = self._stack.enter_context(safetensors().safe_open(path, framework="pt"))
            tensor = self._open[file].get_tensor(name)
        except InputError:
            raise
        except Exception as error:          # the library has an error type of its own for each kind of damage
            raise InputError(f"{path} does not give {name}: {error}; use another checkpoint") from error
        if list(tensor.shape) != entry["shape"]:
            raise InputError(f"{path}: {name} has shape {tuple(tensor.shape)} there and {tuple(entry['shape'])} in the "
                             "manifest; use another checkpoint")
        return tensor

    def close(self) -> None:
        """Close the files."""
        self._stack.close()


def prepare_restore(holdings: Holdings, parts: Mapping[str, Any], manifest: Manifest) -> Callable[[], None]:
    """Read what this worker needs of a verified checkpoint; the function returned puts it in place.

    Raises ``InputError`` that names the checkpoint, the part and the tensor where it is of another model or of other
    parts. Weights are read as they are put in place, straight into the tensors that are there.
    """
    path = manifest.path / STATE
    state = parse_json(read_small(path, MOST_JSON_BYTES), path)
    counters, saved = state.get("pipeline"), state.get("parts")
    if not isinstance(counters, dict) or not isinstance(saved, dict):
        raise InputError(f"{path} is no state of a run; use another checkpoint")
    reader = TensorReader(manifest)
    weights = _check_weights(holdings, manifest)
    puts = [_prepare_part(name, part, saved.get(name), holdings, manifest, reader) for name, part in parts.items()]

    def put() -> None:
        with torch.no_grad():
            for name, (file, tensor) in weights.items():
                put_whole(tensor, reader.read(file, name))
        for put_part in puts:
            put_part()
        holdings.set_counters(counters)
        reader.close()
    return put


def _check_weights(holdings: Holdings, manifest: Manifest) -> dict[str, tuple[str, torch.Tensor]]:
    """Name of every held tensor -> its file and the tensor to fill."""
    files = manifest.tensor_files("model")
    known = holdings.persistent()
    places = {}
    for name, tensor in known.items():
        if name not in files:
            raise InputError(f"{manifest.path} lacks {name}; it holds {len(files)} tensors of a "
                             f"{manifest.facts.get('model', {}).get('class')}: is it of this model?")
        entry = manifest.files[files[name]]["tensors"][name]
        own = list(tensor.shape), str(tensor.dtype)
        theirs = entry["shape"], str(DTYPES[entry["dtype"]])
        if own != theirs:
            raise InputError(f"{manifest.path / files[name]}: {name} is {theirs[1]} of shape {theirs[0]}, the model's "
                             f"is {own[1]} of shape {own[0]}; is it of this model?")
        places[name] = (files[name], tensor)
    extra = sorted(set(files) - set(holdings.first_name.values()))
    if extra:
        raise InputError(f"{manifest.path} has {len(extra)} tensors that the model does not have, first {extra[0]}; is "
                         "it of this model?")
    return places


def _prepare_part(name: str, part: Any, saved: Any, holdings: Holdings, manifest: Manifest,
                  reader: TensorReader) -> Callable[[], None]:
    known = saved if isinstance(saved, dict) else {}
    try:
        if is_optimizer(part):
            if not isinstance(known.get("optimizer"), dict):
                raise InputError("it has no optimizer of that name")
            return _prepare_optimizer(name, part, known["optimizer"], holdings, manifest, reader)
        if not isinstance(known.get("states"), list):
            raise InputError("it has no state of that name")
        return _prepare_plain(name, part, known["states"], holdings, manifest, reader)
    except (KeyError, TypeError, IndexError, InputError) as error:
        raise InputError(f"{manifest.path} cannot give {name} its state: {error}; give the parts that were saved, or "
                         "use another checkpoint") from error


def _prepare_optimizer(name: str, optimizer: Any, record: Mapping[str, Any], holdings: Holdings, manifest: Manifest,
                       reader: TensorReader) -> Callable[[], None]:
    files = manifest.tensor_files(f"{name}-")

    held = dict(holdings.named_parameters())

    def tensor(parameter: str, key: str) -> torch.Tensor:
        return rows_for(held[parameter], reader.read(files.get(key, f"{name}-*"), key), key)
    whole = state_for(name, optimizer, parameter_names(holdings.named_parameters()), record, tensor)

    def put() -> None:
        try:
            put_state(optimizer, whole)
        except Exception as error:
            raise _half(name, error) from error
    return put


def _prepare_plain(name: str, part: Any, states: list, holdings: Holdings, manifest: Manifest,
                   reader: TensorReader) -> Callable[[], None]:
    rank, size = holdings.workers.rank, holdings.workers.size
    if len(states) not in (1, size):
        raise InputError(f"each of {len(states)} workers had another state, and now there are {size}; start as many "
                         "workers, or leave the part out")
    own = 0 if len(states) == 1 else rank
    file = f"{name}-{own + 1:05}-of-{manifest.facts['workers']:05}.safetensors"
    value = unpack(states[own], lambda key: reader.read(file, key))

    def put() -> None:
        try:
            part.load_state_dict(value)
        except Exception as error:
            raise _half(name, error) from error
    return put


def _half(name: str, error: Exception) -> InputError:
    return InputError(f"{name} does not take its state: {type(error).__name__}: {error}; what came before it is "
                      f"restored, so start anew, with the {name} that was saved")
