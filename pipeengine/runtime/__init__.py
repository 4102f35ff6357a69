"""A batch goes in, a loss comes out: which actions a worker runs, and the one executor that runs them."""
from pipeengine.runtime.executor import Executor, Task
from pipeengine.runtime.outputs import merge_outputs
from pipeengine.runtime.programs import ProgramCache

__all__ = ["Executor", "ProgramCache", "Task", "merge_outputs"]
