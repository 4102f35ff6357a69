"""Weights in and out of checkpoint folders, in the names of the model."""
from pipeengine.checkpoint.weights import load_stage, save_weights

__all__ = ["load_stage", "save_weights"]
