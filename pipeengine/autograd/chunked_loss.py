"""Cross-entropy of a linear layer without the logits of all rows: a few rows at a time, and again in backward."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from pipeengine.errors import InputError

_REDUCTIONS = ("mean", "sum", "none")
_CHUNK_ROWS = 1024      # enough rows for matrix products at full speed, of any vocabulary


def chunked_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *,
                          bias: torch.Tensor | None = None, ignore_index: int = -100, reduction: str = "mean",
                          label_smoothing: float = 0.0, chunk_rows: int = _CHUNK_ROWS) -> torch.Tensor:
    """``cross_entropy(linear(hidden, weight, bias), targets, ...)`` that never holds more than ``chunk_rows`` rows of
    logits.

    ``hidden`` is (..., features), ``weight`` (classes, features), ``targets`` (...) of class numbers. Loss and
    gradients are the same to rounding; logits in half precision are taken to float32 first, and so is the loss. It
    costs one more product of ``hidden`` with ``weight``, in backward; nothing but a number per row is kept for that.
    Raises ``InputError`` for shapes that do not fit.
    """
    if reduction not in _REDUCTIONS:
        raise InputError(f"reduction is {reduction!r}; give one of {', '.join(_REDUCTIONS)}")
    if chunk_rows < 1:
        raise InputError(f"chunk_rows is {chunk_rows}; give at least 1 row")
    if not 0 <= label_smoothing <= 1:
        raise InputError(f"label_smoothing is {label_smoothing}; give a share between 0 and 1")
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1] \
            or bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"hidden of shape {tuple(hidden.shape)} does not fit a weight of shape {tuple(weight.shape)}"
                         + ("" if bias is None else f" and a bias of shape {tuple(bias.shape)}")
                         + "; give (..., features), (classes, features) and (classes,)")
    if targets.shape != hidden.shape[:-1] or targets.is_floating_point():
        raise InputError(f"targets of shape {tuple(targets.shape)} and {targets.dtype} do not fit hidden of shape "
                         f"{tuple(hidden.shape)}; give one class number for each of its rows")
    rows = hidden.reshape(-1, hidden.shape[-1])
    losses = RowLosses.apply(rows, weight, bias, targets.reshape(-1), ignore_index, label_smoothing, chunk_rows)
    if reduction == "none":
        return losses.view(targets.shape)
    # As torch functions of the recording, these say what the loss of a micro-batch is divided by.
    return losses.sum() if reduction == "sum" else losses.sum() / (targets != ignore_index).sum()


class RowLosses(torch.autograd.Function):
    """The loss of every row, 0 where its target is ignored. Backward makes the logits again, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor,
                ignore_index: int, smoothing: float, chunk_rows: int) -> torch.Tensor:
        """Losses (rows,), in float32 for half precision."""
        device = rows.device.type
        ctx.autocast = device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        ctx.settings = ignore_index, smoothing, chunk_rows
        precise = torch.promote_types(rows.dtype, torch.float32)
        losses, norms = (torch.empty(len(rows), dtype=precise, device=rows.device) for _ in range(2))
        for part in _chunks(len(rows), chunk_rows):
            logits = _logits(ctx.autocast, rows[part], weight, bias)
            norms[part] = logits.logsumexp(1)
            chosen = logits.gather(1, _valid(targets[part], ignore_index)[:, None])[:, 0]
            losses[part] = norms[part] - (1 - smoothing) * chosen
            if smoothing:
                losses[part] -= smoothing * logits.mean(1)
            del logits          # before the next ones are made
        ctx.save_for_backward(rows, weight, bias, targets, norms)
        return losses.masked_fill_(targets == ignore_index, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of rows, weight and bias, each only where it is wanted."""
        rows, weight, bias, targets, norms = ctx.saved_tensors
        ignore_index, smoothing, chunk_rows = ctx.settings
        gradient = gradient.masked_fill(targets == ignore_index, 0)
        wants_rows, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        of_rows = torch.empty_like(rows) if wants_rows else None
        # A sum of many chunks in half precision would lose what one product does not.
        of_weight, of_bias = (torch.zeros_like(one, dtype=norms.dtype) if wanted else None
                              for one, wanted in ((weight, wants_weight), (bias, wants_bias)))
        for part in _chunks(len(rows), chunk_rows):
            share = _logits(ctx.autocast, rows[part], weight, bias)
            share.sub_(norms[part, None]).exp_()
            if smoothing:
                share -= smoothing / share.shape[1]
            chosen = _valid(targets[part], ignore_index)[:, None]
            share.scatter_add_(1, chosen, torch.full_like(chosen, smoothing - 1, dtype=share.dtype))
            share *= gradient[part, None]
            if of_bias is not None:
                of_bias += share.sum(0)
            share = share.to(_multiplied(ctx.autocast, weight.dtype))
            if of_rows is not None:
                of_rows[part] = share @ weight.to(share.dtype)
            if of_weight is not None:
                _add_product(of_weight, share, rows[part].to(share.dtype))
            del share
        return (of_rows, None if of_weight is None else of_weight.to(weight.dtype),
                None if of_bias is None else of_bias.to(bias.dtype), None, None, None, None)


def _chunks(num_rows: int, chunk_rows: int) -> Iterator[slice]:
    return (slice(start, start + chunk_rows) for start in range(0, num_rows, chunk_rows))


def _valid(targets: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Some class for ignored targets too: what is read there counts for nothing."""
    return targets.masked_fill(targets == ignore_index, 0)


def _logits(autocast: tuple[str, bool, torch.dtype], rows: torch.Tensor, weight: torch.Tensor,
            bias: torch.Tensor | None) -> torch.Tensor:
    """Logits in at least float32, of products in the precision that autocast asked for in forward."""
    device, enabled, kind = autocast
    with torch.autocast(device, kind, enabled):
        logits = torch.nn.functional.linear(rows, weight, bias)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _multiplied(autocast: tuple[str, bool, torch.dtype], kind: torch.dtype) -> torch.dtype:
    """The precision of products with a weight of type ``kind``."""
    return autocast[2] if autocast[1] and kind != torch.float64 else kind


def _add_product(total: torch.Tensor, share: torch.Tensor, rows: torch.Tensor) -> None:
    if share.dtype == total.dtype:
        total.addmm_(share.T, rows)         # without room for the product
    else:
        total += share.T @ rows
