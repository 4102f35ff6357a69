"""Pipeline-parallel training of unmodified PyTorch models.

Names that need torch load it on first use: planning a JSON graph and simulating a schedule never do.
"""
from __future__ import annotations

import importlib

from partitioners import Boundary, Plan, partition
from pipeengine.errors import (
    CaptureError, GraphError, InfeasibleError, InputError, PartitionError, PipeEngineError, PlanError, ScheduleError,
    WorkerError)

_LATER = {"Pipeline": "pipeline", "capture": "capturing", "profile": "profiling", "simulate": "timeline", "Recording": "recording",
          "Timeline": "timeline", "Costs": "timeline", "Schedule": "schedules.form", "Program": "program", "lower": "program",
          "build": "schedules", "DeviceDescription": "costs"}

__all__ = ["Boundary", "CaptureError", "GraphError", "InfeasibleError", "InputError", "PartitionError", "PipeEngineError",
           "Plan", "PlanError", "ScheduleError", "WorkerError", "partition", *_LATER]


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module 'pipeengine' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pipeengine.{_LATER[name]}"), name)
