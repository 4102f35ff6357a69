"""The weight half of backward, put off: layers whose weight gradients wait until they are asked for.

In a schedule that splits backward into I (input gradients) and W (weight gradients), the stage calls these in the place of the
user's linear layers, convolutions and embeddings. Backward computes what earlier stages wait for and queues the rest; ``run``
does it. What the queue keeps are the layer's input, which backward has kept anyway, and the gradient of its output (Zero
Bubble, Qi et al., ICLR 2024). Every other layer has its weight gradients computed in I: right for every model, only less is put
off.
"""
from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping

import torch

from pipeengine.recording import Node, Recording, Ref, node_refs

Queue = deque[tuple[tuple[torch.Tensor, ...], Callable[[], tuple[torch.Tensor, ...]]]]
"""Parameters, and what computes their gradients, in the order of backward."""


class Deferral:
    """Holds the queue of the micro-batch whose forward is running."""

    def __init__(self) -> None:
        self.queue: Queue = deque()
        # Parameters stand outside the graph, so that nothing of theirs happens before W. This asks for backward in their place.
        self._anchor = torch.empty(0, requires_grad=True)

    def begin(self) -> Queue:
        """A new queue for the next forward."""
        self.queue = deque()
        return self.queue

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``torch.nn.functional.linear``; ``weight`` is (out, in)."""
        return _Linear.apply(x, self._anchor, _trained(weight, bias), self.queue)

    def addmm(self, bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``torch.addmm``; ``weight`` is (in, out)."""
        return _Addmm.apply(x, self._anchor, (weight, bias), self.queue)

    def convolution(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *settings: object) -> torch.Tensor:
        """``torch.convolution``; ``settings`` are its arguments after the bias."""
        return _Convolution.apply(x, self._anchor, _trained(weight, bias), settings, self.queue)

    def embedding(self, indices: torch.Tensor, weight: torch.Tensor, padding_idx: int, scale: bool) -> torch.Tensor:
        """A row of ``weight`` per index."""
        return _Embedding.apply(self._anchor, indices, (weight,), padding_idx, scale, self.queue)

    def autocast(self, method: str, *given: object) -> torch.Tensor:
        """``method`` where autocast would cast its inputs; weights are cast inside, and their gradients back."""
        return getattr(self, method)(*(_cast(one) if isinstance(one, torch.Tensor) and not isinstance(one, torch.nn.Parameter)
                                       else one for one in given))


def _cast(x: torch.Tensor) -> torch.Tensor:
    kind = x.device.type
    wanted = torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(kind)) if wanted else x


def run(queue: Queue) -> None:
    """Compute and accumulate the weight gradients that were put off, letting go of what each needed.

    As in a fused backward, the gradients of a parameter that is used several times are added up before they are accumulated.
    """
    left = Counter(id(parameter) for parameters, _ in queue for parameter in parameters)
    sums: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        while queue:
            parameters, compute = queue.popleft()
            for parameter, gradient in zip(parameters, compute()):
                key, gradient = id(parameter), gradient.to(parameter.dtype)
                left[key] -= 1
                if key in sums:
                    gradient = sums.pop(key) + gradient
                if left[key]:
                    sums[key] = gradient
                else:
                    _accumulate(parameter, gradient)


def _accumulate(parameter: torch.Tensor, gradient: torch.Tensor) -> None:
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        with torch.enable_grad():
            torch.autograd.backward(parameter, gradient)        # which calls them
    elif parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad += gradient


def _trained(weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    return (weight,) if bias is None else (weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, anchor, trained, queue):
        ctx.save_for_backward(x, trained[0])
        ctx.trained, ctx.queue = trained, queue
        return torch.nn.functional.linear(x, *trained)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        rows, trained = gradient.reshape(-1, gradient.shape[-1]), ctx.trained

        def later() -> tuple[torch.Tensor, ...]:
            made = rows.t().mm(x.reshape(-1, x.shape[-1]))
            return (made,) if len(trained) == 1 else (made, rows.sum(0))
        ctx.queue.append((trained, later))
        return rows.mm(weight.to(rows.dtype)).view(x.shape) if ctx.needs_input_grad[0] else None, None, None, None


class _Addmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, anchor, trained, queue):
        ctx.save_for_backward(x, trained[0])
        ctx.trained, ctx.queue = trained, queue
        return torch.addmm(trained[1], x, trained[0])

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        ctx.queue.append((ctx.trained, lambda: (x.t().mm(gradient), gradient.sum(0))))
        return gradient.mm(weight.to(gradient.dtype).t()) if ctx.needs_input_grad[0] else None, None, None, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, anchor, trained, settings, queue):
        ctx.save_for_backward(x, trained[0])
        ctx.trained, ctx.settings, ctx.queue = trained, settings, queue
        weight, *bias = (parameter.to(x.dtype) for parameter in trained)
        return torch.convolution(x, weight, bias[0] if bias else None, *settings)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        settings, trained = ctx.settings, ctx.trained
        weight = weight.to(x.dtype)
        transposed, groups = settings[3], settings[5]
        sizes = None if len(trained) == 1 else [weight.shape[1] * groups if transposed else weight.shape[0]]

        def half(*wanted: bool) -> tuple[torch.Tensor, ...]:
            return torch.ops.aten.convolution_backward(gradient, x, weight, sizes, *settings, wanted)
        ctx.queue.append((trained, lambda: half(False, True, len(trained) > 1)[1:]))
        return half(True, False, False)[0] if ctx.needs_input_grad[0] else None, None, None, None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, indices, trained, padding_idx, scale, queue):
        ctx.trained, ctx.indices, ctx.settings, ctx.queue = trained, indices, (padding_idx, scale), queue
        return torch.nn.functional.embedding(indices, trained[0], padding_idx if padding_idx >= 0 else None,
                                             scale_grad_by_freq=scale)

    @staticmethod
    def backward(ctx, gradient):
        trained, indices, settings = ctx.trained, ctx.indices, ctx.settings
        ctx.queue.append((trained, lambda: (torch.ops.aten.embedding_dense_backward(gradient, indices, trained[0].shape[0],
                                                                                    *settings),)))
        return None, None, None, None, None, None


