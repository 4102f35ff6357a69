"""An optimizer's state in the names of its parameters, so that any number of workers reads what another wrote.

torch numbers the parameters of an optimizer, and each worker's optimizer has others. Here each parameter brings its own
state and the settings of its group with it (learning rate, betas); a worker takes from a checkpoint what its
optimizer's parameters ask for.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from pipeengine.checkpoint.plain import Packer, unpack
from pipeengine.errors import InputError

_OWN = ("params", "param_names")        # keys of a group that are not settings


class OptimizerShare(NamedTuple):
    """What one worker's optimizer holds, as JSON: ``groups`` are settings by number of the group, ``parameters`` the
    group and the state by name, ``other`` what else its state dict has. ``tensors`` are apart, by name."""

    groups: dict[str, object]
    parameters: dict[str, dict]
    other: dict[str, object]
    tensors: dict[str, dict[str, torch.Tensor]]     # by parameter, then by their name in a file


def is_optimizer(part: object) -> bool:
    """Whether a part's state belongs to parameters."""
    return isinstance(getattr(part, "param_groups", None), list) and isinstance(getattr(part, "state", None), Mapping)


def share_of(part: str, optimizer: Any, name_of: Mapping[int, str]) -> OptimizerShare:
    """The state of ``optimizer`` by names; ``name_of`` is that of every held parameter, by ``id``.

    Parameters that are not held (those of other stages, of an optimizer made before the pipeline) have no state and are
    left out. Raises ``InputError`` for state that belongs to no held parameter, or cannot be written.
    """
    _refuse_joint_state(part, optimizer)
    whole = optimizer.state_dict()
    groups: dict[str, object] = {}
    parameters: dict[str, dict] = {}
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for place, (group, live) in enumerate(zip(whole["param_groups"], optimizer.param_groups, strict=True)):
        settings = {key: value for key, value in group.items() if key not in _OWN}
        groups[str(place)] = {key: _pack_setting(part, f"group {place}, {key}", value)
                              for key, value in settings.items()}
        for index, parameter in zip(group["params"], live["params"], strict=True):
            state, name = whole["state"].get(index), name_of.get(id(parameter))
            if name is None and state:
                raise InputError(
                    f"{part} has state for a parameter of shape {tuple(parameter.shape)} in its group {place} that "
                    "this worker's stages do not hold; make it of pipe.parameters()")
            if name is not None:
                packer = Packer(part, sharded=True)
                parameters[name] = {"group": str(place), "state": None if state is None else packer.pack(state, name)}
                tensors[name] = packer.tensors
    rest = {key: value for key, value in whole.items() if key not in ("state", "param_groups")}
    packer = Packer(part)
    other = {key: packer.pack(value, key) for key, value in rest.items()}
    if packer.tensors:
        raise InputError(f"{part} keeps the tensor {min(packer.tensors)} beside its parameters' state; only what "
                         "belongs to one parameter can be written")
    return OptimizerShare(groups, parameters, other, tensors)


def _refuse_joint_state(part: str, optimizer: object) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise InputError(f"{part} is an LBFGS, which keeps one state for all parameters together; checkpoints hold "
                         "state by parameter: take an optimizer that does, such as AdamW")


