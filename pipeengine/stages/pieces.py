"""Pieces of a stage for ``torch.compile``: runs of recorded nodes that draw no random numbers and put nothing off.

A piece is one repeated block of the model or several, and is written so that alike blocks give the same text:
parameters and modules are its arguments. So each is compiled once, and used wherever its blocks come again.
"""
from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence

import torch

from pipeengine.torch_private import compilations
from pipeengine.tracing import Node, Recording, Ref

LOGGER = logging.getLogger("pipeengine.compile")
_VALUES = (torch.dtype, torch.device, float)
_LEAST = 2                  # nodes; one alone has nothing to be fused with
# Nodes of a piece of several blocks. Entering a piece costs what a dozen nodes cost, and small blocks would lose what
# they gain; larger pieces take longer to compile, and come again less often.
_MOST = 128


class Pieces:
    """The compiled functions of one pipeline, by text; ``options`` are those of ``torch.compile``."""

    def __init__(self, options: Mapping[str, object]):
        self._options = dict(options)
        self._known: dict[tuple, tuple[Callable, dict[str, object]]] = {}
        self._made = 0
        self._seen = compilations()

    def compile(self, source: str, name: str, scope: dict[str, object]) -> Callable:
        """The function ``name`` of ``source``; one for all that have the same text and the same things in scope."""
        key = source, tuple((called, thing if isinstance(thing, _VALUES) else id(thing))
                            for called, thing in sorted(scope.items()))
        if key not in self._known:
            made = dict(scope)
            exec(compile(source, f"<piece {len(self._known)}>", "exec"), made)
            # With the scope, so that no other thing can come to have an id of the key.
            self._known[key] = torch.compile(made[name], **self._options), made     # type: ignore[call-overload]
        return self._known[key][0]

    def tell(self) -> None:
        """Log what has been compiled since the last time, and where it was not in one piece."""
        graphs, breaks = compilations()
        new, broken = graphs - self._seen[0], {why: number for why, number in breaks.items()
                                               if number > self._seen[1].get(why, 0)}
        if new:
            again = len(self._known) == self._made
            LOGGER.log(logging.WARNING if again else logging.INFO, "%d graphs compiled%s; %d pieces in all", new,
                       " again, for other shapes or modes" if again else "", len(self._known))
        for why in broken:
            LOGGER.warning("a piece is compiled in parts: %s", why)
        self._seen, self._made = (graphs, breaks), len(self._known)


def find_pieces(recording: Recording, nodes: Sequence[tuple[int, Node]], model: torch.nn.Module,
                stays: Callable[[Node], bool]) -> list[tuple[Node, ...]]:
    """Runs of ``nodes`` (with their places in the recording) that can be compiled together; those that ``stays`` holds
    for run as they are. They begin and end where blocks do, as far as nodes that stay allow it."""
    blocks = _blocks(recording)
    runs: list[list[Node]] = []

    def where(pair: tuple[int, Node]) -> tuple | None:
        index, node = pair
        if stays(node) or not is_plain(node, recording, model):
            return None
        return node.modes, next((start for start, end in blocks if start <= index < end), -1)

    modes: object = None                                # of the run that the next block can be joined to
    for here, members in itertools.groupby(nodes, where):
        block = [node for _, node in members] if here else []
        if here and here[0] == modes and len(runs[-1]) + len(block) <= _MOST:
            runs[-1] += block
        elif here:
            runs.append(block)
        modes = here and here[0]
    return [tuple(run) for run in runs if len(run) >= _LEAST]


def _blocks(recording: Recording) -> list[tuple[int, int]]:
    """Where the entries of lists of modules run, the outermost ones: what a model repeats."""
    found: list[tuple[int, int]] = []
    for call in sorted(recording.calls, key=lambda call: (call.start, -call.end)):
        if call.path.rpartition(".")[2].isdigit() and call.end - call.start >= _LEAST \
                and not (found and call.end <= found[-1][1]):
            found.append((call.start, call.end))
    return found


def _is_simple(argument: object) -> bool:
    """Whether an argument holds values, numbers and words alone, and no object that is made anew."""
    if isinstance(argument, (tuple, list)):
        return all(map(_is_simple, argument))
    if isinstance(argument, dict):
        return all(map(_is_simple, argument.values()))
    if isinstance(argument, slice):
        return _is_simple((argument.start, argument.stop, argument.step))
    return isinstance(argument, (Ref, type(None), type(Ellipsis), bool, int, float, str, torch.dtype, torch.device,
                                 torch.memory_format, torch.layout))


def is_plain(node: Node, recording: Recording, model: torch.nn.Module) -> bool:
    """Whether a node computes values from values and does nothing else."""
    if node.random or node.effect or node.recompute or node.writes or node.modes.inference or not node.results:
        return False
    if any(pick.startswith("@") for pick in node.picks):
        return False
    if not _is_simple((node.args, node.kwargs)):
        return False
    if not node.is_module:
        return True
    module = model.get_submodule(str(node.target))
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module).__module__.startswith("torch.nn.") and node.target not in recording.leaf_modules \
        and "forward" not in vars(module) and not any(hooks)
