"""What the operators below a node do: FLOPs, bytes moved, use of random numbers."""
from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Meter(TorchDispatchMode):
    """Counts what the operators below a node do: FLOPs, bytes moved, use of random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        self.flops, self.bytes, self.random = 0, 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.random = True
        count = flop_registry.get(func.overloadpacket) or _CPU_ATTENTION.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        made = [out] if isinstance(out, torch.Tensor) else [t for t in (out or ()) if isinstance(t, torch.Tensor)] \
            if isinstance(out, (tuple, list)) else []
        if not func.is_view:
            self.bytes += sum(tensor_bytes(t) for t in args if isinstance(t, torch.Tensor)) + sum(map(tensor_bytes, made))
        return out


def tensor_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def kept_bytes(tensor: torch.Tensor) -> int:
    """What stays when ``tensor`` is kept: a view keeps all that it is a view of."""
    return tensor.untyped_storage().nbytes() if tensor.layout is torch.strided else tensor_bytes(tensor)


def _attention_flops(query, key, value, *args, out_val=None, **kwargs) -> int:
    *batch, rows, width = query.shape
    heads = 1
    for size in batch:
        heads *= size
    return 2 * heads * rows * key.shape[-2] * (width + value.shape[-1])
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
