"""Which nodes of a recording can have their weight gradients wait, and by which function."""
from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from pipeengine.torch_private import ConvNd
from pipeengine.tracing import Node, Recording, Ref, node_refs

Replacement = tuple[str, tuple]
"""A method of ``Deferral``, and its arguments (with Refs)."""


def find_deferrable(recording: Recording, model: torch.nn.Module) -> dict[int, Replacement]:
    """What stands in for which nodes, by the value they make.

    A parameter that some other node reads too has all its gradients computed in I: summed and accumulated at once.
    """
    replacements = {index: replacement for index, node in enumerate(recording.nodes)
                    if (replacement := _replacement(node, recording, model)) is not None}
    while True:
        elsewhere = {v for index, node in enumerate(recording.nodes)
                     if index not in replacements and _needs_gradient(node, recording)
                     for v in _parameters(node, recording)}
        kept = {index: replacement for index, replacement in replacements.items()
                if not elsewhere & _parameters(recording.nodes[index], recording)}
        if len(kept) == len(replacements):
            return {recording.nodes[index].results[0]: replacement for index, replacement in kept.items()}
        replacements = kept


def _parameters(node: Node, recording: Recording) -> set[int]:
    values = recording.values
    return {v for v in node_refs(node) if values[v].kind == "attribute" and values[v].spec.requires_grad}


def _needs_gradient(node: Node, recording: Recording) -> bool:
    return any(recording.values[v].spec.requires_grad for v in node.results)


def _replacement(node: Node, recording: Recording, model: torch.nn.Module) -> Replacement | None:
    if not node.modes.grad or node.modes.inference or node.recompute or node.random or node.kwargs:
        return None
    replacement = _layer(node, recording, model)
    if replacement is None or not node.modes.autocast or replacement[0] == "embedding":
        return replacement
    return ("autocast", (replacement[0], *replacement[1])) if _is_cast_once(node, recording) else None


def _is_cast_once(node: Node, recording: Recording) -> bool:
    """Under autocast, gradients of a weight read twice are added in the lower precision: they are left alone."""
    own = _parameters(node, recording)
    return sum(bool(own & _parameters(other, recording)) for other in recording.nodes) == 1 \
        and all(recording.values[v].spec.dtype == torch.float32 for v in own)


def _layer(node: Node, recording: Recording, model: torch.nn.Module) -> Replacement | None:
    if node.is_module:
        return _module_replacement(node, recording, model)
    if node.target is torch.nn.functional.linear:
        x, weight, *bias = node.args
        plain = _is_trained(weight, 2, recording) and all(b is None or _is_trained(b, 1, recording) for b in bias)
        return ("linear", node.args) if plain and isinstance(x, Ref) else None
    if node.target is torch.addmm and len(node.args) == 3 and isinstance(node.args[1], Ref):
        bias, _, weight = node.args
        return ("addmm", node.args) if _is_trained(bias, 1, recording) and _is_trained(weight, 2, recording) else None
    return None


def _is_trained(argument: object, num_axes: int, recording: Recording) -> bool:
    if not isinstance(argument, Ref):
        return False
    value = recording.values[argument.value]
    return value.kind == "attribute" and value.spec.requires_grad and len(value.spec.shape) == num_axes


def _module_replacement(node: Node, recording: Recording, model: torch.nn.Module) -> Replacement | None:
    module = model.get_submodule(node.target)
    make = _MODULES.get(type(module))
    if make is None or node.target in recording.leaf_modules or "forward" in vars(module) or len(node.args) != 1:
        return None
    refs = {id(model.get_parameter(recording.values[v].name)): Ref(v) for v in _parameters(node, recording)}
    at = {name: refs.get(id(p)) for name, p in module._parameters.items() if p is not None}
    return None if None in at.values() else make(module, node.args[0], at["weight"], at.get("bias"))


def _linear(module: torch.nn.Linear, x: Ref, weight: Ref, bias: Ref | None) -> Replacement:
    return "linear", (x, weight, bias)


def _embedding(module: torch.nn.Embedding, x: Ref, weight: Ref, bias: None) -> Replacement | None:
    padding = -1 if module.padding_idx is None else module.padding_idx
    if module.sparse or module.max_norm is not None:
        return None
    return "embedding", (x, weight, padding, module.scale_grad_by_freq)


def _convolution(module: ConvNd, x: Ref, weight: Ref, bias: Ref | None) -> Replacement | None:
    padding = _padding(module)
    if module.padding_mode != "zeros" or padding is None:
        return None
    return "convolution", (x, weight, bias, module.stride, padding, module.dilation, module.transposed,
                           module.output_padding, module.groups)


def _padding(module: ConvNd) -> tuple[int, ...] | None:
    """In numbers, or None where the two sides of an axis differ."""
    if not isinstance(module.padding, str):
        return module.padding
    both = [0 if module.padding == "valid" else d * (k - 1) for d, k in zip(module.dilation, module.kernel_size)]
    return None if any(total % 2 for total in both) else tuple(total // 2 for total in both)
_MODULES: Mapping[type, Callable[..., Replacement | None]] = {
    torch.nn.Linear: _linear, torch.nn.Embedding: _embedding,
    **dict.fromkeys((torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.ConvTranspose1d,
                     torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d), _convolution)}
