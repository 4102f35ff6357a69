"""The weight half of backward, put off: linear maps and embeddings whose weight gradients wait until they are asked for.

In a schedule that splits backward into I (input gradients) and W (weight gradients), the stage calls these in the place of the
user's linear layers and embeddings. Backward computes what earlier stages wait for and queues the rest; ``run`` does it. What the
queue keeps are the layer's input, which backward has kept anyway, and the gradient of its output (Zero Bubble, Qi et al.,
ICLR 2024). Every other layer has its weight gradients computed in I: right for every model, only less is put off.
"""
from __future__ import annotations

from collections.abc import Callable

import torch

from pipeengine.recording import Node, Recording, Ref

Queue = list[Callable[[], None]]


class Deferral:
    """Holds the queue of the micro-batch whose forward is running."""

    def __init__(self) -> None:
        self.queue: Queue = []

    def begin(self) -> Queue:
        """A new queue for the next forward."""
        self.queue = []
        return self.queue

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``torch.nn.functional.linear``; ``weight`` is (out, in)."""
        return _Linear.apply(x, weight, bias, self.queue)

    def addmm(self, bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``torch.addmm``; ``weight`` is (in, out)."""
        return _Addmm.apply(x, weight, bias, self.queue)

    def embedding(self, indices: torch.Tensor, weight: torch.Tensor, padding_idx: int, scale: bool) -> torch.Tensor:
        """A row of ``weight`` per index."""
        return _Embedding.apply(indices, weight, padding_idx, scale, self.queue)


def run(queue: Queue) -> None:
    """Compute and accumulate the weight gradients that were put off, and let go of what they needed."""
    with torch.no_grad():
        for work in queue:
            work()
    queue.clear()


def _accumulate(parameter: torch.Tensor, gradient: torch.Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad += gradient


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, queue):
        ctx.save_for_backward(x, weight)
        # What a checkpoint gives back for a saved parameter is not the parameter, so that is kept by itself.
        ctx.weight, ctx.bias, ctx.queue = weight, bias, queue
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, value = ctx.saved_tensors
        weight, bias = ctx.weight, ctx.bias
        rows = gradient.reshape(-1, gradient.shape[-1])

        def later() -> None:
            _accumulate(weight, rows.t().mm(x.reshape(-1, x.shape[-1])))
            if bias is not None and bias.requires_grad:
                _accumulate(bias, rows.sum(0))
        ctx.queue.append(later)
        wanted = rows.mm(value).view(x.shape) if ctx.needs_input_grad[0] else None
        return wanted, None, None, None


class _Addmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, queue):
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.bias, ctx.queue = weight, bias, queue
        return torch.addmm(bias, x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, value = ctx.saved_tensors
        weight, bias = ctx.weight, ctx.bias

        def later() -> None:
            _accumulate(weight, x.t().mm(gradient))
            if bias.requires_grad:
                _accumulate(bias, gradient.sum(0))
        ctx.queue.append(later)
        return gradient.mm(value.t()) if ctx.needs_input_grad[0] else None, None, None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, indices, weight, padding_idx, scale, queue):
        ctx.weight, ctx.indices, ctx.padding_idx, ctx.scale, ctx.queue = weight, indices, padding_idx, scale, queue
        return torch.nn.functional.embedding(indices, weight, padding_idx if padding_idx >= 0 else None,
                                             scale_grad_by_freq=scale)

    @staticmethod
    def backward(ctx, gradient):
        weight, indices, padding_idx, scale = ctx.weight, ctx.indices, ctx.padding_idx, ctx.scale

        def later() -> None:
            _accumulate(weight, torch.ops.aten.embedding_dense_backward(gradient, indices, weight.shape[0], padding_idx, scale))
        ctx.queue.append(later)
        return None, None, None, None, None


def replacement(node: Node, recording: Recording, model: torch.nn.Module) -> tuple[str, tuple] | None:
    """The method of ``Deferral`` that stands in for ``node``, and its arguments (with Refs), or None."""
    if not node.modes.grad or node.modes.inference or node.modes.autocast or node.recompute or node.random:
        return None
    if node.is_module:
        return _module_replacement(node, recording, model.get_submodule(node.target)) if not node.kwargs else None
    if node.target is torch.nn.functional.linear and not node.kwargs:
        weight = node.args[1]
        return ("linear", node.args) if all(map(_is_plain(recording, model), node.args[1:])) and isinstance(weight, Ref) else None
    if node.target is torch.addmm and not node.kwargs and all(isinstance(a, Ref) for a in node.args):
        bias, _, weight = node.args
        plain = _is_plain(recording, model)
        return ("addmm", node.args) if plain(bias) and plain(weight) and len(recording.values[bias.value].spec.shape) == 1 else None
    return None


def _module_replacement(node: Node, recording: Recording, module: torch.nn.Module) -> tuple[str, tuple] | None:
    if node.target in recording.sealed or module._forward_hooks or module._forward_pre_hooks or not node.args:
        return None
    at = {recording.values[v].name.rpartition(".")[2]: Ref(v) for v in node.attributes}
    if any(_has_hooks(p) or not p.requires_grad for p in module._parameters.values() if p is not None) \
            or len(at) != sum(p is not None for p in module._parameters.values()):
        return None
    if type(module) is torch.nn.Linear:
        return "linear", (node.args[0], at["weight"], at.get("bias"))
    if type(module) is torch.nn.Embedding and not module.sparse and module.max_norm is None:
        padding = -1 if module.padding_idx is None else module.padding_idx
        return "embedding", (node.args[0], at["weight"], padding, module.scale_grad_by_freq)
    return None


def _is_plain(recording: Recording, model: torch.nn.Module) -> Callable[[object], bool]:
    """Whether an argument is a trained parameter without hooks of its own (or None)."""
    def is_plain(argument: object) -> bool:
        if argument is None:
            return True
        made = recording.values[argument.value] if isinstance(argument, Ref) else None
        if made is None or made.kind != "attribute" or not made.spec.requires_grad:
            return False
        return not _has_hooks(model.get_parameter(made.name))
    return is_plain


def _has_hooks(parameter: torch.Tensor) -> bool:
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))
