"""What one worker brings to a checkpoint, and which of it this worker writes."""
from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from pipeengine.checkpoint.holdings import Holdings
from pipeengine.checkpoint.host_buffer import padded
from pipeengine.checkpoint.hugging_face import SINGLE
from pipeengine.checkpoint.optimizer_state import OptimizerShare, is_optimizer, parameter_names, share_of
from pipeengine.checkpoint.plain import Packer
from pipeengine.checkpoint.tensor_file import bytes_of
from pipeengine.checkpoint.whole_tensors import check_state, make_whole
from pipeengine.distributed import is_sharded
from pipeengine.errors import InputError

PLAN = "plan.json"
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class PlainShare:
    """The state of a part that belongs to no parameter: as JSON, with its tensors apart, and a digest of both."""

    packed: object
    tensors: dict[str, torch.Tensor]
    digest: str


@dataclass(frozen=True)
class Share:
    """All that one worker has: ``weights`` that it owns, and the state of every part. Of what is sharded it has rows,
    until they are ``whole``; ``foreign`` are sharded parameters that another worker writes."""

    weights: dict[str, torch.Tensor]
    parts: dict[str, OptimizerShare | PlainShare]
    counters: dict[str, int]
    foreign: frozenset[str] = frozenset()

    def claims(self) -> dict[str, Any]:
        """What the workers compare before they write, as JSON: of optimizers the parameters, of other parts digests;
        and what is sharded of which parameter's state."""
        optimizers = self._optimizers()
        return {"parts": {name: sorted(set(part.parameters) - self.foreign) if isinstance(part, OptimizerShare)
                          else part.digest for name, part in self.parts.items()},
                "sharded": {f"{name} of {parameter}": sorted(key for key, one in tensors.items() if is_sharded(one))
                            for name, part in optimizers.items() for parameter, tensors in part.tensors.items()
                            if any(map(is_sharded, tensors.values()))}}

    def _optimizers(self) -> dict[str, OptimizerShare]:
        return {name: part for name, part in self.parts.items() if isinstance(part, OptimizerShare)}

    def whole(self, holdings: Holdings) -> Share:
        """What this worker writes, put together from everybody's rows; every worker calls it."""
        def owner(name: str) -> int:
            return holdings.owner[name]
        parts = dict(self.parts)
        for name, part in sorted(self._optimizers().items()):
            tensors = {parameter: make_whole(own, lambda key, of=parameter: owner(of), holdings.collect)  # type: ignore
                       for parameter, own in sorted(part.tensors.items())}
            parts[name] = part._replace(tensors={one: own for one, own in tensors.items() if one not in self.foreign})
        return Share(make_whole(self.weights, owner, holdings.collect), parts, self.counters, self.foreign)


def collect(holdings: Holdings, parts: Mapping[str, Any]) -> Share:
    """This worker's share; tensors are not copied. Raises ``InputError`` that names the part and the key of what cannot
    be written."""
    names = parameter_names(holdings.named_parameters())
    weights = {name: tensor.detach() for name, tensor in holdings.persistent().items()
               if name in holdings.owned or is_sharded(tensor)}
    sharded = {name for name, parameter in holdings.named_parameters() if is_sharded(parameter)}
    states: dict[str, OptimizerShare | PlainShare] = {}
    for name, part in parts.items():
        if not is_optimizer(part):
            states[name] = plain_share(name, part)
            continue
        states[name] = state = share_of(name, part, names)
        for parameter in sharded & set(state.tensors):
            check_state(name, parameter, state.tensors[parameter])
    return Share(weights, states, holdings.counters(), frozenset(sharded - holdings.owned))


def expected_bytes(holdings: Holdings, parts: Mapping[str, Any]) -> tuple[int, bool]:
    """About what this worker's files will hold, and whether it comes from a GPU. Asks no part for its state: that of a
    loader may count how often it was asked."""
    tensors = [tensor for name, tensor in holdings.persistent().items() if name in holdings.owned]
    owned = [parameter for name, parameter in holdings.named_parameters() if name in holdings.owned]
    for part in filter(is_optimizer, parts.values()):
        for parameter in owned:
            state = part.state.get(parameter)
            tensors += [one for one in state.values() if isinstance(one, torch.Tensor)] \
                if isinstance(state, Mapping) else []
    return (sum(padded(tensor.numel() * tensor.element_size()) for tensor in tensors),
            any(tensor.device.type == "cuda" for tensor in tensors))


def plain_share(name: str, part: Any) -> PlainShare:
    """The state of a scheduler, a scaler, a loader."""
    packer = Packer(name)
    packed = packer.pack(part.state_dict(), "state")
    digest = hashlib.sha256(json.dumps(packed, sort_keys=True).encode())
    for key, tensor in packer.tensors.items():
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor.cpu().reshape(-1)))
    return PlainShare(packed, packer.tensors, digest.hexdigest())


