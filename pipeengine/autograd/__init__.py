"""What backward does otherwise than torch would: weight gradients that wait, forwards that run twice, whole
or in chunks."""
from pipeengine.autograd.chunked_loss import chunked_cross_entropy
from pipeengine.autograd.deferral import Deferral, Queue, run
from pipeengine.autograd.deferral_rules import Replacement, find_deferrable
from pipeengine.autograd.recomputation import Recompute, Span, check_recomputable, checkpoint_block, checkpoint_module

__all__ = ["Deferral", "Queue", "Recompute", "Replacement", "Span", "check_recomputable", "checkpoint_block",
           "checkpoint_module", "chunked_cross_entropy", "find_deferrable", "run"]
