"""A number that tells tensors apart, of every byte: one changed value is always seen."""
from __future__ import annotations

import hashlib
from functools import cache

import numpy as np
import torch

_WIDTH = 1 << 14        # words of one run; 128 KiB, which stays in a core's cache
_MIX = 0x9E3779B97F4A7C15


def checksum(tensor: torch.Tensor) -> int:
    """64 bits over the values' bytes, the same wherever the tensor lies; computed on its device, copied nowhere else.

    Words of eight bytes times odd numbers, added up modulo 2^64: any change of one word changes the sum, and changes of
    several cancel with a chance of about 2^-64.
    """
    flat = tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat.resolve_conj()).reshape(-1)
    raw = flat.contiguous().view(torch.uint8)
    size = raw.numel()
    whole = size // 8 * 8
    total = _sum(raw[:whole].view(torch.int64)) if raw.data_ptr() % 8 == 0 else _sum(raw[:whole].clone().view(
        torch.int64))
    rest = int.from_bytes(bytes(raw[whole:].tolist()), "little") * 3
    return (total + rest + size * _MIX) % (1 << 64)


def combine(text: str, sums: list[int]) -> int:
    """32 bits of a text and of the sums of tensors, in order."""
    data = text.encode() + b"".join(value.to_bytes(8, "little") for value in sums)
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "little")


def _sum(words: torch.Tensor) -> int:
    """The sum of words times odd numbers, modulo 2^64."""
    total, position = 0, 0
    weights = _weights(words.device)
    for part in torch.split(words, _WIDTH * 1024):
        runs = part.numel() // _WIDTH
        sums = _weighted(part[:runs * _WIDTH].view(runs, _WIDTH), weights).tolist() if runs else []
        rest = part[runs * _WIDTH:]
        if rest.numel():
            sums += _weighted(rest.view(1, -1), weights[:rest.numel()]).tolist()
        for value in sums:
            position += 1
            total += value * (2 * position * _MIX + 1)
    return total % (1 << 64)


@cache
def _weights(device: torch.device) -> torch.Tensor:
    """An odd number for each word of a run; the same for all of them, and made once: small batches come often."""
    return torch.arange(1, 2 * _WIDTH, 2, dtype=torch.int64, device=device) * (_MIX - (1 << 64))


def _weighted(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor | np.ndarray:
    """The weighted sum of every row, wrapping around; numpy's loop keeps no copy of the products."""
    if rows.device.type == "cpu":
        return np.einsum("ij,j->i", rows.numpy(), weights.numpy())
    return (rows * weights).sum(1)
