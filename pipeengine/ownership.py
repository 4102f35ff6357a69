"""Who has which parameters and buffers: which worker holds, updates and saves them, and which copies must be equal."""
from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from pipeengine.checkpoint import tensor_slots
from pipeengine.distributed import (
    Copies,
    Grid,
    NoTies,
    Sharding,
    Tie,
    Workers,
    deal,
    held_elsewhere,
    reason_to_keep,
)
from pipeengine.stages import SettledPlacement
from pipeengine.tracing import Dataflow, node_refs, refs


@dataclass(frozen=True)
class Tensors:
    """Who has which parameters and buffers, by first name: ``first_name`` of every alias, what this worker holds, what
    its optimizer updates, and what it owns: of a tensor on several workers the first holder in the first replica is the
    owner, with shards the worker that updates it.

    ``dealt`` says that the parameters are dealt to the replicas; ``writers`` are the workers that write weights.
    ``sharded`` are parameters of which every replica has rows: each updates its own, and the owner writes the whole.
    """

    first_name: Mapping[str, str]
    held: frozenset[str]
    updated: frozenset[str]
    owner: Mapping[str, int]
    owned: frozenset[str]
    dealt: bool
    writers: tuple[int, ...]
    sharded: frozenset[str] = frozenset()


def tensors_of(model: torch.nn.Module, flow: Dataflow, placement: SettledPlacement, worker_of: Sequence[int],
               grid: Grid, shard: str | None, sharding: Sharding | None = None) -> Tensors:
    """What this worker has, ``worker_of[stage]`` being the place that runs a stage; with ``shard="optimizer"`` each
    parameter is updated in one replica, with ``sharding`` rows of some in each."""
    first_name, here = first_names(model), grid.worker(grid.place)
    held = _held_names(flow, placement, {stage for stage, place in enumerate(worker_of) if place == grid.place})
    owner = {name: min((worker_of[stage] for stage in placement.holders.get(name, ())), default=-1)
             for name in set(first_name.values())}
    updated, dealt = held, shard == "optimizer" and grid.num_replicas > 1
    sharded = frozenset() if sharding is None else held & frozenset(sharding.slots)
    if sharding is not None:
        sizes = {name: p.numel() for name, p in model.named_parameters() if name in sharding.slots}
        owner |= deal(copies_of(worker_of, placement, sizes, grid), sizes)
    if dealt:
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        updater = deal(copies_of(worker_of, placement, sizes, grid), sizes)
        owner |= updater
        updated = frozenset(name for name in held if updater.get(name, here) == here)
    owned = frozenset(name for name in held if owner[name] == here)
    writers = tuple(sorted({*range(grid.width), *owner.values()} - {-1}))
    return Tensors(first_name, held, updated, owner, owned, dealt, writers, sharded)


def sharding_of(model: torch.nn.Module, flow: Dataflow, placement: SettledPlacement, worker_of: Sequence[int],
                grid: Grid) -> Sharding:
    """Which parameters every replica holds rows of: those of one worker of the pipeline that nothing but stages reads
    and FSDP2 can shard."""
    parameters, slots = dict(model.named_parameters()), tensor_slots(model)
    elsewhere = held_elsewhere(model.modules(), {id(tensor): name for name, tensor in parameters.items()})
    followed = _followed(flow)
    sharded, kept = {}, {}
    for one in copies_of(worker_of, placement, parameters, grid):
        if not placement.holders.get(one.name):
            continue                    # nothing reads it
        reason = "several workers of a pipeline hold them" if len(one.workers) > grid.num_replicas else \
            "inputs are followed with them" if one.name in followed else \
            "attributes of modules hold them too" if one.name in elsewhere else \
            reason_to_keep(parameters[one.name], slots[one.name])
        if reason is None:
            sharded[one.name] = tuple(slots[one.name])
        else:
            kept[one.name] = reason
    return Sharding(sharded, kept)


def copies_of(worker_of: Sequence[int], placement: SettledPlacement, names: Collection[str], grid: Grid
              ) -> list[Copies]:
    """Who holds each of ``names``, in all replicas."""
    copies = []
    for name in names:
        stages = sorted(placement.holders.get(name, ()))
        places = {worker_of[stage] for stage in stages} or {0}
        copies.append(Copies(name, grid.everywhere(places), stages[0] if len(stages) == 1 else -1))
    return copies


def share(model: torch.nn.Module, placement: SettledPlacement, tensors: Tensors, worker_of: Sequence[int],
          workers: Workers, device: torch.device, sharding: Sharding | None = None) -> NoTies:
    """What keeps equal the tensors that several workers hold, in several stages or in all replicas, and what holds the
    rows of those in ``sharding``."""
    grid = workers.grid
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if grid.num_replicas == 1:
        return workers.tie(shared_tensors(model, placement, tensors, worker_of), values, device)
    copies = copies_of(worker_of, placement, dict.fromkeys(tensors.first_name.values()), grid)
    # Small buffers that a worker needs to follow the inputs, although its stages do not hold them.
    here = grid.everywhere([grid.place])
    copies += [Copies(one.name, here, -1) for one in copies if one.name in tensors.held and
               grid.worker(grid.place) not in one.workers]
    return workers.replicate(copies, values, tensors.owner if tensors.dealt else None, sharding)


def shared_tensors(model: torch.nn.Module, placement: SettledPlacement, tensors: Tensors, worker_of: Sequence[int]
                   ) -> list[Tie]:
    """Parameters and buffers that several workers hold."""
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    ties = []
    for name in dict.fromkeys(tensors.first_name.values()):
        holders = sorted({worker_of[stage] for stage in placement.holders.get(name, ())})
        if len(holders) > 1:
            ties.append(Tie(name, tuple(holders), trained.get(name, False)))
    return ties


def _held_names(flow: Dataflow, placement: SettledPlacement, own: set[int]) -> frozenset[str]:
    """Parameters of the own stages, and the small buffers that every worker needs to follow the inputs."""
    return frozenset({name for name, stages in placement.holders.items() if stages & own} | _followed(flow))


def _followed(flow: Dataflow) -> set[str]:
    """What every worker needs to follow the inputs."""
    values = flow.recording.values
    held = {values[v].name for n in flow.replicated for v in node_refs(flow.recording.nodes[n])
             if values[v].kind == "attribute"}
    held |= {values[v].name for guard in flow.recording.guards for v in (*refs(guard.args), *refs(guard.kwargs))
             if values[v].kind == "attribute"}
    return held


def updated_parameters(model: torch.nn.Module, updated: Collection[str]
                       ) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters that this worker's optimizer is to update, in the model's order, by first name."""
    for name, parameter in model.named_parameters():
        if name in updated:
            yield name, parameter


def first_names(model: torch.nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer, aliases included -> its first name."""
    first: dict[int, str] = {}
    names = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False),
                         *model.named_buffers(remove_duplicate=False)):
        names[name] = first.setdefault(id(tensor), name)
    return names
