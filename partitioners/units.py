"""Seconds, bytes, counts and shares as people write and read them."""
from __future__ import annotations

import argparse
import math
import re

_ROUNDS_UP = 1 - 5e-5        # of a unit: from there on four digits say a whole one


def format_seconds(value: float) -> str:
    """Seconds for people: four digits and a unit. Columns headed by a unit hold ``format_number`` of seconds."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g} s"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(value) >= size * _ROUNDS_UP:
            return f"{value / size:.4g} {unit}"
    return f"{value / 1e-9:.4g} ns"


def format_bytes(value: float) -> str:
    """Bytes for people: four digits and a unit, in powers of ten."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= size * _ROUNDS_UP:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g} B"


def format_count(value: float) -> str:
    """A large count for people: three digits and k, M or G. A count that must be exact is ``f"{count:,}"``."""
    for unit in ("", " k", " M"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:,.3g} G"


def format_share(value: float, digits: int = 1, *, signed: bool = False) -> str:
    """A share of 1 for people, in per cent with ``digits`` after the point; ``signed``: also where it is positive."""
    return f"{100 * value:{'+' if signed else ''}.{digits}f} %"


def format_number(value: float) -> str:
    """Three digits, never an exponent: for columns and axes that say the unit, and for times that have none."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.3f}"
    return f"{value:.{min(max(2 - math.floor(math.log10(abs(value))), 0), 7)}f}"


PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
            "Ki": 2.0 ** 10, "Mi": 2.0 ** 20, "Gi": 2.0 ** 30, "Ti": 2.0 ** 40, "Pi": 2.0 ** 50}
TIMES = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
NUMBER = r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*"
PREFIX = r"(|k|[KMGTP]i?)"
LEAST_MEMORY_BYTES = 1e6


def _without_commas(text: str) -> str:
    return re.sub(r"(?<=\d),(?=\d{3})", "", text)


def parse_size(text: str) -> float:
    """Bytes from ``"80GB"``, ``"16 GiB"``, ``"1e9"`` or ``"102,297,600 bytes"``.

    Raises ``ArgumentTypeError`` for bits (``"80Gb"``) and for what could be either (``"80gb"``, ``"80g"``).
    """
    match = re.fullmatch(NUMBER + PREFIX + r"(?:B|[Bb]ytes?)?\s*", _without_commas(text))
    if match:
        return float(match[1]) * PREFIXES[match[2]]
    if re.fullmatch(NUMBER + r"(?i:[kmgtp]?i?(?:b|bits?)?)\s*", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} may be bits or bytes; sizes are in bytes: 80GB is 8e10 of them, 80GiB 8.59e10"
        )
    raise argparse.ArgumentTypeError(f"{text!r} is no size; try 80GB, 16GiB or a number of bytes")


def parse_memory(text: str) -> float:
    """Bytes of a device's memory, as ``parse_size``; below a megabyte somebody has forgotten the unit, or mixed it up.

    A number of ``bytes``, in that word, is what it says: so this program writes small sizes itself.
    """
    size = parse_size(text)
    if size < LEAST_MEMORY_BYTES and not re.search(r"\bbytes?\s*$", text):
        raise argparse.ArgumentTypeError(
            f"a memory of {text!r} is {size:g} bytes, less than a megabyte; give a unit, such as {text.strip()}GB"
        )
    return size


def parse_rate(text: str) -> float | None:
    """Bytes per second from ``"25GB/s"``, ``"200Gb/s"`` (or ``Gbit/s``, ``Gbps``: bits) or ``"2.5e10"``; None for
    ``"inf"``.

    Raises ``ArgumentTypeError`` for what could be bits or bytes (``"25gb/s"``) and for a rate of 0.
    """
    if text.strip().lower() in ("inf", "none"):
        return None
    plain = _without_commas(text)
    match = re.fullmatch(NUMBER + PREFIX + r"(B|b|bits?|bytes?)?\s*(?:/\s*s|ps)?\s*", plain)
    if not match:
        if re.fullmatch(NUMBER + r"(?i:[kmgtp]i?(?:b|bits?)?\s*(?:/\s*s|ps)?)\s*", plain):
            raise argparse.ArgumentTypeError(f"{text!r} may be bits or bytes per second; 25GB/s are bytes, 200Gb/s or "
                                             "200Gbit/s are bits")
        raise argparse.ArgumentTypeError(f"{text!r} is no rate; try 25GB/s, 200Gbit/s or a number of bytes per second")
    rate = float(match[1]) * PREFIXES[match[2]] / (8 if (match[3] or "").startswith("b") and "y" not in match[3] else 1)
    if not rate > 0:
        raise argparse.ArgumentTypeError(f"a link of {text!r} moves nothing; try 25GB/s")
    return rate


def parse_flops(text: str) -> float:
    """Operations per second from ``"400T"``, ``"400 TFLOPS"``, ``"400TFLOP/s"`` or ``"4e14"``."""
    match = re.fullmatch(NUMBER + r"(|k|[KMGTP])(?i:flops?)?\s*(?:/\s*s)?\s*", _without_commas(text))
    if not match or not float(match[1]) > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of operations per second; try 400T or 400TFLOPS")
    return float(match[1]) * PREFIXES[match[2]]


def parse_seconds(text: str) -> float:
    """Seconds from ``"5us"`` or ``"5e-6"``."""
    match = re.fullmatch(NUMBER + "(s|ms|us|ns)?" + r"\s*", text.lower())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; try 5us or a number of seconds")
    return float(match[1]) * TIMES[match[2] or ""]
