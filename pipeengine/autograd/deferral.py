"""The weight half of backward, put off: layers whose weight gradients wait until they are asked for.

In a schedule that splits backward into I (input gradients) and W (weight gradients), the stage calls these in the
place of the user's linear layers, convolutions and embeddings. Backward computes what earlier stages wait for and
queues the rest; ``run`` does it. What the queue keeps are the layer's input, which backward has kept anyway, and the
gradient of its output (Zero Bubble, Qi et al., ICLR 2024). Every other layer has its weight gradients computed in I:
right for every model, only less is put off.
"""
from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable

import torch

Queue = deque[tuple[tuple[torch.Tensor, ...], Callable[[], tuple[torch.Tensor, ...]]]]
"""Parameters, and what computes their gradients, in the order of backward."""


class Deferral:
    """Holds the queue of the micro-batch whose forward is running."""

    def __init__(self) -> None:
        self.queue: Queue = deque()
        # Parameters stand outside the graph, so that nothing of theirs happens before W. This one asks for it.
        self._anchor = torch.empty(0, requires_grad=True)

    def begin(self) -> Queue:
        """A new queue for the next forward."""
        self.queue = deque()
        return self.queue

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``torch.nn.functional.linear``: ``x`` (..., in), ``weight`` (out, in), ``bias`` (out,) give (..., out)."""
        return _Linear.apply(x, self._anchor, _trained(weight, bias), self.queue)

    def addmm(self, bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``torch.addmm``: ``bias`` (out,), ``x`` (rows, in) and ``weight`` (in, out) give (rows, out)."""
        return _Addmm.apply(x, self._anchor, (weight, bias), self.queue)

    def convolution(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                    *settings: object) -> torch.Tensor:
        """``torch.convolution``; ``settings`` are its arguments after the bias."""
        return _Convolution.apply(x, self._anchor, _trained(weight, bias), settings, self.queue)

    def embedding(self, indices: torch.Tensor, weight: torch.Tensor, padding_idx: int, scale: bool) -> torch.Tensor:
        """A row of ``weight`` per index."""
        return _Embedding.apply(self._anchor, indices, (weight,), padding_idx, scale, self.queue)

    def autocast(self, method: str, *given: object) -> torch.Tensor:
        """``method`` where autocast would cast its inputs; weights are cast inside, and their gradients back."""
        return getattr(self, method)(*(_cast(one) if _is_activation(one) else one for one in given))


def _is_activation(argument: object) -> bool:
    return isinstance(argument, torch.Tensor) and not isinstance(argument, torch.nn.Parameter)


def _cast(x: torch.Tensor) -> torch.Tensor:
    kind = x.device.type
    wanted = torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(kind)) if wanted else x


def run(queue: Queue) -> None:
    """Compute and accumulate the weight gradients that were put off, letting go of what each needed.

    As in a fused backward, the gradients of a parameter that is used several times are added up before they are
    accumulated.
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

        def later() -> tuple[torch.Tensor, ...]:
            return (torch.ops.aten.embedding_dense_backward(gradient, indices, trained[0].shape[0], *settings),)
        ctx.queue.append((trained, later))
        return None, None, None, None, None, None
