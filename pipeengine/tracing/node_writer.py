"""Write down what has just run: a node, a guard, or nothing."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from pipeengine.torch_private import FakeTensorMode, storage_number, version_of
from pipeengine.tracing.meter import Meter
from pipeengine.tracing.modes import current_modes
from pipeengine.tracing.open_calls import CallStack, NotTraceable
from pipeengine.tracing.pytree import leaves, tensors
from pipeengine.tracing.recording import Guard, Node, NodeCost, Ref, picks, refs
from pipeengine.tracing.saved_tensors import SavedTensors
from pipeengine.tracing.value_table import ValueTable


@dataclass(slots=True)
class Step:
    """One call of a function, or of a module as a whole, before it runs.

    ``target`` is the function, or the module's path. ``args`` and ``kwargs`` are encoded; ``reads`` are the tensors
    in them, ``attributes`` the parameters and buffers below the module. ``effect``: it matters though nobody reads
    its results.
    """

    name: str
    target: Callable | str
    args: tuple
    kwargs: dict
    reads: list[torch.Tensor]
    is_module: bool = False
    effect: bool = False
    attributes: tuple[int, ...] = ()
    recompute: bool = False


@dataclass(slots=True)
class Outcome:
    """What a step did.

    ``writes`` are the storages it changed in place, ``random`` whether it drew random numbers, ``reals`` the real
    tensors beside its new fakes (by id), ``shape_from_data`` whether the shapes of its results follow from data,
    ``scratch`` the bytes that its backward is to make room for besides.
    """

    output: object
    writes: set[int]
    random: bool
    reals: dict[int, torch.Tensor] = field(default_factory=dict)
    shape_from_data: bool = False
    scratch: int = 0


class NodeWriter:
    """Holds the nodes and guards of the recording, and the meters that a node is measured with."""

    def __init__(self, values: ValueTable, calls: CallStack, fake_mode: FakeTensorMode):
        self._values, self._calls, self._fake_mode = values, calls, fake_mode
        self.meter = Meter()
        self.saved = SavedTensors(values)
        self.nodes: list[Node] = []
        self.guards: list[Guard] = []

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """What runs inside runs on fakes, and is measured for the next node."""
        self.meter.clear()
        self.saved.start()
        with self._fake_mode, self.meter:
            yield

    def scratch(self, output: object) -> int:
        """Bytes of the largest tensor that the measured step has made and neither returned nor kept."""
        there = {storage_number(tensor) for tensor in tensors(output)} | {storage for storage, _ in self.saved.sizes()}
        return max((size for storage, size in self.meter.made.items() if storage not in there), default=0)

    def write_guard(self, function: Callable | None, args: tuple, kwargs: dict, expected: object) -> None:
        """The forward took ``expected`` from tensors; ``args`` and ``kwargs`` are encoded."""
        self.guards.append(Guard(function, args, kwargs, expected, len(self.nodes), self._calls.path,
                                 self._calls.where()))

    def write(self, step: Step, outcome: Outcome) -> None:
        """Add the node for what has just run. A pure step that only returned what it was given adds nothing.

        Raises ``NotTraceable`` when a function makes a Python value of tensors that do not follow from the inputs.
        """
        output, writes = outcome.output, outcome.writes
        fresh = [(position, leaf) for position, leaf in enumerate(leaves(output))
                 if isinstance(leaf, torch.Tensor) and not self._values.knows(leaf)]
        if not (step.is_module or tensors(output) or output is None or step.effect or writes):
            self._write_python_result(step, output)
            return
        effect = step.effect or (output is None and not writes and not step.is_module and bool(step.reads))
        if not (fresh or writes or effect or step.is_module):
            return
        index = len(self.nodes)
        results = tuple(self._values.add("result", step.name if len(fresh) == 1 else f"{step.name}[{position}]", index,
                                         tensor, real=outcome.reals.get(id(tensor))) for position, tensor in fresh)
        cost = NodeCost(self.meter.flops, self.meter.bytes, self.saved.sizes(), outcome.scratch)
        self.nodes.append(Node(step.name, step.target, step.is_module, step.args, step.kwargs, results,
                               picks(self._values.output_template(output), results), self._calls.index, current_modes(),
                               frozenset(writes), step.attributes, outcome.random, effect, step.recompute, cost))
        for value in results if outcome.shape_from_data else ():
            self.write_guard(None, (Ref(value),), {}, tuple(self._values.entry(value).tensor.shape))

    def _write_python_result(self, step: Step, output: object) -> None:
        """A function of tensors returned no tensor: burnt in, so it must follow from the inputs."""
        read = list(refs((step.args, step.kwargs)))
        if any(self._values.entry(value).real is None for value in read):
            name = getattr(step.target, "__name__", type(step.target).__name__)
            raise NotTraceable(self._calls.path, f"{self._calls.where()}: {name} turns a tensor into "
                                                 f"{type(output).__name__}, which a recording would freeze")
        if read:
            self.write_guard(step.target, step.args, step.kwargs, output)


class WriteWatch:
    """Remembers tensors, to see afterwards which of them were changed in place."""

    def __init__(self, watched: Iterable[torch.Tensor]):
        self._before = [(tensor, _version(tensor), tensor.requires_grad)
                        for tensor in {id(tensor): tensor for tensor in watched}.values()]

    def written(self) -> set[int]:
        """Storages of the tensors that were changed since, or that began to need a gradient."""
        return {storage_number(tensor) for tensor, version, needed in self._before
                if _version(tensor) != version or (tensor.requires_grad != needed and tensor.is_leaf)}


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else version_of(tensor)
