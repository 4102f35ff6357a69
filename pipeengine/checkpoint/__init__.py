"""Weights in and out of checkpoint folders, in the names of the model."""

from pipeengine.checkpoint.foreign import fetch_missing, release_foreign
from pipeengine.checkpoint.state import collect_state, load_state
from pipeengine.checkpoint.weights import load_stage, save_weights

__all__ = ["collect_state", "fetch_missing", "load_stage", "load_state", "release_foreign", "save_weights"]
