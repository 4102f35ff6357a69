"""Pipeline-parallel training of unmodified PyTorch models.

Names that need torch load it on first use: planning a JSON graph and simulating a schedule never do.
"""
from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from partitioners import Boundary, Plan, partition
from pipeengine.errors import (
    CaptureError,
    GraphError,
    InfeasibleError,
    InputError,
    PartitionError,
    PipeEngineError,
    PlanError,
    ScheduleError,
    WorkerError,
)

if TYPE_CHECKING:
    from pipeengine.autograd import chunked_cross_entropy
    from pipeengine.checkpoint import Checkpoints
    from pipeengine.costs import DeviceDescription, profile
    from pipeengine.data import PackedDataset, ResumableLoader, ShuffledSampler, TokenDataset
    from pipeengine.exploration import Search, search
    from pipeengine.pipeline import Pipeline
    from pipeengine.program import Program, lower
    from pipeengine.run import Run
    from pipeengine.runtime import keep_master_weights
    from pipeengine.schedules import Schedule
    from pipeengine.simulation import Costs, Timeline, simulate
    from pipeengine.synthesis import build
    from pipeengine.tracing import Recording, capture

_LATER = {
    "Checkpoints": "checkpoint",
    "Costs": "simulation",
    "DeviceDescription": "costs",
    "PackedDataset": "data",
    "Pipeline": "pipeline",
    "Program": "program",
    "Recording": "tracing",
    "ResumableLoader": "data",
    "Run": "run",
    "Schedule": "schedules",
    "Search": "exploration",
    "ShuffledSampler": "data",
    "Timeline": "simulation",
    "TokenDataset": "data",
    "build": "synthesis",
    "capture": "tracing",
    "chunked_cross_entropy": "autograd",
    "keep_master_weights": "runtime",
    "lower": "program",
    "profile": "costs",
    "search": "exploration",
    "simulate": "simulation",
}

__all__ = [
    "Boundary",
    "CaptureError",
    "Checkpoints",
    "Costs",
    "DeviceDescription",
    "GraphError",
    "InfeasibleError",
    "InputError",
    "PackedDataset",
    "PartitionError",
    "PipeEngineError",
    "Pipeline",
    "Plan",
    "PlanError",
    "Program",
    "Recording",
    "ResumableLoader",
    "Run",
    "Schedule",
    "ScheduleError",
    "Search",
    "ShuffledSampler",
    "Timeline",
    "TokenDataset",
    "WorkerError",
    "build",
    "capture",
    "chunked_cross_entropy",
    "keep_master_weights",
    "lower",
    "partition",
    "profile",
    "search",
    "simulate",
]

try:
    __version__ = version("pipeengine")
except PackageNotFoundError:            # run from a folder that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module 'pipeengine' has no attribute {name!r}")
    if _LATER[name] == "simulation":
        importlib.import_module("pipeengine.report")        # which shows timelines in notebooks
    return getattr(importlib.import_module(f"pipeengine.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    own = {name for name, value in globals().items() if getattr(value, "__package__", "").startswith("pipeengine")}
    return sorted({*__all__, *own, *(name for name in globals() if name.startswith("__"))})
