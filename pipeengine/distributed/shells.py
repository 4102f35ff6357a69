"""Parameters handed to torch's FSDP2, which holds the shards and makes them whole.

FSDP2's hooks around modules would gather and sum once per micro-batch, and miss parameters of modules that are opened.
So ``fully_shard`` is given shells around the user's modules, which nobody ever calls: no hook runs, no class changes.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pipeengine.distributed.sharding import Sharding, Slot, Unit


@dataclass(frozen=True)
class Held:
    """A unit as FSDP2 holds it: ``parameters`` are the shards, ``slots`` all places of each, ``whole`` tensors without
    memory that stand for them while a model is recorded."""

    unit: Unit
    shell: Any
    slots: tuple[Sequence[Slot], ...]
    parameters: tuple[torch.nn.Parameter, ...]
    whole: tuple[torch.nn.Parameter, ...]

    def now(self, number: int) -> torch.Tensor:
        """What is in the place of parameter ``number`` at present: its shard, or the whole."""
        module, name = self.slots[number][0]
        return module._parameters[name]     # type: ignore[return-value]

    def put(self, tensors: Sequence[torch.nn.Parameter]) -> None:
        """Put ``tensors`` into the places of the parameters."""
        for places, tensor in zip(self.slots, tensors):
            for module, name in places:
                setattr(module, name, tensor)


class _Shell(torch.nn.Module):
    """Makes ``fully_shard`` see modules, and their parameters change places, without a hook on any of them."""

    def __init__(self, modules: Sequence[torch.nn.Module]):
        super().__init__()
        self.inside = torch.nn.ModuleList(modules)


def shard_units(units: Sequence[Unit], tensors: Mapping[str, torch.Tensor], sharding: Sharding, idle: dist.ProcessGroup,
                all_gather: Callable[[torch.Tensor, torch.Tensor], None]) -> tuple[Held, ...]:
    """Every unit in FSDP2's hands, sharded over the members of ``idle``, a group that carries nothing; what is gathered
    goes through ``all_gather(whole, part)``. The ``tensors`` that were there are empty afterwards."""
    from torch.distributed.fsdp import fully_shard
    device = tensors[units[0].names[0]].device
    mesh = dist.DeviceMesh.from_group(idle, device.type, mesh_dim_names=("dp_shard",))
    held = []
    for unit in units:
        slots = tuple(sharding.slots[name] for name in unit.names)
        own = [tensors[name] for name in unit.names]
        among = {id(tensor) for tensor in own}
        shell: Any = _Shell(list({id(module): module for places in slots for module, _ in places}.values()))
        fully_shard(shell, mesh=mesh, reshard_after_forward=False,
                    ignored_params={one for one in shell.parameters() if id(one) not in among})
        shell.set_custom_all_gather(_Gathering(all_gather))
        shards = tuple(places[0][0]._parameters[places[0][1]] for places in slots)
        whole = tuple(torch.nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=tensor.requires_grad)
                      for tensor in own)
        for tensor in own:                      # whoever still has it: an error sooner than a value that stays
            tensor.data = tensor.data.new_empty(0)
        held.append(Held(unit, shell, slots, shards, whole))      # type: ignore[arg-type]
    return tuple(held)


class _Gathering:
    """How FSDP2 gathers: in a group of ours, and so that nobody waits for a worker that is gone."""

    def __init__(self, all_gather: Callable[[torch.Tensor, torch.Tensor], None]):
        self._all_gather = all_gather

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for what is gathered."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup,
                 async_op: bool = False) -> None:
        """Gather."""
        self._all_gather(output_tensor, input_tensor)
