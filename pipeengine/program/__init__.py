"""A schedule goes in, a ``Program`` comes out: its messages placed, and the proof that it completes. No torch."""

from pipeengine.program.checking import check
from pipeengine.program.lowering import lower
from pipeengine.program.program import UNDERWAY, WINDOW, Action, Program
from pipeengine.program.receipts import Message, receipts
from pipeengine.program.reductions import with_reductions
from pipeengine.program.single_channel import simulate_channel

__all__ = ["Action", "Message", "Program", "UNDERWAY", "WINDOW", "check", "lower", "receipts", "simulate_channel",
           "with_reductions"]
