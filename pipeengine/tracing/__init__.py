"""A model goes in, a ``Recording`` comes out: one eager forward, written down as nodes that call the user's own
modules.

``capture`` records; ``analyse`` finds what depends on what. Nothing of the model is changed by either.
"""
from pipeengine.tracing.born_objects import is_cache
from pipeengine.tracing.capturing import capture
from pipeengine.tracing.dataflow import Dataflow, analyse
from pipeengine.tracing.inputs import WHOLE_LOSS, Inputs, find_loss, loss_of, needs_target, usable_loss
from pipeengine.tracing.modes import ModelFlags, Modes, current_modes, settings_digest, settings_of, switch
from pipeengine.tracing.module_state import undisturbed
from pipeengine.tracing.python_reads import PythonReads, PythonWatch
from pipeengine.tracing.pytree import leaves, tensors, tree_encode, tree_map
from pipeengine.tracing.recording import (
    Call,
    Missing,
    Node,
    NodeCost,
    Rebuilt,
    Recording,
    Ref,
    TensorSpec,
    Value,
    encoded_leaves,
    fill,
    node_refs,
    picks,
    refs,
)

__all__ = [
    "WHOLE_LOSS",
    "Call",
    "Dataflow",
    "Inputs",
    "Missing",
    "ModelFlags",
    "Modes",
    "Node",
    "NodeCost",
    "PythonReads",
    "PythonWatch",
    "Rebuilt",
    "Recording",
    "Ref",
    "TensorSpec",
    "Value",
    "analyse",
    "capture",
    "current_modes",
    "encoded_leaves",
    "fill",
    "find_loss",
    "is_cache",
    "leaves",
    "loss_of",
    "needs_target",
    "node_refs",
    "picks",
    "refs",
    "settings_digest",
    "settings_of",
    "switch",
    "tensors",
    "tree_encode",
    "tree_map",
    "undisturbed",
    "usable_loss",
]
