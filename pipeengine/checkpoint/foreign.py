"""Parameters that other workers hold: gone from this worker's model, so that nobody uses them by accident.

After construction a foreign parameter's place on the user's model is on meta. A forward of the whole model, or a save
that goes around the pipeline, then fails or cannot be loaded, where it would otherwise silently use initial values.
"""
from __future__ import annotations

from collections.abc import Collection

import torch

from pipeengine.checkpoint.slots import get_tensor, put_tensor, tensor_slots
from pipeengine.distributed import Workers


def release_foreign(model: torch.nn.Module, held: Collection[str]) -> None:
    """Put every parameter whose first name is not in ``held`` on meta; aliases stay one tensor."""
    for name, places in tensor_slots(model).items():
        tensor = get_tensor(*places[0])
        if name not in held and isinstance(tensor, torch.nn.Parameter) and tensor.device.type != "meta":
            put_tensor(places, torch.nn.Parameter(tensor.detach().to("meta"), requires_grad=tensor.requires_grad))


def fetch_missing(model: torch.nn.Module, held: Collection[str], device: torch.device, workers: Workers) -> None:
    """Get the values of held tensors that are on meta here and real on another worker, such as after an earlier
    pipeline.

    Every worker calls it. The first worker that has a value sends it to all. What nobody has stays on meta.
    """
    slots = tensor_slots(model)
    state = {name: get_tensor(*places[0]).device.type != "meta" for name, places in slots.items()}
    everybody = workers.all_gather_object([(name, real, name in held) for name, real in state.items()])
    for entries in zip(*everybody):
        name = entries[0][0]
        owner = next((rank for rank, (_, real, _) in enumerate(entries) if real), None)
        if owner is None or not any(needed and not real for _, real, needed in entries):
            continue
        tensor = get_tensor(*slots[name][0])
        own = tensor.detach() if state[name] else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        value = workers.broadcast(own, owner)
        if not state[name] and name in held:
            fetched = torch.nn.Parameter(value, requires_grad=tensor.requires_grad) \
                if isinstance(tensor, torch.nn.Parameter) else value
            put_tensor(slots[name], fetched)
