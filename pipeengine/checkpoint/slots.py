"""Where a model keeps its tensors: every place, by the first name that leads there."""
from __future__ import annotations

from collections import defaultdict

import torch

Slot = tuple[torch.nn.Module, str]
"""A module and the name of one of its own parameters or buffers."""


def tensor_slots(model: torch.nn.Module) -> dict[str, list[Slot]]:
    """First name of every parameter and buffer -> all (module, own name) that hold it."""
    first: dict[int, str] = {}
    slots: dict[str, list[Slot]] = defaultdict(list)
    for path, module in model.named_modules():
        for own, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                name = first.setdefault(id(tensor), f"{path}.{own}" if path else own)
                slots[name].append((module, own))
    return dict(slots)


def get_tensor(module: torch.nn.Module, own: str) -> torch.Tensor:
    """The tensor in a slot."""
    tensor = module._parameters[own] if own in module._parameters else module._buffers[own]
    assert tensor is not None, "slots hold a tensor"
    return tensor


def put_tensor(places: list[Slot], tensor: torch.Tensor) -> None:
    """Put ``tensor`` into all ``places``."""
    for module, own in places:
        table: dict = module._parameters if own in module._parameters else module._buffers
        table[own] = tensor
        if isinstance(module, torch.nn.RNNBase):
            module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]
