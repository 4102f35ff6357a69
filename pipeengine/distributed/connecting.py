"""Who trains together: the processes of a mesh, of the default process group, or one alone."""
from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from pipeengine.distributed.grid import ranks_of_mesh, ranks_of_world
from pipeengine.distributed.guard import GuardSettings
from pipeengine.distributed.rendezvous import start_group
from pipeengine.distributed.single_process import SingleProcess
from pipeengine.distributed.workers import ProcessGroupWorkers, Workers


def connect(mesh: dist.DeviceMesh | None, device: torch.device, launched: bool, num_replicas: int | None = None,
            timeout: timedelta = timedelta(minutes=10), environment: Mapping[str, str] | None = None) -> Workers:
    """The workers of this job: those of ``mesh``, of the default process group, or this process alone.

    Where processes were ``launched`` (by torchrun) without a process group, one is started, as ``environment`` says.
    Raises ``InputError`` where they do not make ``num_replicas`` pipelines.
    """
    environment = environment or {}
    settings = GuardSettings.of(environment)
    if mesh is None and launched and not dist.is_initialized():
        start_group(device, environment, timeout)
    ranks, count = ranks_of_mesh(mesh, num_replicas) if mesh is not None else \
        ranks_of_world(dist.get_world_size() if dist.is_initialized() else 1, num_replicas)
    if len(ranks) == 1:
        return SingleProcess()
    return ProcessGroupWorkers(ranks, timeout, _backend(device), settings, count)


def _backend(device: torch.device) -> str:
    """What carries tensors on ``device``."""
    return "gloo" if device.type == "cpu" else dist.get_default_backend_for_device(device)
