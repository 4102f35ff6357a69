"""What a user asked for, in one value that is checked once and never changes."""
from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import networkx
import torch
from torch.distributed import DeviceMesh

from partitioners import Plan
from pipeengine.distributed import Grid, is_sharded
from pipeengine.errors import InputError
from pipeengine.exploration import Choice, Configuration
from pipeengine.schedules import Schedule
from pipeengine.stages import Pieces


@dataclass(frozen=True, eq=False)
class Options:
    """The arguments of ``Pipeline``, by the same names."""

    model: torch.nn.Module
    example: object
    num_microbatches: int | str | None
    schedule: str | Callable[..., Schedule] | Schedule
    num_stages: int | None
    plan: Plan | Choice | str | Path | None
    costs: str | networkx.DiGraph | None
    loss_fn: Callable | None
    target: object
    loss_weight: Callable | None
    batch_dims: Mapping[str, int | None] | None
    weights: str | Path | None
    seed: int
    check: bool
    recompute: bool | str | Collection[int | str]
    shard: str | None = None
    num_replicas: int | None = None
    compile: bool | Mapping[str, object] = False

    def validate(self) -> None:
        """Refuse at once what would not be used until later. Raises ``InputError``."""
        if not isinstance(self.model, torch.nn.Module):
            raise InputError(f"model is a {type(self.model).__name__}, not a torch.nn.Module; pass the model itself")
        sharded = next((name for name, tensor in self.model.named_parameters() if is_sharded(tensor)), None)
        if sharded is not None:
            raise InputError(f"{sharded} of the model is a DTensor already (of fully_shard, or of tensor parallelism); "
                             'pass the plain model, and shard="parameters" with num_replicas= or a "dp_shard" mesh')
        if not isinstance(self.example, (Mapping, tuple, list, torch.Tensor)):
            raise InputError(
                f"example is a {type(self.example).__name__}; give a dict of keyword arguments or a tuple of "
                "positional ones"
            )
        for name in ("num_microbatches", "num_stages"):
            count = getattr(self, name)
            if count is not None and not _is_count(count):
                raise InputError(f"{name} is {count!r}; give a number of at least 1")
        for name, (fits, wanted) in _WANTED.items():
            value = getattr(self, name)
            if not fits(value):
                raise InputError(f"{name} is {value!r}; give {wanted}")

    def on(self, mesh: DeviceMesh, grid: Grid) -> Options:
        """These options, with what ``mesh`` says: how many replicas there are, and whether parameters are in shards.

        Raises ``InputError`` where ``shard`` says otherwise.
        """
        shard = self.shard
        if "dp_shard" in (mesh.mesh_dim_names or ()):
            if shard not in (None, "parameters"):
                raise InputError(f'shard is {shard!r}, and the mesh has a dimension "dp_shard", which shards '
                                 'parameters; call it "dp_replicate", or leave shard out')
            shard = "parameters"
        return replace(self, num_replicas=grid.num_replicas, shard=shard)

    def pieces(self) -> Pieces | None:
        """What torch compiles, if that was asked for."""
        if self.compile is False:
            return None
        return Pieces({} if self.compile is True else self.compile)

    def configured(self, plan: Configuration, grid: Grid) -> Options:
        """These options, with what a plan that a search has found says besides its cuts, for all workers of ``grid``.

        Raises ``InputError`` where an option says otherwise, or where the plan is for other workers.
        """
        there = grid.num_replicas * grid.width
        if plan.num_replicas > 1 and there == 1 or there not in (1, plan.num_replicas * plan.num_workers):
            replicas = f" in each of {plan.num_replicas} replicas" if plan.num_replicas > 1 else ""
            raise InputError(f"the plan is for {plan.num_workers} workers{replicas}, there are {there}; start "
                             f"{plan.num_replicas * plan.num_workers}, or search for {there}")
        if plan.near == "replicas" and plan.num_replicas > 1 and self.num_replicas is None:
            raise InputError("the plan numbers the replicas of a stage next to each other; say so with mesh="
                             f"init_device_mesh(device, ({plan.num_workers}, {plan.num_replicas}), "
                             'mesh_dim_names=("pp", "dp_replicate"))')
        wanted: dict[str, Any] = {
            "num_stages": plan.num_stages, "num_microbatches": plan.num_microbatches, "schedule": plan.schedule,
            "recompute": plan.recompute or False, "num_replicas": plan.num_replicas, "shard": plan.shard}
        for name, default in _DEFAULTS.items():
            if getattr(self, name) not in (default, wanted[name]):
                raise InputError(f"{name} is {getattr(self, name)!r}, and the plan was found for {wanted[name]!r}; "
                                 f"leave {name} out, or give the cuts alone: plan=search.best.plan")
        return replace(self, **wanted, plan=self.plan.plan if isinstance(self.plan, Choice) else self.plan)


_DEFAULTS = {"num_stages": None, "num_microbatches": None, "schedule": "1f1b", "recompute": False, "num_replicas": None,
             "shard": None}


def _is_count(value: object) -> bool:
    """Whether ``value`` is a whole number of at least 1; True is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


_COMPILING = frozenset(inspect.signature(torch.compile).parameters) - {"model", "disable"}
_WANTED: dict[str, tuple[Callable[[object], bool], str]] = {
    "schedule": (lambda value: isinstance(value, (str, Schedule)) or callable(value),
                 "the name of one, a function or a Schedule"),
    "loss_fn": (lambda value: value is None or callable(value), "a function of output and target"),
    "loss_weight": (lambda value: value is None or callable(value), "a function of a micro-batch"),
    "batch_dims": (lambda value: isinstance(value, (Mapping, type(None))), "a dict from names of inputs to dimensions"),
    "recompute": (lambda value: isinstance(value, (bool, Collection)), "True, stages or module paths"),
    "compile": (lambda value: isinstance(value, bool) or isinstance(value, Mapping) and set(value) <= _COMPILING,
                f"True, or a dict of options of torch.compile: {', '.join(sorted(_COMPILING))}"),
    "shard": (lambda value: value in (None, "optimizer", "parameters"), 'None, "optimizer" or "parameters"'),
    "seed": (lambda value: isinstance(value, int), "a whole number"),
}