Replacement = tuple[str, tuple]
"""A method of ``Deferral``, and its arguments (with Refs)."""


def put_off(recording: Recording, model: torch.nn.Module) -> dict[int, Replacement]:
    """What stands in for which nodes, by the value they make.

    A parameter that some other node reads too has all its gradients computed in I: summed and accumulated at once.
    """
    found = {index: made for index, node in enumerate(recording.nodes)
             if (made := _replacement(node, recording, model)) is not None}
    while True:
        elsewhere = {v for index, node in enumerate(recording.nodes) if index not in found and _needs_gradient(node, recording)
                     for v in _parameters(node, recording)}
        kept = {index: made for index, made in found.items() if not elsewhere & _parameters(recording.nodes[index], recording)}
        if len(kept) == len(found):
            return {recording.nodes[index].results[0]: made for index, made in kept.items()}
        found = kept


def _parameters(node: Node, recording: Recording) -> set[int]:
    return {v for v in node_refs(node) if recording.values[v].kind == "attribute" and recording.values[v].spec.requires_grad}


def _needs_gradient(node: Node, recording: Recording) -> bool:
    return any(recording.values[v].spec.requires_grad for v in node.results)


def _replacement(node: Node, recording: Recording, model: torch.nn.Module) -> Replacement | None:
    if not node.modes.grad or node.modes.inference or node.recompute or node.random or node.kwargs:
        return None
    made = _layer(node, recording, model)
    if made is None or not node.modes.autocast or made[0] == "embedding":
        return made
    return ("autocast", (made[0], *made[1])) if _is_cast_once(node, recording) else None


def _is_cast_once(node: Node, recording: Recording) -> bool:
    """Under autocast, gradients of a weight that is read twice are added up in the lower precision: those are left alone."""
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
    made = recording.values[argument.value] if isinstance(argument, Ref) else None
    return made is not None and made.kind == "attribute" and made.spec.requires_grad and len(made.spec.shape) == num_axes


def _module_replacement(node: Node, recording: Recording, model: torch.nn.Module) -> Replacement | None:
    module = model.get_submodule(node.target)
    make = _MODULES.get(type(module))
    if make is None or node.target in recording.sealed or "forward" in vars(module) or len(node.args) != 1:
        return None
    refs = {id(model.get_parameter(recording.values[v].name)): Ref(v) for v in _parameters(node, recording)}
    at = {name: refs.get(id(p)) for name, p in module._parameters.items() if p is not None}
    return None if None in at.values() else make(module, node.args[0], at["weight"], at.get("bias"))


def _linear(module: torch.nn.Linear, x: Ref, weight: Ref, bias: Ref | None) -> Replacement:
    return "linear", (x, weight, bias)


def _embedding(module: torch.nn.Embedding, x: Ref, weight: Ref, bias: None) -> Replacement | None:
    padding = -1 if module.padding_idx is None else module.padding_idx
    return None if module.sparse or module.max_norm is not None else ("embedding", (x, weight, padding, module.scale_grad_by_freq))


def _convolution(module: torch.nn.modules.conv._ConvNd, x: Ref, weight: Ref, bias: Ref | None) -> Replacement | None:
    padding = _padding(module)
    if module.padding_mode != "zeros" or padding is None:
        return None
    return "convolution", (x, weight, bias, module.stride, padding, module.dilation, module.transposed, module.output_padding,
                           module.groups)


def _padding(module: torch.nn.modules.conv._ConvNd) -> tuple[int, ...] | None:
    """In numbers, or None where the two sides of an axis differ."""
    if not isinstance(module.padding, str):
        return module.padding
    both = [0 if module.padding == "valid" else d * (k - 1) for d, k in zip(module.dilation, module.kernel_size)]
    return None if any(total % 2 for total in both) else tuple(total // 2 for total in both)


_MODULES: Mapping[type, Callable[..., Replacement | None]] = {
    torch.nn.Linear: _linear, torch.nn.Embedding: _embedding,
    **dict.fromkeys((torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d,
                     torch.nn.ConvTranspose3d), _convolution)}
