"""Costs go in, an order made for them comes out; and the table of all schedules by name. No torch."""

from pipeengine.synthesis.auto import auto
from pipeengine.synthesis.bound import lower_bound
from pipeengine.synthesis.problem import OBJECTIVES
from pipeengine.synthesis.registry import SCHEDULES, build, build_short, find

__all__ = ["OBJECTIVES", "SCHEDULES", "auto", "build", "build_short", "find", "lower_bound"]
