"""Tiny models of many architectures with random weights, and batches for them, made from their configs alone."""
from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

VOCAB, LAYERS, WIDTH = 99, 3, 32
# The first name that a family has is the head of its first model; a family without any gives its bare model.
HEADS = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ", "CTC",
         "IMAGE_CLASSIFICATION", "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING",
         "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION", "SEMANTIC_SEGMENTATION", "MASKED_IMAGE_MODELING",
         "OBJECT_DETECTION", "MULTIPLE_CHOICE", "DEPTH_ESTIMATION", "TIME_SERIES_PREDICTION", "PRETRAINING")
# Names of numbers in a config -> what they become, the first that matches; (limit, value): only above the limit.
_NUMBERS = (
    (r"(token|bos|eos|pad|sep|cls|mask|unk)_?(id|index|token)$|_id$", None),
    (r"vocab|num_embeddings|codebook_size", (VOCAB, VOCAB)),
    (r"top_?k|experts_per_tok", (2, 2)),
    (r"n_group|topk_group|num_expert_group", (1, 1)),
    (r"experts?$|num_experts|routed_experts|local_experts", (4, 4)),
    (r"shared", (1, 1)),
    (r"(kv|key_value)_heads|num_kv", (4, 2)),
    (r"heads?$|num_.*heads", (4, 4)),
    (r"num_.*layers|n_layers?|.*_layers$|^depth$|num_blocks|num_hidden_blocks", (LAYERS, LAYERS)),
    (r"head_dim|rope_dim|d_kv|qk_.*dim|v_head_dim|per_head", (8, 8)),
    (r"max_.*position|n_positions|max_.*length|max_sequence|n_ctx|seq_len", (64, 64)),
    (r"image_size|img_size|input_size", (64, 64)),
    (r"patch_size", (8, 8)),
    (r"num_mel|mel_bins|n_mels", (16, 16)),
    (r"lora_rank|_rank$", (8, 8)),
    (r"window", (16, 16)),
    (r"ffn|intermediate|inner|mlp_dim|feed_forward|d_ff|d_inner", (48, 64)),
    (r"size|dim|embd|channels|width|features|units|hidden|d_model|filters", (WIDTH, WIDTH)),
)
_LISTS = ((r"depths?$|blocks|layers", (1, 1)), (r"heads", (2, 2)),
          (r"size|dim|channels|width|hidden|filters|embed", (WIDTH, WIDTH)))
_NOT_GIVEN = ("model_type", "id2label", "label2id", "transformers_version", "architectures")
_DROPOUTS = re.compile(r"drop|_pdrop|layerdrop|mask_time_prob|mask_feature_prob|jitter")


@dataclass(frozen=True)
class Tiny:
    """``build()`` makes the model, always the same one, in training mode; ``batches(model)`` gives two that differ.

    ``loss_fn`` is None where the model has a loss of its own.
    """

    name: str
    build: Callable[[], torch.nn.Module]
    batches: Callable[[torch.nn.Module], tuple[dict, dict]]
    loss_fn: Callable | None


# -- transformers -----------------------------------------------------------------------------------------------------


def transformers_names(most_heads: int) -> list[str]:
    """``family:model class`` of everything that the auto classes know, up to ``most_heads`` of each family."""
    from transformers.models.auto import modeling_auto
    heads: dict[str, dict[str, None]] = {}
    for head in (*(f"MODEL_FOR_{head}_MAPPING_NAMES" for head in HEADS), "MODEL_MAPPING_NAMES"):
        for family, kind in getattr(modeling_auto, head, {}).items():
            for name in (kind,) if isinstance(kind, str) else kind:
                heads.setdefault(family, {})[name] = None
    return [f"{family}:{kind}" for family, kinds in sorted(heads.items()) for kind in list(kinds)[:most_heads]]


def from_transformers(name: str) -> Iterator[Tiny]:
    """Ways to make this model tiny; the first that eager can train is the one."""
    import transformers
    family, kind = name.split(":")
    cls = getattr(transformers, kind)
    config_class = cls.config_class or transformers.CONFIG_MAPPING[family]
    for limit in (True, False):
        def build(limit: bool = limit) -> torch.nn.Module:
            config = _tiny_config(config_class, limit)
            with torch.device("meta"):
                size = sum(p.numel() for p in _made(cls, config).parameters())
            if size > 40_000_000:
                raise MemoryError(f"{size:,} parameters")
            torch.manual_seed(0)
            model = _made(cls, config).train()
            _without_dropout(model)
            return model
        has_loss = "For" in kind or kind.endswith(("LMHeadModel", "HeadModel"))
        for loss_fn in (None, mean_of_squares) if has_loss else (mean_of_squares,):
            yield Tiny(name, build, lambda model, loss_fn=loss_fn: tuple(
                batch(model, length, loss_fn is None) for length in (12, 9)), loss_fn)


def _made(cls: type, config: object) -> torch.nn.Module:
    return cls._from_config(config) if hasattr(cls, "_from_config") else cls(config)


def _tiny_config(config_class: type, limit: bool) -> object:
    values = config_class().to_dict()
    if limit:
        return config_class(**{k: v for k, v in _shrunk(values).items() if k not in _NOT_GIVEN})
    config = config_class()
    _shrink_in_place(config)
    return config


def _shrunk(values: Mapping[str, object]) -> dict:
    layers = [v for k, v in values.items() if re.fullmatch(r"num_hidden_layers|n_layers?|num_layers", k)]
    found: dict[str, object] = {}
    for number, (name, value) in enumerate(values.items()):
        found[name] = _shrunk_value(name, value, layers, number)
    if "layer_norm_eps" in found and "num_labels" not in found:
        found["num_labels"] = 5
    return found


