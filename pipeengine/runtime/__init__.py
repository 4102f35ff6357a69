"""A batch goes in, a loss comes out: which actions a worker runs, and the one executor that runs them."""

from pipeengine.runtime.clip_guard import refuse_local_clipping
from pipeengine.runtime.executor import Executor, Task
from pipeengine.runtime.gradients import Gradients, scale_of
from pipeengine.runtime.master_weights import keep_master_weights
from pipeengine.runtime.programs import ProgramCache, ScheduleChoice, splits_backward
from pipeengine.runtime.step import StepRunner
from pipeengine.runtime.tasks import BatchReader, TaskMaker

__all__ = [
    "BatchReader",
    "Executor",
    "Gradients",
    "ProgramCache",
    "ScheduleChoice",
    "StepRunner",
    "Task",
    "TaskMaker",
    "keep_master_weights",
    "refuse_local_clipping",
    "scale_of",
    "splits_backward",
]
