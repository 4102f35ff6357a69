"""Transformers' Trainer over pipeline stages: the import and one argument are what changes in a script.

    from pipeengine.integrations.huggingface import PipelineTrainer

    trainer = PipelineTrainer(model=model, args=args, train_dataset=data,
                              pipeline=dict(num_microbatches=8, schedule="1f1b"))
    trainer.train()
"""
from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import Trainer
from transformers.utils import logging

from pipeengine.checkpoint import Checkpoints, Holdings
from pipeengine.distributed import guarded_collectives
from pipeengine.errors import InputError
from pipeengine.integrations.one_batch import PipelineAccelerator
from pipeengine.integrations.pretrained import load_pretrained, save_pretrained
from pipeengine.integrations.refusals import refuse_unsupported
from pipeengine.integrations.restarts import continued_experiments, save_experiments, save_together_on_signals
from pipeengine.pipeline import Pipeline
from pipeengine.tracing import tensors

__all__ = ["PipelineAccelerator", "PipelineMixin", "PipelineTrainer", "load_pretrained", "save_pretrained"]

STATE = "training"          # the folder within checkpoint-N that holds optimizer, scheduler and counters
logger = logging.get_logger(__name__)


class PipelineMixin:
    """What makes a ``Trainer`` train over stages; stands before its class: ``class T(PipelineMixin, Trainer)``.

    ``pipeline`` holds options of ``pipeengine.Pipeline``, such as ``num_microbatches`` and ``schedule``. Under torchrun
    every process is a worker, and all get the same batches: ``per_device_train_batch_size`` is the batch of the whole
    pipeline. With ``num_replicas`` (or a ``mesh``) each of several pipelines gets its share of the data, as processes
    do elsewhere. In plain Python the stages run in this process. ``trainer.pipe`` is the pipeline, made when it is
    first needed from the first rows of the data.

    Raises ``InputError`` for what a pipeline cannot do: fp16, FSDP, DeepSpeed, torch_compile and a ``compute_loss`` of
    the script's own.
    """

    args: Any
    model: Any
    optimizer: Any
    accelerator: Any

    def __init__(self, *args: Any, pipeline: Mapping[str, Any] | None = None, **kwargs: Any):
        self._pipeline_options = dict(pipeline or {})
        self._pipe: Pipeline | None = None
        super().__init__(*args, **kwargs)
        save_together_on_signals(self)

    # -- construction -----------------------------------------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        """Accelerate without its sharding: the workers of a pipeline take the same batches, replicas their share."""
        refuse_unsupported(self, self._pipeline_options)
        self.args._n_gpu = min(1, self.args.n_gpu)
        super().create_accelerator_and_postprocess()                    # type: ignore[misc]
        self.accelerator.__class__ = PipelineAccelerator
        self.accelerator.stand(self._pipeline_options.get("num_replicas"), self._pipeline_options.get("mesh"))

    def _move_model_to_device(self, model: torch.nn.Module, device: torch.device) -> None:
        """Nothing: each worker moves its own stages when the pipeline is made."""

    @property
    def pipe(self) -> Pipeline:
        """The pipeline that trains ``model``."""
        if self._pipe is None or self._pipe.holdings().model is not self.model:
            self._pipe = self._make_pipe(self._example())
        return self._pipe

    def _example(self) -> Any:
        """The first rows of the training data, else of the evaluation's, as a batch; draws no random number."""
        trainer: Any = self
        if trainer.train_dataset is None and not trainer.eval_dataset:
            raise InputError("a pipeline is made from an example batch, and the Trainer has 0 data sets; give it a "
                             "train_dataset or an eval_dataset")
        with _random_state_kept():
            if trainer.train_dataset is not None:
                loader, rows = trainer.get_train_dataloader(), self.args.train_batch_size
            else:
                first = next(iter(trainer.eval_dataset)) if isinstance(trainer.eval_dataset, dict) else None
                loader, rows = trainer.get_eval_dataloader(first), self.args.eval_batch_size
            data = loader.dataset
            items = iter(data) if isinstance(data, torch.utils.data.IterableDataset) \
                else (data[index] for index in range(len(data)))
            return loader.collate_fn(list(islice(items, rows)))

    def _make_pipe(self, batch: Any) -> Pipeline:
        trainer: Any = self
        items = trainer._get_num_items_in_batch([batch], self.args.device)
        inputs, target = self._split(batch, items)
        device = torch.device("cpu") if self.args.device.type == "cpu" else self.args.device
        options = {"device": device, "seed": self.args.seed, **self._pipeline_options}
        if target is not None:
            options.update(loss_fn=self._loss_of, target=target)
        with self.accelerator.autocast():
            return Pipeline(self.model, inputs, **options)

    # -- inputs and losses ------------------------------------------------------------------------------------------

    def _split(self, batch: Any, num_items: Any) -> tuple[dict[str, Any], Any]:
        """What the model is called with, and what a loss outside the model gets (None: the model's own loss)."""
        trainer: Any = self
        inputs = dict(trainer._prepare_inputs(batch))
        if (trainer.compute_loss_func is not None or trainer.label_smoother is not None) and "labels" in inputs:
            target = {"labels": inputs.pop("labels")}
            return inputs, target if num_items is None else {**target, "num_items_in_batch": num_items}
        if trainer.model_accepts_loss_kwargs and num_items is not None:
            inputs["num_items_in_batch"] = num_items
        return inputs, None

    def _loss_of(self, output: Any, target: Mapping[str, Any]) -> torch.Tensor:
        trainer: Any = self
        labels, num_items = target["labels"], target.get("num_items_in_batch")
        if trainer.compute_loss_func is not None:
            return trainer.compute_loss_func(output, labels, num_items_in_batch=num_items)
        return trainer.label_smoother(output, labels, shift_labels=trainer._loss_shifts_labels,
                                      num_items_in_batch=num_items)

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one batch over all stages; gradients are added, every worker gets the loss."""
        trainer: Any = self
        pipe = self.pipe
        self.model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        arguments, target = self._split(inputs, num_items_in_batch)
        with self.accelerator.autocast():
            loss: Any = pipe.step(**arguments, target=target)
        is_scaled = trainer.compute_loss_func is not None or (
            trainer.model_accepts_loss_kwargs and num_items_in_batch is not None)
        steps = trainer.current_gradient_accumulation_steps
        if not is_scaled and steps > 1:
            loss = loss / steps
            if self.accelerator.sync_gradients:         # all batches of this update count the same: scale their sum
                for parameter in pipe.parameters():
                    if parameter.grad is not None:
                        parameter.grad.div_(steps)
        return loss.to(self.args.device)

    def prediction_step(self, model: torch.nn.Module, inputs: Any, prediction_loss_only: bool,
                        ignore_keys: list[str] | None = None) -> tuple[Any, Any, Any]:
        """Loss, logits and labels of one batch, on every worker."""
        trainer: Any = self
        has_labels = bool(trainer.label_names) and all(inputs.get(name) is not None for name in trainer.label_names)
        has_loss = has_labels or (not trainer.label_names and inputs.get("return_loss", trainer.can_return_loss))
        names = trainer.label_names if has_labels else ()
        labels = tuple(trainer._prepare_input(inputs[name]).detach() for name in names)
        num_items = trainer._get_num_items_in_batch([inputs], self.args.device) if has_labels else None
        arguments, target = self._split(inputs, num_items)
        if self._pipe is None and trainer.train_dataset is None and not trainer.eval_dataset:
            self._pipe = self._make_pipe(inputs)
        pipe = self.pipe
        with self.accelerator.autocast():
            outputs: Any = pipe.evaluate(**arguments, target=target,
                                         gather=pipe.num_replicas == 1 and not prediction_loss_only)
        loss = pipe.loss.mean().to(self.args.device) if has_loss and pipe.loss is not None else None
        if prediction_loss_only:
            return loss, None, None
        ignored = ignore_keys or getattr(getattr(self.model, "config", None), "keys_to_ignore_at_inference", [])
        if isinstance(outputs, Mapping):
            logits: Any = tuple(value for key, value in outputs.items() if key not in (*ignored, "loss"))
        else:
            logits = outputs[1:] if loss is not None and target is None else outputs
        if pipe.num_replicas > 1:
            logits = trainer._prepare_input(_within_replica(pipe, logits))
        return loss, logits[0] if len(logits) == 1 else logits, labels[0] if len(labels) == 1 else labels or None

    # -- the optimizer ----------------------------------------------------------------------------------------------

    def _wrap_model(self, model: torch.nn.Module, training: bool = True, dataloader: Any = None) -> torch.nn.Module:
        return model

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, for the parameters that this worker holds."""
        pipe = self.pipe
        if self.optimizer is not None:
            own = {id(parameter) for parameter in pipe.parameters()}
            for group in self.optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) in own]
        return super().create_optimizer(_Held(pipe, self.model))        # type: ignore[misc]

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Names of the parameters that decay, of the whole model."""
        return super().get_decay_parameter_names(self.model)            # type: ignore[misc]

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        return self.pipe.clip_grad_norm_(self.args.max_grad_norm)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor:
        return self.pipe.clip_grad_norm_(float("inf")) if grad_norm is None else grad_norm

    def get_total_train_batch_size(self, args: Any) -> int:
        """Rows of one update: the workers of a pipeline share a batch."""
        trainer: Any = self
        return trainer._train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes

    # -- folders ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as ``Trainer.train``; ``resume_from_checkpoint=True`` takes the newest checkpoint that is whole,
        and the trackers go on with its experiments."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_whole(Path(self.args.output_dir))
        with continued_experiments(self, resume_from_checkpoint or None, os.environ), guarded_collectives():
            return super().train(resume_from_checkpoint, *args, **kwargs)       # type: ignore[misc]

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as ``Trainer.evaluate``."""
        with guarded_collectives():
            return super().evaluate(*args, **kwargs)                            # type: ignore[misc]

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict as ``Trainer.predict``."""
        with guarded_collectives():
            return super().predict(*args, **kwargs)                             # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        save_pretrained(self.pipe, folder)
        if self.args.should_save:
            tokenizer = getattr(self, "processing_class", None) or getattr(getattr(self, "data_collator", None),
                                                                           "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            (folder / "training_args.json").write_text(self.args.to_json_string())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_pretrained(self.pipe, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        trainer: Any = self
        load_pretrained(self.pipe, trainer.state.best_model_checkpoint)

    @contextlib.contextmanager
    def _training_state(self, folder: str) -> Iterator[Checkpoints]:
        """Optimizer, scheduler and counters in a checkpoint's folder; its weights stand beside it."""
        trainer: Any = self
        checkpoints = Checkpoints(Path(folder) / STATE, _WithoutWeights(self.pipe), keep=1, background=False,
                                  signals=False, optimizer=getattr(self.optimizer, "optimizer", self.optimizer),
                                  scheduler=trainer.lr_scheduler)
        try:
            yield checkpoints
        finally:
            checkpoints.close()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        trainer: Any = self
        with self._training_state(output_dir) as checkpoints:
            checkpoints.save(trainer.state.global_step, force=True)
        save_experiments(trainer, Path(output_dir))

    def _save_rng_state(self, output_dir: str) -> None:
        # Worker 0 writes trainer_state.json next, which says that the checkpoint is whole: all must be done.
        save = super()._save_rng_state                                  # type: ignore[misc]
        self.pipe.holdings().workers.run_synchronized(lambda: save(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if not (Path(checkpoint) / STATE).is_dir():
            logger.warning(f"{checkpoint} has no folder {STATE}: the optimizer and the scheduler start anew")
            return
        with self._training_state(checkpoint) as checkpoints:
            checkpoints.load()


class PipelineTrainer(PipelineMixin, Trainer):
    """``transformers.Trainer`` over pipeline stages: one more argument, ``pipeline``, and the same losses.

    Everything else is the Trainer's: evaluation and metrics, accumulation, clipping, schedulers, callbacks,
    ``report_to``, ``save_strategy``, ``load_best_model_at_end``, ``resume_from_checkpoint``. See ``PipelineMixin``.
    """


class _Held:
    """A model of which only the parameters that a worker holds are seen."""

    def __init__(self, pipe: Pipeline, model: torch.nn.Module):
        self._pipe, self._model = pipe, model

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return self._pipe.named_parameters()

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        return self._pipe.parameters()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _WithoutWeights:
    """A pipeline for a checkpoint whose weights are saved elsewhere."""

    def __init__(self, pipe: Pipeline):
        self._pipe = pipe

    def holdings(self) -> Holdings:
        return replace(self._pipe.holdings(), first_name={}, owned=frozenset())


def _within_replica(pipe: Pipeline, logits: Any) -> Any:
    """The output of the own replica's last stage; every worker of all replicas calls it."""
    holdings = pipe.holdings()
    grid = holdings.workers.grid
    everybody: Any = holdings.guarded(lambda: holdings.workers.all_gather_object(logits if tensors(logits) else None))
    return next((everybody[worker] for worker in grid.pipeline if everybody[worker] is not None), None)


def newest_whole(folder: Path) -> str:
    """The newest ``checkpoint-N`` whose last file, ``trainer_state.json``, is whole. Raises ``InputError``."""
    suffixes = (path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*"))
    numbers = sorted((int(suffix) for suffix in suffixes if suffix.isdigit()), reverse=True)
    for number in numbers:
        path = folder / f"checkpoint-{number}"
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):
            logger.warning(f"passing over {path}: it has no whole trainer_state.json, so its save was interrupted")
        else:
            return str(path)
    raise InputError(f"{folder} holds {len(numbers)} checkpoints and none is whole; train without "
                     "resume_from_checkpoint, or copy one back")


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """What happens inside draws no random numbers, as far as the outside can tell."""
    python, array = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    numpy.random.set_state(array)
