"""What happens when the forward calls one of the model's modules while it is recorded: opened, or kept whole as one
node.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import torch

from pipeengine.errors import CaptureError, told
from pipeengine.tracing.born_objects import is_cache, with_empty_caches
from pipeengine.tracing.fake_model import FakedModel
from pipeengine.tracing.modes import current_modes
from pipeengine.tracing.node_writer import NodeWriter, Outcome, Step, WriteWatch
from pipeengine.tracing.open_calls import CallStack, NotTraceable, OpenCall
from pipeengine.tracing.pytree import leaves, tensors
from pipeengine.tracing.read_log import ReadLog
from pipeengine.tracing.real_side import RealSide
from pipeengine.tracing.recording import OPAQUE, Call
from pipeengine.tracing.value_table import ValueTable, is_shareable

PythonRandom = Callable[..., object]
"""``look()`` gives the state of Python's and NumPy's random numbers, ``look(state)`` sets it."""


class ModuleCalls:
    """Opens a module, so that what it does is written down, or runs it as one node."""

    def __init__(self, values: ValueTable, calls: CallStack, writer: NodeWriter, real_side: RealSide,
                 faked_model: FakedModel, leaf_modules: Mapping[str, str], reads: ReadLog,
                 python_random: PythonRandom | None):
        """``leaf_modules``: path of a module that is kept whole -> why. ``python_random``: None where nobody draws."""
        self._values, self._calls, self._writer, self._real_side = values, calls, writer, real_side
        self._leaf_modules, self._reads, self._python_random = leaf_modules, reads, python_random
        self._run_for_real = faked_model.run_for_real
        self._reshaped = faked_model.reshaped
        self._learned = False               # whether the last whole module ran on made-up tensors
        self._paths = {module: path for path, module in faked_model.modules.items()}

    def call(self, original: Callable, module: torch.nn.Module, args: tuple, kwargs: dict) -> object:
        """Stands in for ``module.__call__``; ``original`` is the class's own.

        Raises ``NotTraceable`` for what a recording at this grain cannot hold, ``CaptureError`` for what none can.
        """
        if self._calls.hidden or module not in self._paths:
            return original(module, *args, **kwargs)
        innermost = self._calls.innermost
        if innermost is not None and innermost.module is module:
            return self._inner_call(innermost, original, args, kwargs)
        path = self._paths[module]
        if path in self._leaf_modules or (_is_leaf(module) and self._has_own_tensors(module)) \
                or self._writer.saved.recomputing:
            return self._whole(original, module, path, args, kwargs)
        return self._open(original, module, path, args, kwargs)

    def _inner_call(self, call: OpenCall, original: Callable, args: tuple, kwargs: dict) -> object:
        """The base-class call inside an overridden ``__call__``: transparent only when it passes on what it got."""
        if self._writer.saved.recomputing:
            raise NotTraceable(call.path, "it recomputes its activations in backward")
        same_arguments = _ids((args, kwargs)) == call.argument_ids and not call.inner_called
        output = original(call.module, *args, **kwargs)
        call.inner_output_ids = _ids(output) if same_arguments else None
        call.inner_called = True
        return output

    def _has_own_tensors(self, module: torch.nn.Module) -> bool:
        """Whether the module still holds its registered tensors (functional_call puts others in their place)."""
        entries = [self._values.entry_of(tensor) for tensor in (*module._parameters.values(), *module._buffers.values())
                   if tensor is not None]
        return all(entry is not None and entry.kind == "attribute" for entry in entries)

    def _open(self, original: Callable, module: torch.nn.Module, path: str, args: tuple, kwargs: dict) -> object:
        arguments = leaves((args, kwargs))
        plain = all(isinstance(leaf, torch.Tensor) or is_shareable(leaf) for leaf in arguments)
        encoded = self._values.encode_shareable((args, kwargs), OPAQUE)
        containers = [(c, len(c)) for c in (*args, *kwargs.values()) if isinstance(c, (list, dict))]
        start = len(self._writer.nodes)
        before = self._python_random() if self._python_random else None
        try:
            with self._calls.opened(module, path, start, [id(leaf) for leaf in arguments]) as call:
                output = original(module, *args, **kwargs)
        except CaptureError:
            raise
        except Exception as error:
            raise NotTraceable(path, told(error)) from error
        if call.inner_called and call.inner_output_ids != _ids(output):
            raise NotTraceable(path, "its class wraps __call__")
        if before is not None and before != self._python_random():
            raise NotTraceable(path, "its forward draws from Python's or NumPy's random numbers")
        plain = plain and all(len(c) == count for c, count in containers)
        plain = plain and not any(other == path or other.startswith(f"{path}.") for other in self._reshaped)
        self._calls.calls[call.index] = Call(path, call.scope, call.parent, start, len(self._writer.nodes), *encoded,
                                             self._values.output_template(output), current_modes(), plain)
        return output

    def _whole(self, original: Callable, module: torch.nn.Module, path: str, args: tuple, kwargs: dict) -> object:
        """Call a module as one node: a leaf of torch.nn, or one that must not be opened."""
        scope = self._calls.next_scope(path)
        attributes = self._attributes_below(module)
        self._refuse_objects((args, kwargs), path, "recomputed", "is given a",
                             "an object born in the forward that cannot be made again for every micro-batch; "
                             "switch it off (for a Hugging Face cache: model.config.use_cache = False)")
        encoded = self._values.encode((args, kwargs))
        fakes = with_empty_caches(self._values.fakes((args, kwargs)))
        self._values.note_emptied((args, kwargs), path, self._leaf_modules.get(path, "recomputed"))
        watch = WriteWatch((*tensors(fakes), *(self._values.entry(value).tensor for value in attributes)))
        recompute = self._writer.saved.recomputing
        output = self._run_whole(original, module, path, fakes)
        self._refuse_numbers(output, path)
        self._refuse_objects(output, path, "a leaf", "returns a", "which cannot cross to another stage; return tensors")
        outcome = Outcome(output, watch.written(), self._writer.meter.random)
        reads = tensors((args, kwargs))
        if recompute:
            self._writer.saved.only([tensor for tensor in reads if tensor.requires_grad])
        reals = None
        if not attributes and path not in self._leaf_modules:
            def hidden(*a, **k):
                with self._calls.hide():
                    return original(module, *a, **k)
            reals = self._real_side.beside(hidden, args, kwargs, output, scope if outcome.random else None)
        if reals is None:
            self._values.forget_reals(outcome.writes)
        outcome.reals = reals or {}
        self._writer.write(Step(scope, path, *encoded, reads=reads, is_module=True, attributes=attributes,
                                recompute=recompute), outcome)
        return output

    def _attributes_below(self, module: torch.nn.Module) -> tuple[int, ...]:
        numbers = [self._values.number_of(tensor) for tensor in (*module.parameters(), *module.buffers())]
        return tuple(dict.fromkeys(number for number in numbers if number is not None))

    def _refuse_objects(self, structure: object, path: str, otherwise: str, what: str, why: str) -> None:
        """Whatever a module kept whole takes or returns must be a tensor, or mean the same for every micro-batch."""
        for leaf in leaves(structure):
            if not isinstance(leaf, torch.Tensor) and not is_shareable(leaf) and not is_cache(leaf):
                reason = self._leaf_modules.get(path, otherwise)
                raise CaptureError(f"module {path} is kept whole ({reason}) and {what} {type(leaf).__name__}, {why}")

    def _refuse_numbers(self, output: object, path: str) -> None:
        """A number that was made from made-up tensors must not be frozen in what its caller does with it."""
        if self._learned and _has_numbers(output):
            raise NotTraceable(self._calls.path, f"module {path} hands it a Python number that it makes from tensors")

    def _run_whole(self, original: Callable, module: torch.nn.Module, path: str, fakes: tuple) -> object:
        self._learned = False
        before = self._python_random() if self._python_random else None
        # It will run as it is. What a module of torch drops decides about the node: whether it draws random numbers.
        drops = path not in self._leaf_modules and not vars(module).keys().isdisjoint(("p", "dropout"))
        as_it_is = contextlib.nullcontext() if drops else self._reads.paused()
        with self._calls.hide(), as_it_is:
            try:
                with self._writer.measured():
                    output = original(module, *fakes[0], **fakes[1])
            except Exception:
                output = self._learn(original, module, path, fakes)
        if before is not None:
            self._python_random(before)         # what a whole module draws is its own affair
        return output

    def _learn(self, original: Callable, module: torch.nn.Module, path: str, fakes: tuple) -> object:
        """Run a module on made-up real tensors to learn what its output looks like."""
        self._learned = True
        try:
            with self._writer.saved.paused():
                output, cost = self._run_for_real(module, original, *fakes, self._values.real_of)
        except Exception as error:
            raise CaptureError(f"module {path or '(root)'} cannot run: {told(error)}") from error
        needs = torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors(fakes), *module.parameters()))
        result = self._real_side.fakes_like(output, needs_gradient=needs)
        meter = self._writer.meter
        meter.flops, meter.bytes, meter.random = cost.flops, cost.bytes, cost.random
        return result

    def release(self) -> None:
        """Let go of the model."""
        self._run_for_real = None


def _ids(structure: object) -> list[int]:
    return [id(leaf) for leaf in leaves(structure)]


def _has_numbers(structure: object) -> bool:
    """Whether a module's output holds numbers beside its tensors."""
    if isinstance(structure, (int, float, complex)):
        return True
    if isinstance(structure, Mapping):
        return any(map(_has_numbers, structure.values()))
    return isinstance(structure, (tuple, list)) and any(map(_has_numbers, structure))


def _is_leaf(module: torch.nn.Module) -> bool:
    """Modules of torch.nn without children: one operation to a reader of the plan."""
    return type(module).__module__.startswith("torch.nn.modules.") and next(module.children(), None) is None
