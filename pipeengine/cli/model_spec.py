"""Models named on the command line: a factory, or a Hugging Face ``config.json`` (built on meta, without weights)."""
from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from pipeengine.errors import InputError
from pipeengine.object_path import named

_FORMS = "model, example, or model, example, loss_fn, or model, example, loss_fn, target"


class Named(NamedTuple):
    """What a factory may return, at least the first two; without ``loss_fn`` the model has its own loss."""
    model: torch.nn.Module
    example: object
    loss_fn: Callable | None = None
    target: object = None


def load(name: str, *, rows: int, length: int | None) -> Named:
    """The model, an example batch, and the loss if it has none of its own.

    For ``package.module:factory``, ``path/to/file.py:factory`` or a ``config.json``.
    """
    if name.endswith(".json"):
        return Named(*from_config(Path(name), rows=rows, length=length))
    if ":" not in name:
        raise InputError(
            f"{name!r} names no model; give package.module:factory, path/to/file.py:factory (the factory returns "
            f"{_FORMS}) or a Hugging Face config.json"
        )
    factory = named(name)
    if asked := _required(factory):
        raise InputError(f"{name} asks for {', '.join(asked)}; give a function without arguments, which "
                         f"returns {_FORMS}")
    returned = factory()
    if not (isinstance(returned, tuple) and 2 <= len(returned) <= 4 and isinstance(returned[0], torch.nn.Module)):
        kind = f"a {type(returned).__name__}"
        if isinstance(returned, tuple) and returned:
            kind = f"{len(returned)} things, the first a {type(returned[0]).__name__}"
        raise InputError(f"{name} returned {kind}; it must return {_FORMS}")
    spec = Named(*returned)
    if spec.loss_fn is not None and not callable(spec.loss_fn):
        raise InputError(
            f"{name} returned something of type {type(spec.loss_fn).__name__} as loss_fn; it must return {_FORMS}"
        )
    return spec


def _required(factory: Callable) -> list[str]:
    """The arguments without which a factory cannot be called, as far as that can be seen."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return []
    return [one.name for one in parameters if one.default is one.empty
            and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]


def from_config(path: Path, *, rows: int, length: int | None) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A Hugging Face model on meta, and a batch of ``rows`` with labels."""
    try:
        import transformers
    except ImportError as error:
        raise InputError("a config.json needs the package transformers: pip install transformers") from error
    try:
        config = transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no Hugging Face config: {error}") from error
    with torch.device("meta"):
        model = _class_of(transformers, config)._from_config(config) if getattr(config, "architectures", None) else \
            _automatic(transformers, config)
    return model.train(), _example(config, model, rows, length)


def _class_of(transformers, config):
    name = config.architectures[0]
    if not hasattr(transformers, name):
        raise InputError(f"this version of transformers ({transformers.__version__}) has no {name}")
    return getattr(transformers, name)


def _automatic(transformers, config) -> torch.nn.Module:
    for name in (
        "AutoModelForCausalLM",
        "AutoModelForSeq2SeqLM",
        "AutoModelForMaskedLM",
        "AutoModelForImageClassification",
    ):
        try:
            return getattr(transformers, name).from_config(config)
        except ValueError:
            continue
    raise InputError(f"no trainable model is known for a {type(config).__name__}; add \"architectures\" to the config")


def _example(config, model, rows: int, length: int | None) -> dict[str, torch.Tensor]:
    if model.main_input_name == "pixel_values":
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        return {"pixel_values": torch.zeros(rows, getattr(config, "num_channels", 3), size, size),
                "labels": torch.zeros(rows, dtype=torch.int64)}
    if model.main_input_name != "input_ids":
        raise InputError(
            f"{type(model).__name__} takes {model.main_input_name}, for which no example can be made from a config "
            "alone; give a factory that returns model, example"
        )
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 512
    tokens = torch.zeros(rows, length or min(longest, 2048), dtype=torch.int64)
    per_row = type(model).__name__.endswith("SequenceClassification")
    return {"input_ids": tokens, "labels": tokens[:, 0] if per_row else tokens}
