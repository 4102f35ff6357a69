"""What ``nn.TransformerEncoder`` computes of padded rows in inference: torch packs them into a nested tensor, leaves
the padding out and fills it with zeros at the end. A nested tensor cannot be cut or sent; the same numbers can.
"""
from __future__ import annotations

from collections.abc import Callable

import torch

Ask = Callable[[Callable, tuple], object]
"""``ask(function, tensors)`` gives a Python value of real tensors, and remembers it as a guard."""


def with_zeroed_padding(original: Callable, ask: Ask, encoder: torch.nn.TransformerEncoder, src: torch.Tensor,
                        mask: torch.Tensor | None = None, src_key_padding_mask: torch.Tensor | None = None,
                        is_causal: bool | None = None) -> torch.Tensor:
    """Stands in for ``nn.TransformerEncoder.forward``, which is ``original``: layer by layer, with zeros where torch
    would have left the padding out.
    """
    zeros = src_key_padding_mask is not None and mask is None and _packs(encoder, src) \
        and (not getattr(encoder, "mask_check", True) or ask(left_aligned, (src_key_padding_mask,)))
    norm, packs = encoder._modules.get("norm"), vars(encoder).get("use_nested_tensor", False)
    vars(encoder)["use_nested_tensor"] = False
    put_back = {"norm": norm} if zeros and norm is not None else {}     # it comes after the zeros
    encoder._modules.update(dict.fromkeys(put_back))
    try:
        output = original(encoder, src, mask, src_key_padding_mask, is_causal)
    finally:
        encoder._modules.update(put_back)
        vars(encoder)["use_nested_tensor"] = packs
    if not zeros or src_key_padding_mask is None:
        return output
    output = output.masked_fill(src_key_padding_mask.bool().unsqueeze(-1), 0.0)
    return output if norm is None else norm(output)


def left_aligned(padding: torch.Tensor) -> bool:
    """Whether every row of a padding mask (rows, tokens), true or minus infinity where padded, has its padding last."""
    padded = padding.bool()
    return bool((padded[:, 1:] >= padded[:, :-1]).all())


def _packs(encoder: torch.nn.TransformerEncoder, src: torch.Tensor) -> bool:
    """Whether torch would pack, as far as modes, types and settings decide (see its ``TransformerEncoder.forward``)."""
    layer = encoder.layers[0]
    if not (torch.backends.mha.get_fastpath_enabled() and getattr(encoder, "use_nested_tensor", False)) \
            or layer.training or src.dim() != 3 or src.is_nested or torch.is_autocast_enabled():
        return False
    attention = layer.self_attn
    trained = (src, attention.in_proj_weight, attention.in_proj_bias, *attention.out_proj.parameters(),
               *layer.norm1.parameters(), *layer.norm2.parameters(), *layer.linear1.parameters(),
               *layer.linear2.parameters())
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in trained))
