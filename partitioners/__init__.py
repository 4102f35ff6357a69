"""Optimal pipeline stages from a cost graph; networkx and numpy only."""
from partitioners.errors import GraphError, InfeasibleError, PartitionError, PipeEngineError, PlanError

__all__ = ["GraphError", "InfeasibleError", "PartitionError", "PipeEngineError", "PlanError"]
