"""A plan goes in, a picture, an explanation or the answer of a command comes out."""

from partitioners.reporting.drawing import draw, ends
from partitioners.reporting.explanation import explain

__all__ = ["draw", "ends", "explain"]
