"""What the operators below a node do: FLOPs, bytes moved, use of random numbers."""
from __future__ import annotations

import torch
from torch.utils.flop_counter import flop_registry

from pipeengine.torch_private import TorchDispatchMode, argument_of, cpu_attention, storage_number


class Meter(TorchDispatchMode):
    """Counts what the operators below a node do: FLOPs, bytes moved, use of random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        """Count from zero again: floating-point operations, bytes moved, whether random numbers were drawn, the bytes
        of every storage made."""
        self.flops, self.bytes, self.random = 0, 0, False
        self.made: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # Attention has the tag for its dropout; without any it draws nothing.
        if torch.Tag.nondeterministic_seeded in func.tags and \
                argument_of(func, "dropout_p", args, kwargs or {}) != 0.0:
            self.random = True
        count = flop_registry.get(func.overloadpacket) or _CPU_ATTENTION.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        results = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)]
        if results and not func.is_view:            # to ask a fake for its device is an operator too, and moves nothing
            read = [t for t in args if isinstance(t, torch.Tensor)]
            self.bytes += sum(map(tensor_bytes, read)) + sum(map(tensor_bytes, results))
            for result in results:
                storage = storage_number(result)
                self.made[storage] = max(self.made.get(storage, 0), kept_bytes(result))
        return out


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the elements of ``tensor``."""
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
_CPU_ATTENTION = {cpu_attention: _attention_flops}
