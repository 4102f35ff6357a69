"""Weights and adapters of a pipeline in the folders that Transformers and PEFT read."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from pipeengine.checkpoint import collect_state, load_stage
from pipeengine.errors import InputError
from pipeengine.pipeline import Pipeline

ADAPTER = "adapter_model.safetensors"


def save_pretrained(pipe: Pipeline, folder: str | Path) -> None:
    """Write what ``model.save_pretrained(folder)`` would in one process; every worker calls it.

    Of a PEFT model the adapters of all stages, in PEFT's names, with their config: they travel to worker 0, the frozen
    base does not. Of any other model all weights, each worker its own part, with the configs that it has.
    """
    holdings, folder = pipe.holdings(), Path(folder)
    model: Any = holdings.model
    if is_peft(model):
        state = _adapters(pipe)
        holdings.workers.run_synchronized(
            lambda: model.save_pretrained(folder, state_dict=state) if state is not None else None)
        return
    pipe.save_weights(folder)
    generation = getattr(model, "generation_config", None)
    holdings.workers.run_synchronized(
        lambda: generation.save_pretrained(folder) if generation is not None and pipe.is_first_worker else None)


def load_pretrained(pipe: Pipeline, folder: str | Path) -> None:
    """Put the weights or adapters of a folder into the pipeline; every worker calls it and reads what it holds.

    Raises ``InputError``, the same on every worker, for a folder of another model.
    """
    holdings, folder = pipe.holdings(), Path(folder)
    if not is_peft(holdings.model):
        device = next((tensor.device for tensor in holdings.persistent().values()), torch.device("cpu"))
        holdings.workers.run_synchronized(
            lambda: load_stage(holdings.model, holdings.held, device, weights=folder, seed=0))
        return
    pipe.load_state_dict(holdings.workers.run_synchronized(lambda: _read_adapters(holdings.model, folder)),
                         strict=False)


def is_peft(model: torch.nn.Module) -> bool:
    """Whether PEFT has put adapters into ``model``; does not import PEFT."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def adapter_names(model: torch.nn.Module) -> dict[str, str]:
    """PEFT's name of every tensor that belongs to the active adapter -> its name in ``model``."""
    from peft import get_peft_model_state_dict
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    name_of = {id(tensor): name for name, tensor in state.items()}
    chosen = get_peft_model_state_dict(model, state_dict=state, adapter_name=_active(model))
    return {key: name_of[id(tensor)] for key, tensor in chosen.items()}


def _active(model: Any) -> str:
    return model.active_adapters[0] if model.active_adapters else "default"


def _adapters(pipe: Pipeline) -> dict[str, torch.Tensor] | None:
    """The adapters of all stages, in the model's names, on worker 0's CPU; None elsewhere."""
    holdings = pipe.holdings()
    names = set(adapter_names(holdings.model).values())
    state = {name: tensor for name, tensor in holdings.model.state_dict().items() if name in names}
    first_name = {name: holdings.first_name.get(name, name) for name in state}
    everybody = holdings.workers.all_gather_object(sorted(holdings.owned & set(first_name.values())))
    owner = {name: rank for rank, owned in enumerate(everybody) for name in owned}
    part: Any = SimpleNamespace(state_dict=lambda: state)
    collected = holdings.guarded(lambda: collect_state(part, first_name, owner, holdings.workers))
    return collected                                                                        # type: ignore[return-value]


def _read_adapters(model: torch.nn.Module, folder: Path) -> Mapping[str, torch.Tensor]:
    """The tensors of a folder of PEFT in the model's names."""
    from safetensors.torch import load_file
    path = folder / ADAPTER
    if not path.is_file():
        raise InputError(f"{folder} has no {ADAPTER}; give a folder that save_pretrained wrote for this kind of model")
    saved, names = load_file(path), adapter_names(model)
    if set(saved) != set(names):
        odd = min(set(saved) ^ set(names))
        raise InputError(f"{path} has {len(saved)} tensors, the model's adapter {len(names)}, and only one of them has "
                         f"{odd}; give a folder of this model and this adapter")
    return {names[key]: tensor for key, tensor in saved.items()}
