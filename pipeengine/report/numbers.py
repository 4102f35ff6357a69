"""Numbers for people."""
from __future__ import annotations

import numpy as np


def size_text(number: float) -> str:
    """Bytes for people: three digits and a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(number) < 999.5:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.4g} TB"


def count_text(number: float) -> str:
    """A count for people: three digits and k, M or G."""
    for unit in ("", " k", " M"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:,.3g} G"


def seconds_text(seconds: float) -> str:
    """Seconds with three significant digits, never an exponent."""
    digits = 3 if seconds <= 0 else int(np.clip(2 - np.floor(np.log10(seconds)), 0, 7))
    return f"{seconds:.{digits}f}"
