"""What a message proves: whoever sent it had received those that it was made from, and all before."""
from __future__ import annotations

from pipeengine.program.program import Action, Program

Message = tuple[int, int, int, int]
"""0 for an activation, 1 for a gradient; source and target stage of its boundary; micro-batch."""


def message_of(action: Action) -> Message:
    """The message that a send or a receive is about."""
    back = int(action.op in ("SG", "RG"))
    source, target = (action.stage, action.peer) if action.op in ("SA", "RG") else (action.peer, action.stage)
    return back, source, target, action.microbatch


def receipts(program: Program, worker: int) -> dict[Message, tuple[Message, ...]]:
    """For the messages to ``worker``, which of its own messages have arrived once that one is here.

    A worker computes with what it receives, one action after the other, so whatever it sends is a receipt for all
    that it has computed with. Each message of ``worker`` has its receipt once at most, as early as there is one; what
    a peer receives last has none.
    """
    own = set(program.topology.stages_of(worker))
    found: dict[Message, tuple[Message, ...]] = {}
    for peer in range(program.topology.num_workers):
        if peer != worker:
            found |= _from(program.actions(peer), own)
    return found


def _from(actions: list[Action], own: set[int]) -> dict[Message, tuple[Message, ...]]:
    """The receipts that one worker's actions give to the worker of the stages ``own``."""
    posted: dict[tuple[bool, int, int], list[Message]] = {}
    consumed: list[Message] = []
    found: dict[Message, tuple[Message, ...]] = {}
    for action in actions:
        key = action.op in ("RG", "B", "I"), action.stage, action.microbatch
        if action.op in ("RA", "RG"):
            if action.peer in own:
                posted.setdefault(key, []).append(message_of(action))
        elif action.op in ("F", "B", "I"):
            consumed += posted.pop(key, ())
        elif action.op in ("SA", "SG") and action.peer in own and consumed:
            found[message_of(action)] = tuple(consumed)
            consumed = []
    return found
