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
    whole, on_cpu = size // 8 * 8, raw.device.type == "cpu"
    sums = _sums_on_cpu(raw.numpy()[:whole].view(np.int64)) if on_cpu else _sums(raw[:whole])
    total = sum(value * (2 * position * _MIX + 1) for position, value in enumerate(sums, 1))
    rest = int.from_bytes(bytes(raw[whole:].tolist()), "little") * 3 if whole < size else 0
    return (total + rest + size * _MIX) % (1 << 64)


def combine(text: str, sums: list[int]) -> int:
    """32 bits of a text and of the sums of tensors, in order."""
    data = text.encode() + b"".join(value.to_bytes(8, "little") for value in sums)
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "little")


def _sums_on_cpu(words: np.ndarray) -> list[int]:
    """Of every run, its words times odd numbers, added up with wrap-around; numpy's loop keeps no copy of the
    products."""
    weights, full = _weights_on_cpu(), len(words) // _WIDTH * _WIDTH
    sums = np.einsum("ij,j->i", words[:full].reshape(-1, _WIDTH), weights).tolist() if full else []
    rest = words[full:]
    return [*sums, int(np.dot(rest, weights[:len(rest)]))] if len(rest) else sums


def _sums(raw: torch.Tensor) -> list[int]:
    """The same on an accelerator, a few megabytes at a time."""
    aligned = raw if raw.data_ptr() % 8 == 0 else raw.clone()
    weights, sums = _weights(raw.device), []
    for part in torch.split(aligned.view(torch.int64), _WIDTH * 64):
        runs = part.numel() // _WIDTH
        sums += (part[:runs * _WIDTH].view(runs, _WIDTH) * weights).sum(1).tolist() if runs else []
        rest = part[runs * _WIDTH:]
        sums += [int((rest * weights[:rest.numel()]).sum())] if rest.numel() else []
    return sums


@cache
def _weights_on_cpu() -> np.ndarray:
    """An odd number for each word of a run; the same for all of them, and made once: small batches come often."""
    return _weights(torch.device("cpu")).numpy()


@cache
def _weights(device: torch.device) -> torch.Tensor:
    return torch.arange(1, 2 * _WIDTH, 2, dtype=torch.int64, device=device) * (_MIX - (1 << 64))
