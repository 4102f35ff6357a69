"""Optimal pipeline stages from a cost graph; networkx and numpy only."""
from partitioners.chains import split_sequence
from partitioners.devices import Cluster, Device, Link, MemoryModel
from partitioners.draw import draw
from partitioners.errors import GraphError, InfeasibleError, PartitionError, PipeEngineError, PlanError
from partitioners.explain import explain
from partitioners.graph import check, digest, from_json, read_pipedream, read_workload, to_json
from partitioners.plan import Boundary, Plan, Setting, StageCost, Tie
from partitioners.solve import partition
from partitioners.verify import verify

__all__ = ["Boundary", "Cluster", "Device", "GraphError", "InfeasibleError", "Link", "MemoryModel", "PartitionError",
           "PipeEngineError", "Plan", "PlanError", "Setting", "StageCost", "Tie", "check", "digest", "draw", "explain",
           "from_json", "partition", "read_pipedream", "read_workload", "split_sequence", "to_json", "verify"]
