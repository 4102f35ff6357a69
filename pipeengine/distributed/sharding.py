"""Which parameters can be held in shards, and which of them are gathered together."""
from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from pipeengine.distributed.buckets import BUCKET_BYTES, Copies, within
from pipeengine.errors import InputError

Slot = tuple[torch.nn.Module, str]
"""A module and the name of one of its own parameters."""


@dataclass(frozen=True)
class Sharding:
    """What ``shard="parameters"`` makes of the parameters: ``slots`` of those that every replica holds rows of, by
    first name; ``kept`` are the others, with why each stays whole in every replica."""

    slots: Mapping[str, Sequence[Slot]]
    kept: Mapping[str, str] = field(default_factory=dict)

    def told(self, sizes: Mapping[str, int]) -> str:
        """What stays whole and why, for people; empty where nothing does that matters."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.kept.items():
            reasons.setdefault(reason, []).append(name)
        return "; ".join(f"{len(names)} parameters of {sum(sizes[name] for name in names):,} entries stay whole in "
                         f"every replica, since {reason}: {', '.join(names[:3])}{', ...' if names[3:] else ''}"
                         for reason, names in sorted(reasons.items()))


@dataclass(frozen=True)
class Unit:
    """Parameters of one stage (-1: of several stages of one worker) and one dtype that are gathered and summed
    together."""

    stage: int
    names: tuple[str, ...]


def make_units(copies: Sequence[Copies], tensors: Mapping[str, torch.Tensor], most: int = BUCKET_BYTES
               ) -> tuple[Unit, ...]:
    """Units of up to ``most`` bytes in the order of ``copies`` (a larger parameter has one of its own)."""
    alike: dict[tuple[int, str], list[str]] = {}
    for one in copies:
        alike.setdefault((one.stage, str(tensors[one.name].dtype)), []).append(one.name)
    return tuple(Unit(stage, tuple(names)) for (stage, _), together in sorted(alike.items())
                 for names in within(together, tensors, most))


def reason_to_keep(tensor: torch.Tensor, slots: Sequence[Slot]) -> str | None:
    """Why FSDP2 cannot shard a parameter; None where it can."""
    if any(isinstance(module, torch.jit.ScriptModule) for module, _ in slots):
        return "compiled code holds them"
    if tensor.dim() == 0:
        return "they are single numbers"
    if tensor.layout != torch.strided or not tensor.is_contiguous():
        return "their memory is not contiguous"
    if type(tensor) is not torch.nn.Parameter:
        return "they are tensors of a class of their own"
    if tensor._backward_hooks or tensor._post_accumulate_grad_hooks:
        return "they have hooks"
    return None


def held_elsewhere(modules: Iterable[torch.nn.Module], names: Mapping[int, str]) -> set[str]:
    """Those of the parameters (``names`` by ``id``) that some module keeps in another attribute too, alone or in a
    plain container: what is there would stay as it was."""
    found = set()
    for module in modules:
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules", "_flat_weights"):
                inside = value.values() if isinstance(value, dict) else \
                    value if isinstance(value, (list, tuple, set)) else (value,)
                found |= {names[id(one)] for one in inside if id(one) in names}
    return found


def refuse_old_optimizers(replaced: Sequence[weakref.ref[torch.Tensor]]) -> None:
    """Raise ``InputError`` where an optimizer holds one of the parameters that shards have replaced: they are empty,
    and it would update nothing in silence."""
    if not any(one() is not None for one in replaced):
        return
    gc.collect()                                    # an optimizer that nobody has any more may wait for this
    old = {id(one) for ref in replaced if (one := ref()) is not None}
    for one in gc.get_objects() if old else ():
        if issubclass(type(one), torch.optim.Optimizer) and \
                any(id(parameter) in old for group in one.param_groups for parameter in group["params"]):
            raise InputError(f"{type(one).__name__} was made of parameters that are in shards now, and would update "
                             "nothing; make it of pipe.parameters(), after the pipeline")
