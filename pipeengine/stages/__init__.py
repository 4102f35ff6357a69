"""A recording and a plan go in, stages that run come out.

Placement says which node runs where, splitting cuts, codegen writes straight-line Python, the cache remembers one set
of stages for every kind of micro-batch.
"""
from pipeengine.stages.cache import Specialization, SpecializationCache
from pipeengine.stages.full_batch import compare_two_microbatches, full_batch_loss_check
from pipeengine.stages.lookups import check_lookups
from pipeengine.stages.loss_weight import Weights, as_weights, even_weights
from pipeengine.stages.merging import Join
from pipeengine.stages.message import (
    ACTIVATION,
    GRADIENT,
    Layout,
    allocate,
    check_header,
    has_arrived,
    header,
    pack,
    unpack,
)
from pipeengine.stages.pieces import Pieces
from pipeengine.stages.placement import Placement, SettledPlacement
from pipeengine.stages.replay_check import check_recording
from pipeengine.stages.runnable import Runnable
from pipeengine.stages.shares import Shares, Totals

__all__ = [
    "ACTIVATION",
    "GRADIENT",
    "Join",
    "Layout",
    "Pieces",
    "Placement",
    "Runnable",
    "SettledPlacement",
    "Shares",
    "Specialization",
    "SpecializationCache",
    "Totals",
    "Weights",
    "allocate",
    "as_weights",
    "check_header",
    "check_lookups",
    "check_recording",
    "compare_two_microbatches",
    "even_weights",
    "full_batch_loss_check",
    "has_arrived",
    "header",
    "pack",
    "unpack",
]
