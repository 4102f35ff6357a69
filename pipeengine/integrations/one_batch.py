"""An accelerator for which the workers of a pipeline are one process: they share every batch."""
from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import recursively_apply
from torch.distributed import DeviceMesh

from pipeengine.distributed import Grid, guarded_collectives, ranks_of_mesh, ranks_of_world
from pipeengine.errors import InputError


class PipelineAccelerator(Accelerator):
    """``accelerate.Accelerator`` for scripts whose model is a ``pipeengine.Pipeline``.

    Accelerate shards data over all processes, but the stages of a pipeline need the same batches; so here the workers
    of a pipeline get the same loaders: the whole, or with ``num_replicas`` (or a ``mesh``, as ``Pipeline`` takes them)
    their replica's share. Gathering takes one worker's rows of each replica. Models go through ``prepare`` as they are:
    the pipeline places them. Optimizers, schedulers, mixed precision, trackers and printing on one process are
    Accelerate's own. Raises ``InputError`` where the processes cannot be shared out to so many replicas.
    """

    _firsts: tuple[int, ...] = (0,)         # the rank of each replica's first worker
    _replica = 0

    def __init__(self, *args: Any, num_replicas: int | None = None, mesh: DeviceMesh | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.stand(num_replicas, mesh)

    def stand(self, num_replicas: int | None, mesh: DeviceMesh | None = None) -> None:
        """Find this process's replica among ``num_replicas``, or those of ``mesh``. Raises ``InputError``."""
        ranks, count = ranks_of_mesh(mesh, num_replicas) if mesh is not None else \
            ranks_of_world(self.state.num_processes, num_replicas)
        if count > 1:
            grid = Grid.of(tuple(ranks).index(dist.get_rank()), len(ranks), count)
            self._firsts, self._replica = tuple(ranks[::grid.width]), grid.replica

    @property
    def num_processes(self) -> int:
        """What takes batches of its own: the pipelines."""
        return len(self._firsts)

    @property
    def process_index(self) -> int:
        """The number of this process's pipeline."""
        return self._replica

    @property
    def dispatch_batches(self) -> bool:
        """Every worker reads the data itself."""
        return False

    def prepare_model(self, model: torch.nn.Module, device_placement: bool | None = None,
                      evaluation_mode: bool = False) -> torch.nn.Module:
        """The model as it is."""
        return model

    def prepare_scheduler(self, scheduler: Any) -> Any:
        """The scheduler, stepped once per step: no batch is multiplied by the number of processes."""
        prepared = super().prepare_scheduler(scheduler)
        prepared.split_batches = True
        return prepared

    def gather(self, tensor: Any) -> Any:
        """``tensor``, or with replicas the rows of all, replica 0 first; each has as many."""
        if self.num_processes == 1:
            return tensor
        with guarded_collectives():
            everybody = super().gather(tensor)
        return recursively_apply(lambda whole: torch.cat([whole.chunk(self.state.num_processes)[rank]
                                                          for rank in self._firsts]), everybody)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """``gather``, cut to the rows that an epoch's last batch has. With replicas raises ``InputError`` for
        objects."""
        if self.num_processes > 1 and use_gather_object:
            raise InputError(f"objects are not gathered from {self.num_processes} replicas; give tensors")
        rest = self.gradient_state.remainder if self.gradient_state.end_of_dataloader else 0
        gathered = self.gather(input_data)
        return recursively_apply(lambda tensor: tensor[:rest], gathered) if rest > 0 else gathered

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """``tensor``, or with replicas the sum of theirs times ``scale``, or with "mean" the mean."""
        if self.num_processes == 1:
            return tensor

        def reduce_one(one: torch.Tensor) -> torch.Tensor:
            stacked = self.gather(one[None])
            return stacked if reduction == "none" else \
                stacked.sum(0) * (scale / (self.num_processes if reduction == "mean" else 1))
        return recursively_apply(reduce_one, tensor)

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        """``tensor``, or with replicas padded to the longest of theirs along ``dim``."""
        if self.num_processes == 1:
            return tensor
        with guarded_collectives():
            return super().pad_across_processes(tensor, dim=dim, pad_index=pad_index, pad_first=pad_first)

    def wait_for_everyone(self) -> None:
        """Return when every process, of all pipelines, is here. Raises ``WorkerError`` that names one that is lost."""
        with guarded_collectives():
            super().wait_for_everyone()
