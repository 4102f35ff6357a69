"""What a Trainer may be asked for and a pipeline cannot do, with what to do instead."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipeengine.errors import InputError

_OWN_LOSSES = ("transformers.trainer", "trl.trainer.sft_trainer")


def refuse_unsupported(trainer: Any, pipeline: Mapping[str, Any]) -> None:
    """Raise ``InputError`` for what ``trainer`` asks for and a pipeline with these options cannot do."""
    args, loss_type = trainer.args, getattr(trainer.args, "loss_type", None) or "nll"
    has_replicas = (pipeline.get("num_replicas") or 1) > 1 or pipeline.get("mesh") is not None
    refusals: dict[str, tuple[bool, str]] = {
        "fp16=True": (args.fp16, "use bf16=True"),
        "fsdp": (bool(args.fsdp), 'pass pipeline=dict(num_replicas=2, shard="parameters"), or leave it out'),
        "deepspeed": (args.deepspeed is not None, "leave it out: the pipeline shares the memory"),
        "torch_compile=True": (args.torch_compile, "compile blocks of the model before"),
        "parallelism_config": (getattr(args, "parallelism_config", None) is not None, "leave it out"),
        "predict_with_generate=True": (getattr(args, "predict_with_generate", False), "generate after training, from "
                                       "the saved folder"),
        f"loss_type={loss_type!r}": (loss_type != "nll", 'use "nll", the model\'s own loss, or compute_loss_func='),
        "average_tokens_across_devices=False with replicas": (
            has_replicas and not args.average_tokens_across_devices, "leave it at True: a step is one batch"),
    }
    for name, (is_asked, advice) in refusals.items():
        if is_asked:
            raise InputError(f"a pipeline does not do {name} in the Trainer; {advice}")
    if _module_of(type(trainer).compute_loss) not in _OWN_LOSSES:
        raise InputError(f"{type(trainer).__name__} has a compute_loss of its own, which a pipeline cannot call, for "
                         "no worker has the whole model; pass compute_loss_func=, a function of outputs and labels")


def _module_of(function: Callable) -> str:
    return getattr(function, "__module__", "")