def check_claims(everybody: Sequence[Mapping[str, Any]]) -> None:
    """Raise ``InputError`` unless all workers save the same step with the same parts."""
    for rank, claim in enumerate(everybody):
        for what in ("step", "folder"):
            if claim[what] != everybody[0][what]:
                raise InputError(f"workers disagree on the {what} of a checkpoint: worker 0 saves "
                                 f"{everybody[0][what]}, worker {rank} {claim[what]}; every worker must call save "
                                 "with the same")
        if set(claim["parts"]) != set(everybody[0]["parts"]):
            raise InputError("workers disagree on the parts of a checkpoint: worker 0 has "
                             f"{sorted(everybody[0]['parts'])}, worker {rank} {sorted(claim['parts'])}; give every "
                             "worker the same")
    sharded: dict[str, list[str]] = {}
    for rank, claim in enumerate(everybody):
        for what, keys in claim.get("sharded", {}).items():
            if sharded.setdefault(what, keys) != keys:
                raise InputError(f"the replicas have different state in {what}: {sharded[what]} and, on worker {rank}, "
                                 f"{keys}; make the same steps on all workers before a save")


def files_to_write(share: Share, everybody: Sequence[Mapping[str, Any]], rank: int,
                   writers: Sequence[int] | None = None) -> dict[str, Tensors]:
    """This worker's files with their tensors: what another worker of lower rank has as well is left to that one.
    Weights have a file for each of the ``writers`` (all workers)."""
    writers = range(len(everybody)) if writers is None else writers
    files: dict[str, Tensors] = {}
    numbered = f"{rank + 1:05}-of-{len(everybody):05}.safetensors"
    if rank in writers:
        files[weights_file(writers.index(rank), len(writers))] = share.weights
    for name, part in share.parts.items():
        tensors: dict[str, torch.Tensor] = {}
        if isinstance(part, OptimizerShare):
            taken = {parameter for claim in everybody[:rank] for parameter in claim["parts"][name]}
            for parameter, own in part.tensors.items():
                tensors |= {} if parameter in taken else own
        elif rank == 0 or not all_alike(everybody, name):
            tensors = part.tensors
        if tensors:
            files[f"{name}-{numbered}"] = tensors
    return files


def weights_file(number: int, count: int, attempt: str = "") -> str:
    """The name of file ``number``, from 0, of ``count`` that hold weights; ``attempt`` tells two saves apart."""
    return SINGLE if count == 1 else f"model-{attempt}{number + 1:05}-of-{count:05}.safetensors"


def all_alike(everybody: Sequence[Mapping[str, Any]], part: str) -> bool:
    """Whether all workers have the same state of a part."""
    return all(claim["parts"][part] == everybody[0]["parts"][part] for claim in everybody)


def record_of(share: Share) -> dict[str, Any]:
    """The JSON of a worker's parts, for worker 0 to put together."""
    return {name: {"groups": part.groups, "parameters": part.parameters, "other": part.other}
            if isinstance(part, OptimizerShare) else part.packed for name, part in share.parts.items()}


@dataclass(frozen=True)
class Closing:
    """What worker 0 adds to everybody's files: texts of small files, and the facts of the manifest."""

    texts: dict[str, bytes]
    facts: dict[str, Any]
    alike: dict[str, bool]
    optimizers: frozenset[str]
    counters: dict[str, int]


@dataclass(frozen=True)
class Constants:
    """What is the same in all checkpoints of a pipeline, made once."""

    plan: bytes
    versions: dict[str, str]

    @classmethod
    def of(cls, holdings: Holdings) -> Constants:
        """The plan as JSON, and the versions that write."""
        return cls(json.dumps(holdings.plan()).encode(),
                   {"pipeengine": _version("pipeengine"), "torch": str(torch.__version__),
                    "python": sys.version.split()[0]})


def closing(holdings: Holdings, parts: Mapping[str, Any], share: Share, step: int,
            everybody: Sequence[Mapping[str, Any]], constants: Constants) -> Closing:
    """Worker 0's part of a save, made while nothing changes."""
    texts = {**config_files(holdings.model), PLAN: constants.plan}
    facts = {
        "step": step,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "workers": len(everybody),
        "model": {"class": type(holdings.model).__name__,
                  "parameters": sum(parameter.numel() for parameter in holdings.model.parameters())},
        "plan": {"stages": holdings.num_stages, "schedule": holdings.schedule,
                 "digest": hashlib.sha256(texts[PLAN]).hexdigest()},
        "parts": {name: type(part).__name__ for name, part in parts.items()},
        "versions": constants.versions,
    }
    optimizers = frozenset(name for name, part in share.parts.items() if isinstance(part, OptimizerShare))
    alike = {name: all_alike(everybody, name) for name in share.parts}
    return Closing(texts, facts, alike, optimizers, share.counters)


def config_files(model: torch.nn.Module) -> dict[str, bytes]:
    """The files that a Hugging Face model's config saves, by name; none for other models."""
    save = getattr(getattr(model, "config", None), "save_pretrained", None)
    if save is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def index_text(files: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The index of sharded weights, from what a manifest says of their files."""
    sizes = sum(one["end"] - one["start"] for entry in files.values() for one in entry["tensors"].values())
    index = {"metadata": {"total_size": sizes},
             "weight_map": {name: file for file, entry in files.items() for name in entry["tensors"]}}
    return (json.dumps(index, indent=2) + "\n").encode()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
