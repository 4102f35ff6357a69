"""A batch goes in, micro-batches come out.

``take_apart`` finds its rows and says how each tensor is split.
"""

from pipeengine.data.batching import Batch, argument_names, take_apart

__all__ = ["Batch", "argument_names", "take_apart"]
