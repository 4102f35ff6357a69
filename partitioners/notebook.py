"""What a notebook shows of a value: types ask here, and the rooms further down that can draw them have said how."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
_DRAWN: dict[type, Callable[[Any], str]] = {}


def shown_by(kind: type[T], draw: Callable[[T], str]) -> None:
    """From now on values of ``kind`` are shown as the HTML that ``draw`` makes of them."""
    _DRAWN[kind] = draw


def html_of(value: object) -> str | None:
    """``value`` as HTML; None, so that a notebook shows its ``repr``, where nobody has said how."""
    draw = _DRAWN.get(type(value))
    return None if draw is None else draw(value)
