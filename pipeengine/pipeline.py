"""The user's object: hand over a model, get it trained over stages."""
from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import networkx
import torch
from torch.distributed import DeviceMesh

from partitioners import Plan
from pipeengine.assembly import Assembly, assemble
from pipeengine.checkpoint import Holdings, collect_state, load_state, save_weights
from pipeengine.distributed import connect
from pipeengine.exploration import Choice
from pipeengine.options import Options
from pipeengine.ownership import updated_parameters
from pipeengine.report import (
    RunReport,
    added_bytes,
    measured_step,
    measured_timeline,
    predict,
    report_text,
    save_report,
    stage_rows,
)
from pipeengine.runtime import Executor, Gradients, StepRunner, TaskMaker, refuse_local_clipping
from pipeengine.schedules import Schedule
from pipeengine.simulation import Timeline
from pipeengine.standing import Standing


class Pipeline(Standing):
    """Train ``model`` over pipeline stages, with the numbers that one process would give.

    Under torchrun every process is a worker; in plain Python all stages run in this process.

    - ``example``: the model's inputs for a whole batch, a dict of keyword arguments or a tuple of positional ones.
    - ``num_microbatches`` (what pays: the plan's, else up to four for every worker): micro-batches that a batch is cut
      into, at most one per row. "auto" searches for what is fastest here, as ``pe.search`` does, and tells it;
      ``recompute="auto"`` likewise, and then ``schedule="auto"`` too.
    - ``schedule`` ("1f1b"): a name such as "1f1b", "zb-h1" or "auto", a function, a ``Schedule``, its text or file.
    - ``num_stages`` (the number of workers): more means several stages per worker.
    - ``plan`` (made here): a ``Plan``, what ``pe.search`` found (``search.best`` brings its replicas and shards along),
      or the path of one; that of worker 0 counts.
    - ``costs`` ("measured"): "measured", "analytic", or a cost graph from ``pe.profile``.
    - ``loss_fn`` (the model's own loss): a function of output and target; ``target`` is an example of the latter.
    - ``loss_weight`` (shares of targets or rows): a function of a micro-batch's inputs that says what its loss counts
      for.
    - ``batch_dims`` (dimension 0 where it counts the rows): from names of inputs to the dimension that is split, or
      None.
    - ``weights`` (the model's own): a Hugging Face checkpoint folder, read for the own stages only.
    - ``device`` (where the model is, else the accelerator).
    - ``mesh`` (all processes in one pipeline): a ``DeviceMesh`` whose dimension "pp" holds the workers of a pipeline,
      and "dp_replicate" (or "dp"), if there is one, the replicas ("dp_shard": with ``shard="parameters"``).
      ``num_replicas`` without a mesh: so many pipelines, the workers of each next to each other. Each replica passes
      its own batch; together they are one.
    - ``shard`` (None): "optimizer" deals the parameters to the replicas, and each updates its own; "parameters" leaves
      each replica its rows of them between steps, and updates those.
    - ``seed`` (0): of dropout and of initial values that are made here.
    - ``check`` (True): compare the recording with eager execution once, where parameters are real.
    - ``recompute`` (False): True, stages (by number) or modules (by path) that keep only their inputs and run their
      forward again in backward.
    - ``compile`` (False): True, or options of ``torch.compile``, which then compiles what stages compute.

    After construction a worker's model holds its own stages; parameters of other stages are on meta there. Raises
    ``CaptureError`` when the model cannot be recorded, ``PartitionError`` when it cannot be cut as asked,
    ``InputError`` for options and batches of the wrong kind; the same error on every worker.
    """

    def __init__(self, model: torch.nn.Module, example: object, *, num_microbatches: int | str | None = None,
                 schedule: str | Path | Callable[..., Schedule] | Schedule = "1f1b", num_stages: int | None = None,
                 plan: Plan | Choice | str | Path | None = None, costs: str | networkx.DiGraph | None = None,
                 loss_fn: Callable | None = None, target: object = None, loss_weight: Callable | None = None,
                 batch_dims: Mapping[str, int | None] | None = None, weights: str | Path | None = None,
                 device: torch.device | str | None = None, mesh: DeviceMesh | None = None, seed: int = 0,
                 check: bool = True, recompute: bool | str | Collection[int | str] = False,
                 num_replicas: int | None = None, shard: str | None = None,
                 compile: bool | Mapping[str, object] = False):
        options = Options(model, example, num_microbatches, str(schedule) if isinstance(schedule, Path) else schedule,
                          num_stages, plan, costs, loss_fn, target, loss_weight, batch_dims, weights, seed, check,
                          recompute, shard, num_replicas, compile)
        self._model, self._device = model, _device(model, device)
        self._workers = connect(mesh, self._device, _launched(), num_replicas, environment=os.environ)
        try:
            if mesh is not None:        # it has said where the replicas are
                options = options.on(mesh, self._workers.grid)
            with self._workers.activity.section("construction", takes_long=True):
                self._assembly: Assembly = assemble(options, self._workers, self._device)
        except BaseException:
            self._workers.close()
            raise
        assembly = self._assembly
        tasks = TaskMaker(assembly.reader, assembly.specializations, assembly.programs, seed, loss_weight)
        executor = Executor(assembly.transport, assembly.rng, self._workers.activity, assembly.ties.start)
        gradients = Gradients(lambda: updated_parameters(model, assembly.tensors.updated),
                              assembly.tensors.owned | assembly.tensors.sharded, self._workers, self._device,
                              _precision(model))
        if assembly.tensors.sharded or \
                set(assembly.tensors.updated) != {name for name, _ in model.named_parameters()}:
            refuse_local_clipping(gradients)
        self._runner = StepRunner(tasks, assembly.programs, executor, assembly.transport, assembly.ties, self._workers,
                                  assembly.layout.worker_of, assembly.num_parts, gradients)

    # -- steps ------------------------------------------------------------------------------------------------------

    def step(self, *args: object, target: object = None, scaler: torch.amp.GradScaler | None = None,
             **kwargs: object) -> torch.Tensor:
        """Forward and backward of a whole batch; gradients are added to ``.grad``.

        Every worker of a replica passes the same batch. Returns the loss of the full batch, all replicas' together,
        detached, 0-dimensional, on every worker. A batch that cannot be used raises ``InputError`` on every worker and
        loses nothing; a failure while the step runs raises ``WorkerError`` with the same root cause on every worker and
        closes the pipeline.

        With ``scaler`` the gradients are those of the scaled loss; ``unscale_``, ``step`` and ``update`` follow as
        usual. A gradient that is not finite on one worker makes all workers' so: each skips the step.
        """
        return self._runner.step(self._assembly.reader.inputs(args, kwargs, target), scaler)

    def evaluate(self, *args: object, target: object = None, gather: bool = False, **kwargs: object) -> object:
        """Forward only, without gradients, in the model's present mode; every worker calls it.

        Returns the model's own output for the replica's batch on the worker of its last stage; elsewhere the same
        structure with the loss alone, or with ``gather`` everything everywhere, the rows of replica 0 first. The loss,
        of all replicas' batches, is also in ``pipe.loss``. Key-value caches come with ``use_cache=True`` only.
        """
        return self._runner.evaluate(self._assembly.reader.inputs(args, kwargs, target), gather)

    @property
    def loss(self) -> torch.Tensor | None:
        """The loss of the last batch, 0-dimensional, on every worker; None before the first."""
        return self._runner.progress.loss

    def close(self) -> None:
        """Give up the connections to the other workers; every worker calls it. Model, weights and gradients stay."""
        self._runner.close()

    # -- what the user's loop needs ---------------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Parameters that this worker's optimizer is to update, under their original names: those that it holds, with
        ``shard`` its share of them. Shared ones are on every holder."""
        return updated_parameters(self._model, self._assembly.tensors.updated)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Parameters that this worker's optimizer is to update."""
        for _, parameter in self.named_parameters():
            yield parameter

    def state_dict(self) -> dict[str, torch.Tensor]:
        """This worker's share of the state: parameters that it updates and persistent buffers that it holds, under
        their original names; of sharded ones its rows, as a ``DTensor``."""
        return self._held_state(self._assembly.tensors.updated)

    def _held_state(self, among: Collection[str]) -> dict[str, torch.Tensor]:
        first_name = self._assembly.tensors.first_name
        return {name: tensor for name, tensor in self._model.state_dict().items()
                if first_name.get(name, name) in among}

    def full_state_dict(self) -> dict[str, torch.Tensor] | None:
        """All parameters and persistent buffers, on the CPU of worker 0; None elsewhere. Every worker calls it.

        For models that fit into worker 0's memory; ``save_weights`` writes any model, each worker its own part.
        """
        tensors = self._assembly.tensors
        return self._runner.collective(
            "full_state_dict", lambda: collect_state(self._model, tensors.first_name, tensors.owner, self._workers,
                                                     self._assembly.ties.collect))

    def load_state_dict(self, state: Mapping[str, torch.Tensor], strict: bool = True) -> None:
        """Put ``state`` (original names, of the whole model or of this worker's share) into the held tensors.

        Every worker calls it. With ``strict``, names that the model does not have and held ones that are missing are an
        error; a wrong shape always is: ``InputError`` on every worker, and nothing has changed.
        """
        tensors = self._assembly.tensors
        own, needed = self._held_state(tensors.held), self._held_state(tensors.updated)
        self._runner.collective("load_state_dict", lambda: self._workers.run_synchronized(
            lambda: load_state(own, tensors.first_name, state, strict, needed)))

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Scale all gradients so that their norm over all stages, shared ones counted once, is at most ``max_norm``.

        Returns the norm before scaling, 0-dimensional, the same number on every worker: where it is not finite, some
        gradient is not, and all workers can skip the step by it.
        """
        return self._runner.clip(max_norm, norm_type)

    def train(self, mode: bool = True) -> Pipeline:
        """Set the model to training mode."""
        self._model.train(mode)
        return self

    def eval(self) -> Pipeline:
        """Set the model to evaluation mode."""
        return self.train(False)

    def verify_shared(self) -> None:
        """Raise ``WorkerError`` unless every copy of a parameter, in other stages and in other replicas, holds the same
        bits; every worker calls it."""
        self._runner.collective("verify_shared", self._assembly.ties.verify)

    def save_weights(self, folder: str | Path) -> None:
        """Write all weights as safetensors with a sharded index in the original names; every worker calls it.

        At any moment the folder holds the old weights or the new, whole. Raises ``InputError``, the same on every
        worker, where it cannot be written; training can go on.
        """
        tensors = self._assembly.tensors
        self._runner.collective(f"save_weights({str(folder)!r})", lambda: save_weights(
            self._model, tensors.owned, Path(folder), self._workers, tensors.writers, tensors.owner,
            self._assembly.ties.collect))

    def holdings(self) -> Holdings:
        """What checkpoints need to know of this worker's share; see ``Checkpoints``."""
        made, progress = self._assembly, self._runner.progress
        tensors = made.tensors
        return Holdings(self._model, tensors.first_name, tensors.held, tensors.owned, self._workers,
                        made.programs.name, self.num_stages, lambda: made.plan.to_json(), progress.counters,
                        progress.set_counters, self._runner.check_open, self._runner.guarded, tensors.writers,
                        tensors.owner, made.ties.collect)

    # -- what happened ----------------------------------------------------------------------------------------------

    def timeline(self) -> Timeline | None:
        """What every worker of this replica did in a recent step (one of the first three, then every tenth); None
        before the first.

        Any worker may call it alone. In one process every stage is shown as a worker of its own.
        """
        return measured_timeline(self._published(), schedule=self._assembly.programs.name,
                                 num_workers=self._workers.grid.width, num_stages=self.num_stages)

    def count_memory(self) -> None:
        """Count the memory of the next step, on every worker that calls this; then ``report()`` and ``run_report()``
        have it beside what was predicted.

        Counted is what the actions add at the most, in live bytes by the allocator's own events, on a CPU too. The
        step takes longer, so its times are not kept; other steps cost nothing. While torch.profiler is at work the
        count waits for the step after.
        """
        # Kineto reads it when it is first used, and below that level says "profiler_start" on stderr.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        self._runner.counts_memory = True

    def _published(self) -> dict[int, str]:
        """What the workers of this replica have published last, by place."""
        published = self._workers.published()
        return {place: published[worker] for place, worker in enumerate(self._workers.grid.pipeline)
                if worker in published}

    def predicted_timeline(self) -> Timeline:
        """One step as the plan's costs predict it, with as many micro-batches as ``timeline()`` shows.

        In one process: what separate workers would take if messages took no time.
        """
        made = self._assembly
        return predict(made.priced, made.programs.schedule(self._runner.progress.microbatches), made.link,
                       self._workers.grid.num_replicas)

    def run_report(self) -> RunReport:
        """Per stage: predicted and measured time, idle share, memory, what it sends. Any worker may call it alone."""
        made, progress = self._assembly, self._runner.progress
        sizes = {name: p.numel() for name, p in self._model.named_parameters()}
        parameters = {stage: sum(size for name, size in sizes.items() if stage in made.placement.holders.get(name, ()))
                      for stage in range(self.num_stages)}
        rows = stage_rows(made.priced, made.programs.schedule(progress.microbatches), parameters, progress.microbatches,
                          added_bytes(self._published()), in_turns=self._workers.grid.width == 1)
        loss = None if progress.trained_loss is None else float(progress.trained_loss)
        return RunReport(type(self._model).__name__, made.programs.name, progress.microbatches, tuple(rows),
                         self.predicted_timeline(), self.timeline(), loss, in_turns=self._workers.grid.width == 1,
                         step=measured_step(self._published()))

    def report(self) -> str:
        """The run so far as a table for a terminal."""
        return report_text(self.run_report())

    def save_report(self, folder: str | Path) -> None:
        """Write ``report.json``, ``report.html`` and ``trace.json`` (for Perfetto); only the first worker writes."""
        if self._workers.rank == 0:
            save_report(self.run_report(), Path(folder))


def _launched() -> bool:
    """Whether torchrun, or something like it, has started this process as one of several."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ) and int(os.environ["WORLD_SIZE"]) > 1


def _precision(model: torch.nn.Module) -> torch.dtype:
    """Of a number that is made of all parameters: float32, unless some are wider."""
    wide = any(parameter.dtype in (torch.float64, torch.complex128) for parameter in model.parameters())
    return torch.float64 if wide else torch.float32


def _device(model: torch.nn.Module, device: torch.device | str | None) -> torch.device:
    """Where to run: as asked, else where the model is, else (for meta) the accelerator. Each process has its own."""
    chosen = torch.device(device) if device is not None else None
    if chosen is None and isinstance(model, torch.nn.Module):
        chosen = next((t.device for t in (*model.parameters(), *model.buffers()) if t.device.type != "meta"), None)
    chosen = chosen or torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if chosen.type in ("cpu", "meta") or chosen.index is not None:
        return chosen
    return torch.device(chosen.type, int(os.environ.get("LOCAL_RANK", 0)) % max(1, torch.accelerator.device_count()))
