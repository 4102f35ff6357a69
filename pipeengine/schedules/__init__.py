"""Schedules as data: per worker, the order in which it runs its actions. No torch.

A schedule is one function of the numbers of workers and micro-batches, and one line in ``PUBLISHED``.
"""
from pipeengine.schedules.linear import forward_schedule, gpipe, one_f_one_b
from pipeengine.schedules.published import PUBLISHED, call_schedule
from pipeengine.schedules.schedule import LETTERS, NOT_ACTIONS, B, Edge, F, I, InLanes, Lane, Schedule, Topology, W

__all__ = ["B", "Edge", "F", "I", "InLanes", "LETTERS", "Lane", "NOT_ACTIONS", "PUBLISHED", "Schedule", "Topology", "W",
           "call_schedule", "forward_schedule", "gpipe", "one_f_one_b"]