def _pack_setting(part: str, path: str, value: object) -> object:
    """A setting as JSON; a tensor of one number stays a tensor."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_complex():
            raise InputError(f"{part} cannot be written: {path} is a tensor of shape {tuple(value.shape)}; give a "
                             "number")
        return {"tuple": ["scalar", str(value.dtype), list(value.shape), _pack_setting(part, path, value.item())]}
    packer = Packer(part)
    packed = packer.pack(value, path)
    if packer.tensors and isinstance(value, tuple):
        return {"tuple": [_pack_setting(part, path, one) for one in value]}      # such as betas
    return packed


def _unpack_setting(packed: object, current: object) -> object:
    """The setting again; what is a tensor lies where ``current`` does."""
    inner = packed.get("tuple") if isinstance(packed, dict) else None
    if isinstance(inner, list) and inner[:1] == ["scalar"] and len(inner) == 4:
        dtype = unpack({"dtype": inner[1]}, _no_tensor)
        value = torch.tensor(unpack(inner[3], _no_tensor), dtype=dtype).reshape(inner[2])       # type: ignore
        return value.to(current.device) if isinstance(current, torch.Tensor) else value
    if isinstance(inner, list):
        now = current if isinstance(current, tuple) and len(current) == len(inner) else [None] * len(inner)
        return tuple(_unpack_setting(one, old) for one, old in zip(inner, now))
    return unpack(packed, _no_tensor)


def _no_tensor(name: str) -> torch.Tensor:
    raise InputError(f"it names the tensor {name[:60]!r} where only plain values are")


def merge_shares(shares: Iterable[Mapping[str, Any]]) -> dict[str, object]:
    """One record of all workers' shares, as JSON. Of a parameter that several hold the first one counts; groups of
    equal number and settings are one."""
    groups: list[dict] = []
    numbers: dict[str, int] = {}
    parameters: dict[str, dict] = {}
    other: dict[str, object] = {}
    for share in shares:
        own: dict[str, int] = {}
        for place, settings in share["groups"].items():
            entry = {"place": int(place), "settings": settings}
            key = json.dumps(entry, sort_keys=True)
            if key not in numbers:
                numbers[key] = len(groups)
                groups.append(entry)
            own[place] = numbers[key]
        for name, entry in share["parameters"].items():
            parameters.setdefault(name, {"group": own[entry["group"]], "state": entry["state"]})
        other = {**share["other"], **other}
    return {"groups": groups, "parameters": parameters, "other": other}


def state_for(part: str, optimizer: Any, name_of: Mapping[int, str], saved: Mapping[str, Any],
              tensor: Callable[[str, str], torch.Tensor]) -> dict[str, Any]:
    """What ``optimizer.load_state_dict`` takes, from a merged record; ``tensor(parameter, name)`` reads a tensor.

    Nothing changes here. Raises ``InputError`` for parameters that the record lacks, and for a group whose parameters
    were saved with different settings.
    """
    whole = optimizer.state_dict()
    state: dict[int, object] = {}
    groups: list[dict] = []
    for place, (group, live) in enumerate(zip(whole["param_groups"], optimizer.param_groups, strict=True)):
        numbers: dict[int, str] = {}
        for index, parameter in zip(group["params"], live["params"], strict=True):
            name = name_of.get(id(parameter))
            if name is None:
                continue
            entry = saved["parameters"].get(name)
            if entry is None:
                raise InputError(f"it has nothing of {name} for {part}, which holds {len(saved['parameters'])} "
                                 "parameters there; was it saved with an optimizer of the same parameters?")
            numbers.setdefault(entry["group"], name)
            if entry["state"] is not None:
                state[index] = unpack(entry["state"], lambda key, name=name: tensor(name, key))     # type: ignore
        if len(numbers) > 1:
            first, second = list(numbers.values())[:2]
            raise InputError(f"group {place} of {part} holds {first} and {second}, which were saved in groups with "
                             "other settings; make the groups as they were")
        entry = saved["groups"][next(iter(numbers))] if numbers else \
            next((entry for entry in saved["groups"] if entry["place"] == place), {"settings": {}})
        settings = {key: _unpack_setting(value, live.get(key)) for key, value in entry["settings"].items()}
        groups.append({**group, **settings})
    return {**{key: unpack(value, _no_tensor) for key, value in saved["other"].items()},
            "state": state, "param_groups": groups}


def put_state(optimizer: Any, whole: dict[str, Any]) -> None:
    """Load, and then mend what torch's ``load_state_dict`` rounds: it casts every state to its parameter's dtype."""
    exact = {index: _tensors_in(state) for index, state in whole["state"].items()}
    optimizer.load_state_dict(whole)
    for group, live in zip(whole["param_groups"], optimizer.param_groups):
        for index, parameter in zip(group["params"], live["params"]):
            loaded = optimizer.state.get(parameter)
            for key, value in exact.get(index, {}).items():
                if isinstance(loaded, dict) and isinstance(loaded.get(key), torch.Tensor) \
                        and loaded[key].dtype != value.dtype:
                    loaded[key] = value.to(loaded[key].device)


def _tensors_in(state: object) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)} \
        if isinstance(state, Mapping) else {}


def parameter_names(named: Iterator[tuple[str, torch.Tensor]]) -> dict[int, str]:
    """``id`` of every parameter -> its first name."""
    names: dict[int, str] = {}
    for name, parameter in named:
        names.setdefault(id(parameter), name)
    return names
