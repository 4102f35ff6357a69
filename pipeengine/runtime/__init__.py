"""A batch goes in, a loss comes out: which actions a worker runs, and the one executor that runs them."""
from pipeengine.runtime.executor import Executor, Task
from pipeengine.runtime.outputs import merge_outputs
from pipeengine.runtime.programs import Orders

__all__ = ["Executor", "Orders", "Task", "merge_outputs"]
