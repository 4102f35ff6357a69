"""What training needs to go on, in and out of folders that cannot be half: weights in the model's names, optimizers in
those of their parameters."""

from pipeengine.checkpoint.checkpoints import Checkpoints
from pipeengine.checkpoint.foreign import fetch_missing, release_foreign
from pipeengine.checkpoint.holdings import Holdings
from pipeengine.checkpoint.looking import look_at
from pipeengine.checkpoint.preemption import AGAIN, STOP, SignalWatch
from pipeengine.checkpoint.saving_weights import save_weights
from pipeengine.checkpoint.slots import tensor_slots
from pipeengine.checkpoint.state import collect_state, load_state
from pipeengine.checkpoint.weights import load_stage

__all__ = ["AGAIN", "Checkpoints", "Holdings", "STOP", "SignalWatch", "collect_state", "fetch_missing", "load_stage",
           "load_state", "look_at", "release_foreign", "save_weights", "tensor_slots"]
