"""Who has which parameters and buffers: which worker holds, updates and saves them, and which copies must be equal."""
from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from pipeengine.distributed import Copies, Grid, NoTies, Tie, Workers, deal
from pipeengine.stages import SettledPlacement
from pipeengine.tracing import Dataflow, node_refs, refs


@dataclass(frozen=True)
class Tensors:
    """Who has which parameters and buffers, by first name: ``first_name`` of every alias, what this worker holds, what
    its optimizer updates, and what it owns: of a tensor on several workers the first holder in the first replica is the
    owner, with shards the worker that updates it.

    ``dealt`` says that the parameters are dealt to the replicas; ``writers`` are the workers that write weights.
    """

    first_name: Mapping[str, str]
    held: frozenset[str]
    updated: frozenset[str]
    owner: Mapping[str, int]
    owned: frozenset[str]
    dealt: bool
    writers: tuple[int, ...]


def tensors_of(model: torch.nn.Module, flow: Dataflow, placement: SettledPlacement, worker_of: Sequence[int],
               grid: Grid, shards: bool) -> Tensors:
    """What this worker has, ``worker_of[stage]`` being the place that runs a stage; with ``shards`` each parameter is
    updated in one replica."""
    first_name, here = first_names(model), grid.worker(grid.place)
    held = _held_names(flow, placement, {stage for stage, place in enumerate(worker_of) if place == grid.place})
    owner = {name: min((worker_of[stage] for stage in placement.holders.get(name, ())), default=-1)
             for name in set(first_name.values())}
    updated, dealt = held, shards and grid.num_replicas > 1
    if dealt:
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        updater = deal(copies_of(worker_of, placement, sizes, grid), sizes)
        owner |= updater
        updated = frozenset(name for name in held if updater.get(name, here) == here)
    owned = frozenset(name for name in held if owner[name] == here)
    writers = tuple(sorted({*range(grid.width), *owner.values()} - {-1}))
    return Tensors(first_name, held, updated, owner, owned, dealt, writers)


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
          workers: Workers, device: torch.device) -> NoTies:
    """What keeps equal the tensors that several workers hold: in several stages, or in all replicas."""
    grid = workers.grid
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if grid.num_replicas == 1:
        return workers.tie(shared_tensors(model, placement, tensors, worker_of), values, device)
    copies = copies_of(worker_of, placement, dict.fromkeys(tensors.first_name.values()), grid)
    # Small buffers that a worker needs to follow the inputs, although its stages do not hold them.
    here = grid.everywhere([grid.place])
    copies += [Copies(one.name, here, -1) for one in copies if one.name in tensors.held and
               grid.worker(grid.place) not in one.workers]
    return workers.replicate(copies, values, tensors.owner if tensors.dealt else None)


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
    held = {name for name, stages in placement.holders.items() if stages & own}
    values = flow.recording.values
    held |= {values[v].name for n in flow.replicated for v in node_refs(flow.recording.nodes[n])
             if values[v].kind == "attribute"}
    held |= {values[v].name for guard in flow.recording.guards for v in (*refs(guard.args), *refs(guard.kwargs))
             if values[v].kind == "attribute"}
    return frozenset(held)


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