def _shrunk_value(name: str, value: object, layers: list, number: int) -> object:
    if isinstance(value, dict):
        return _shrunk(value) if all(isinstance(key, str) for key in value) else value
    if isinstance(value, float) and _DROPOUTS.search(name):
        return 0.0
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return _number(name, value, number)
    if isinstance(value, (list, tuple)) and value:
        if name == "mrope_section":
            return [2, 1, 1]
        if len(value) in layers and len(value) > LAYERS:
            value = [value[0], value[len(value) // 2], value[-1]]
        if all(type(item) is int for item in value):
            rule = next((new for pattern, new in _LISTS if re.search(pattern, name)), None)
            return [min(item, rule[1]) if rule else item for item in value]
    return value


def _number(name: str, value: int, number: int) -> int:
    for pattern, new in _NUMBERS:
        if re.search(pattern, name):
            if new is None:
                return value if value < VOCAB - 9 else VOCAB - 9 + number % 9
            return new[1] if value > new[0] else value
    return value


def _shrink_in_place(config: object) -> None:
    attributes = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    plain = {k: v for k, v in attributes.items() if not hasattr(v, "to_dict")}
    for name, value in _shrunk(plain).items():
        if name in attributes and value is not plain[name]:
            setattr(config, name, value)
    for value in attributes.values():
        if hasattr(value, "to_dict"):
            _shrink_in_place(value)


def _without_dropout(model: torch.nn.Module) -> None:
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and (_DROPOUTS.search(name) or name == "p"):
                setattr(module, name, 0.0)


# -- batches ----------------------------------------------------------------------------------------------------------


def batch(model: torch.nn.Module, length: int, labels: bool, rows: int = 4) -> dict:
    """Random inputs for the arguments that this model's forward has, as far as they are known by name."""
    import inspect
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocab = min(getattr(text, "vocab_size", None) or VOCAB, VOCAB) - 10
    draw = torch.Generator().manual_seed(length)
    arguments = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    image = next((part for part in (getattr(config, "vision_config", None), config)
                  if getattr(part, "image_size", None)), None)
    size = getattr(image, "image_size", 64)
    size = size if isinstance(size, int) else size[0]
    channels = getattr(image or config, "num_channels", 3) or 3
    makers: dict[str, Callable[[], torch.Tensor]] = {
        "input_ids": lambda: torch.randint(3, vocab, (rows, length), generator=draw),
        "pixel_values": lambda: torch.randn(rows, channels, size, size, generator=draw),
        "input_values": lambda: torch.randn(rows, 400 * length, generator=draw),
        "input_features": lambda: torch.randn(rows, getattr(config, "num_mel_bins", 16), 64, generator=draw),
        "pixel_values_videos": lambda: torch.randn(rows, getattr(config, "num_frames", 4), channels, size, size,
                                                   generator=draw),
        "past_values": lambda: torch.randn(rows, getattr(config, "context_length", None) or 64, generator=draw),
    }
    found = {main: makers.get(main, makers["input_ids"])()}
    if main == "input_ids" and "attention_mask" in arguments:
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[1, length - 3:] = 0
        found["attention_mask"] = mask if length == 9 else torch.ones_like(mask)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in arguments and not labels:
        found["decoder_input_ids"] = torch.randint(3, vocab, (rows, length - 2), generator=draw)
    if "pixel_values" in arguments and main == "input_ids" and "bool_masked_pos" not in arguments \
            and getattr(config, "image_token_id", getattr(config, "image_token_index", None)) is None:
        found["pixel_values"] = makers["pixel_values"]()
    if labels:
        found |= _labels(model, arguments, rows, length, vocab, size, draw)
    return found


def _labels(model: torch.nn.Module, arguments: Mapping, rows: int, length: int, vocab: int, size: int,
            draw: torch.Generator) -> dict:
    kind, classes = type(model).__name__, getattr(model.config, "num_labels", 2) or 2

    def whole(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=draw)
    if "QuestionAnswering" in kind:
        return dict(start_positions=whole(length, rows), end_positions=whole(length, rows))
    if "labels" not in arguments:
        return {"return_loss": True} if "return_loss" in arguments else {}
    if "TokenClassification" in kind:
        return dict(labels=whole(classes, rows, length))
    if "Detection" in kind or "Universal" in kind:
        return dict(labels=[dict(class_labels=whole(classes, 2), boxes=torch.rand(2, 4, generator=draw) * 0.3 + 0.3)
                            for _ in range(rows)])
    if "Classification" in kind:
        return dict(labels=whole(classes, rows))
    if "Segmentation" in kind:
        return dict(labels=whole(classes, rows, size, size))
    if "CTC" in kind:
        return dict(labels=whole(vocab - 1, rows, 4) + 1)
    return dict(labels=whole(vocab, rows, length))


def mean_of_squares(output: object, target: object) -> torch.Tensor:
    """A loss for models without one: of the first tensor with a gradient in the output."""
    first = _first_trained(output)
    if first is None:
        raise ValueError("no output follows from the weights")
    return first.float().square().mean()


def _first_trained(output: object) -> torch.Tensor | None:
    if isinstance(output, torch.Tensor):
        return output if output.is_floating_point() and output.requires_grad else None
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return next((found for part in parts if (found := _first_trained(part)) is not None), None)
