"""The errors, as one tree.

PipeEngineError
├── GraphError          a cost graph that is not one (also ValueError)
├── PlanError           a plan that does not fit, or a file that is no plan (also ValueError)
└── PartitionError      no partition as asked
    └── InfeasibleError     no partition at all within the limits
"""


class PipeEngineError(Exception):
    """Base of every error that this project raises on purpose."""


class GraphError(PipeEngineError, ValueError):
    """The cost graph is malformed; the message names the node and the attribute."""


class PlanError(PipeEngineError, ValueError):
    """The plan does not fit its graph or model, or the file holds no plan."""


class PartitionError(PipeEngineError):
    """No partition as asked for."""


class InfeasibleError(PartitionError):
    """No partition within the limits; the message says what would do."""


def exit_status(error: Exception) -> int:
    """What a command exits with: 3 where the question has no answer, 2 where it was not asked well."""
    return 3 if isinstance(error, PartitionError) else 2
