"""Seconds and bytes as people write and read them."""
from __future__ import annotations

import argparse
import math
import re


def format_seconds(value: float) -> str:
    """Seconds for people: 3 figures with a unit."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g} s"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def format_bytes(value: float) -> str:
    """Bytes for people, in powers of ten."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:g} B"

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15,
         "ki": 2.0 ** 10, "mi": 2.0 ** 20, "gi": 2.0 ** 30, "ti": 2.0 ** 40, "pi": 2.0 ** 50}
TIMES = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
NUMBER = r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*"


def parse_size(text: str) -> float:
    """Bytes from ``"80GB"``, ``"16 GiB"``, ``"1e9"`` or ``"102,297,600 bytes"``."""
    match = re.fullmatch(NUMBER + r"(?:([kmgtp]i?)?b?|bytes)\s*", re.sub(r"(?<=\d),(?=\d{3})", "", text.lower()))
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; try 80GB, 16GiB or a number of bytes")
    return float(match[1]) * UNITS[match[2] or ""]


def parse_rate(text: str) -> float | None:
    """Bytes per second from ``"25GB/s"`` or ``"2.5e10"``; None for ``"inf"``."""
    if text.strip().lower() in ("inf", "none"):
        return None
    match = re.fullmatch(r"(.*?)(?:/\s*s)?\s*", text.lower())
    try:
        rate = parse_size(match[1] if match else text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate; try 25GB/s or a number of bytes per second") from None
    if not rate > 0:
        raise argparse.ArgumentTypeError(f"a link of {text!r} moves nothing; try 25GB/s")
    return rate


def parse_seconds(text: str) -> float:
    """Seconds from ``"5us"`` or ``"5e-6"``."""
    match = re.fullmatch(NUMBER + "(s|ms|us|ns)?" + r"\s*", text.lower())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; try 5us or a number of seconds")
    return float(match[1]) * TIMES[match[2] or ""]
