"""The errors of the engine, under the same root as the planner's.

PipeEngineError
├── GraphError, PlanError, PartitionError, InfeasibleError     (see partitioners.errors)
├── ScheduleError       a schedule or program that cannot run
├── CaptureError        the model cannot be recorded faithfully
├── InputError          a batch, an option or a checkpoint of the wrong kind (also ValueError)
└── WorkerError         a step that failed on some worker; the same root cause on every worker
"""
import traceback

from partitioners.errors import (
    GraphError,
    InfeasibleError,
    PartitionError,
    PipeEngineError,
    PlanError,
    exit_status,
)


class ScheduleError(PipeEngineError):
    """The schedule or program cannot run; the message shows the lines that clash."""


class CaptureError(PipeEngineError):
    """The model cannot be recorded faithfully; the message names the module and the line."""


class InputError(PipeEngineError, ValueError):
    """A batch, an option or a checkpoint of the wrong kind. The pipeline stays usable."""


class WorkerError(PipeEngineError, RuntimeError):
    """A step failed. Every worker raises the same root cause; the pipeline is closed."""


def told(error: BaseException) -> str:
    """The kind and message of an exception; of one without, such as a bare assert, the line that raised it."""
    if str(error):
        return f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__} at {frames[-1].filename}:{frames[-1].lineno}, {frames[-1].line}" if frames else \
        type(error).__name__


__all__ = ["CaptureError", "GraphError", "InfeasibleError", "InputError", "PartitionError", "PipeEngineError",
           "PlanError", "ScheduleError", "WorkerError", "exit_status", "told"]
