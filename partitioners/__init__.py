"""Optimal pipeline stages from a cost graph; networkx and numpy only."""
from partitioners.errors import GraphError, InfeasibleError, PartitionError, PipeEngineError, PlanError
from partitioners.graph import (
           Cluster,
           Device,
           Link,
           MemoryModel,
           check,
           digest,
           from_json,
           read_pipedream,
           read_workload,
           to_json,
)
from partitioners.partitioning import partition
from partitioners.plan import Boundary, Plan, Setting, StageCost, Tie, verify
from partitioners.reporting import draw, explain
from partitioners.solvers import split_sequence

__all__ = ["Boundary", "Cluster", "Device", "GraphError", "InfeasibleError", "Link", "MemoryModel", "PartitionError",
           "PipeEngineError", "Plan", "PlanError", "Setting", "StageCost", "Tie", "check", "digest", "draw", "explain",
           "from_json", "partition", "read_pipedream", "read_workload", "split_sequence", "to_json", "verify"]
