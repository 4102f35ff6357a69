"""An accelerator for which all workers of a pipeline are one process: they share every batch."""
from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import recursively_apply


class PipelineAccelerator(Accelerator):
    """``accelerate.Accelerator`` for scripts whose model is a ``pipeengine.Pipeline``.

    Accelerate shards data over all processes, but the stages of a pipeline need the same batches; so here every
    process gets whole loaders, and gathering, which would repeat each worker's rows, gives back what came in.
    Models go through ``prepare`` as they are: the pipeline places them. Optimizers, schedulers, mixed precision,
    trackers and printing on one process are Accelerate's own.
    """

    @property
    def num_processes(self) -> int:
        """Processes that take batches of their own: one, the whole pipeline."""
        return 1

    @property
    def process_index(self) -> int:
        """This process's number among those that take batches of their own."""
        return 0

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
        """``tensor``: the other workers have the same."""
        return tensor

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """``input_data``, cut to the rows that an epoch's last batch has."""
        rest = self.gradient_state.remainder if self.gradient_state.end_of_dataloader else 0
        return recursively_apply(lambda tensor: tensor[:rest], input_data) if rest > 0 else input_data

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """``tensor``: the other workers have the same."""
        return tensor

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        """``tensor``: the other workers' have its size."""
        return tensor
