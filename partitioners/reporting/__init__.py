"""A plan goes in, a picture, an explanation or the answer of a command comes out."""

from partitioners.notebook import shown_by
from partitioners.plan import Plan
from partitioners.reporting.drawing import draw, ends
from partitioners.reporting.explanation import explain

shown_by(Plan, draw)

__all__ = ["draw", "ends", "explain"]
