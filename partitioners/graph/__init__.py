"""Cost graphs in, checked: nodes with seconds and bytes, the devices they may run on, other people's formats."""

from partitioners.graph.blocks import Block, blocks_of
from partitioners.graph.cost_graph import Node, check, digest, seconds, topological_order
from partitioners.graph.devices import MASTER, OPTIMIZER_STATES, Cluster, Device, Link, MemoryModel, parameter_factor
from partitioners.graph.formats import FORMAT, WORKLOAD, from_json, read_pipedream, read_workload, to_json

__all__ = [
    "Block",
    "Cluster",
    "Device",
    "FORMAT",
    "Link",
    "MASTER",
    "MemoryModel",
    "Node",
    "OPTIMIZER_STATES",
    "WORKLOAD",
    "blocks_of",
    "check",
    "digest",
    "from_json",
    "parameter_factor",
    "read_pipedream",
    "read_workload",
    "seconds",
    "to_json",
    "topological_order",
]
