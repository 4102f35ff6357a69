"""State dicts of a pipeline: the whole on worker 0, or any part put back into what a worker holds."""
from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from pipeengine.checkpoint.whole_tensors import Collect, as_it_is
from pipeengine.distributed import Workers, is_sharded, put_whole
from pipeengine.errors import InputError


def collect_state(model: torch.nn.Module, first_name: Mapping[str, str], owner: Mapping[str, int],
                  workers: Workers, collect: Collect = as_it_is) -> dict[str, torch.Tensor] | None:
    """Every entry of the model's state dict, from the worker that owns it, on worker 0's CPU; None on the others.

    ``first_name`` is that of every alias, ``owner`` the worker by first name. Aliases are one tensor in the result, as
    they are in the model's. Each tensor travels once, straight to worker 0; a sharded one first to its owner, by
    ``collect``.
    """
    state, arrived = model.state_dict(), dict[str, torch.Tensor]()
    names = {name: first_name.get(name, name) for name in state}
    # Aliases once, on both sides: what is sent twice and taken once leaves the sender waiting.
    for first, name in {first: name for name, first in reversed(names.items())}.items():
        source = max(0, owner.get(first, 0))
        own = state[name].detach()
        if is_sharded(own):
            whole = collect(own, source)
            own = torch.empty(own.shape, dtype=own.dtype, device="meta") if whole is None else whole
        if workers.rank in (0, source):
            own = own if own.device.type != "meta" else torch.empty_like(own, device="cpu")
            value = workers.send_to_first(own, source)
            arrived[first] = value.clone() if workers.rank == source else value
    return {name: arrived[first] for name, first in names.items()} if workers.rank == 0 else None


def load_state(own: Mapping[str, torch.Tensor], known: Mapping[str, str], state: Mapping[str, torch.Tensor],
               strict: bool, needed: Collection[str]) -> None:
    """Copy ``state`` into the tensors of ``own``; everything is checked before anything changes.

    ``known`` has every name of the model, ``needed`` those of ``own`` that nobody else would give. Raises
    ``InputError`` for a wrong shape, and with ``strict`` for names that the model does not have or ``needed`` entries
    that ``state`` has not.
    """
    unknown = sorted(set(state) - set(known))
    missing = sorted(set(needed) - set(state))
    if strict and (unknown or missing):
        what = f"{len(unknown)} names that the model does not have, first {unknown[0]!r}" if unknown else \
            f"no value for {len(missing)} of {len(needed)} held tensors, first {missing[0]!r}"
        raise InputError(f"the state dict has {what}; give one of this model, or pass strict=False")
    for name in set(own) & set(state):
        if not isinstance(state[name], torch.Tensor) or state[name].shape != own[name].shape:
            shape = tuple(state[name].shape) if isinstance(state[name], torch.Tensor) else type(state[name]).__name__
            raise InputError(f"{name} is {shape} in the state dict and {tuple(own[name].shape)} in the model; give the "
                             "state of this model")
        if state[name].device.type == "meta":
            raise InputError(
                f"{name} has no data in the state dict (it is on meta: of a stage that another worker holds?); "
                "take pipe.full_state_dict() or pipe.state_dict()"
            )
    with torch.no_grad():
        for name in set(own) & set(state):
            put_whole(own[name], state[name])
