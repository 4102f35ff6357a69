"""Where a worker of a pipeline stands, and how far it has come: what the user may read, and nothing that acts."""
from __future__ import annotations

from typing import NoReturn

import networkx
import torch

from partitioners import Plan
from pipeengine.assembly import Assembly
from pipeengine.distributed import Workers
from pipeengine.runtime import StepRunner


class Standing:
    """What a pipeline tells of itself; any worker may read it alone."""

    _model: torch.nn.Module
    _workers: Workers
    _assembly: Assembly
    _runner: StepRunner

    def __repr__(self) -> str:
        where = f", replica {self.replica} of {self.num_replicas}" if self.num_replicas > 1 else ""
        return (f"<{type(self).__name__} of {type(self._model).__name__}: {self.num_stages} stages, worker "
                f"{self.rank} of {self.num_workers}{where}, {self.num_steps} steps>")

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        """Raises ``TypeError``: the call of a plain model has no place here."""
        raise TypeError("a pipeline is not called as a model is; step(...) is forward and backward of a batch, "
                        "evaluate(...) forward alone")

    @property
    def plan(self) -> Plan:
        """The plan that this pipeline runs."""
        return self._assembly.plan

    @property
    def graph(self) -> networkx.DiGraph:
        """The cost graph that was planned: nodes with seconds and bytes of one micro-batch, as ``pe.profile`` has
        them. Measured seconds are those of this worker; worker 0 plans with its own."""
        return self._assembly.graph

    @property
    def num_stages(self) -> int:
        """Stages of the whole pipeline."""
        return self._assembly.layout.num_stages

    @property
    def num_steps(self) -> int:
        """Steps that have been trained, those before a checkpoint was loaded included; dropout is keyed by it."""
        return self._runner.progress.step

    @property
    def num_workers(self) -> int:
        """Workers of one pipeline; with replicas there are as many in each."""
        return self._workers.grid.width

    @property
    def amount(self) -> tuple[int, str]:
        """What the batches of all replicas held in the last step: (number, "tokens") for a table of integers, else
        (number, "rows")."""
        return self._runner.progress.amount

    @property
    def rank(self) -> int:
        """This worker's number in its pipeline."""
        return self._workers.grid.place

    @property
    def replica(self) -> int:
        """The number of the pipeline that this worker is in; 0 where there is only one."""
        return self._workers.grid.replica

    @property
    def num_replicas(self) -> int:
        """How many pipelines train together."""
        return self._workers.grid.num_replicas

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages that this worker holds."""
        return tuple(stage for stage, worker in enumerate(self._assembly.layout.worker_of) if worker == self.rank)

    @property
    def is_first_worker(self) -> bool:
        """Whether this is worker 0 of replica 0: the one that prints."""
        return self._workers.rank == 0

    @property
    def messages(self) -> int:
        """Data messages this worker has sent so far."""
        return self._assembly.transport.messages

    @property
    def message_bytes(self) -> int:
        """Bytes of values in them."""
        return self._assembly.transport.bytes
