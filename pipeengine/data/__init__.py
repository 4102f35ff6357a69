"""Data goes in, micro-batches come out.

Samplers, token files and packed rows say which samples a batch holds and resume where training stood; ``take_apart``
finds a batch's rows and says how each tensor is split.
"""

from pipeengine.data.batching import Batch, argument_names, take_apart
from pipeengine.data.loader import ResumableLoader
from pipeengine.data.packing import PackedDataset
from pipeengine.data.permutation import Permutation
from pipeengine.data.sampler import ShuffledSampler
from pipeengine.data.tokens import TokenDataset

__all__ = ["Batch", "PackedDataset", "Permutation", "ResumableLoader", "ShuffledSampler", "TokenDataset",
           "argument_names", "take_apart"]
