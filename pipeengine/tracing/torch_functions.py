"""What happens when the forward calls a torch function or a custom autograd function while it is recorded."""
from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch.overrides import resolve_name

from pipeengine.errors import CaptureError
from pipeengine.torch_private import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    peek_function_transform,
    storage_number,
)
from pipeengine.tracing.born_objects import MappedFunction, is_cache, tensor_of
from pipeengine.tracing.node_writer import NodeWriter, Outcome, Step, WriteWatch
from pipeengine.tracing.open_calls import CallStack, NotTraceable
from pipeengine.tracing.pytree import leaves, tensors
from pipeengine.tracing.real_side import RealSide
from pipeengine.tracing.value_table import ValueTable, is_shareable

# What these tell follows from shapes and types, which are part of a recording's key.
_METADATA = frozenset({
    "size", "dim", "ndimension", "stride", "numel", "nelement", "element_size", "itemsize", "nbytes", "is_contiguous",
    "is_floating_point", "is_complex", "is_signed", "storage_offset", "get_device", "type", "is_conj", "is_neg",
    "is_inference", "is_pinned", "dim_order", "is_same_size", "result_type", "can_cast", "__len__", "__hash__",
    "__repr__",
    "__format__", "__str__", "has_names", "is_shared", "_is_view", "is_nested", "promote_types", "untyped_storage",
    "dense_dim", "sparse_dim", "is_coalesced", "is_distributed", "is_set_to", "_nested_tensor_size", "names",
    "is_tensor",
    "is_storage", "broadcast_shapes", "get_default_dtype", "_has_compatible_shallow_copy_type", "is_autocast_enabled"})
_EFFECTS = frozenset({"register_hook", "retain_grad", "register_post_accumulate_grad_hook", "_assert_async"})
_NEW_STATE = frozenset({"backward", "__deepcopy__", "__reduce_ex__", "__setstate__", "data_ptr", "share_memory_"})
_TO_PYTHON = frozenset({"__contains__", "tolist", "item", "numpy", "__array__", "__bool__", "__int__", "__float__",
                        "__index__", "__complex__", "equal", "is_nonzero", "allclose"})
_FROM_LISTS = (torch.tensor, torch.as_tensor)
_DATA_PROPERTIES = frozenset({"data", "grad", "real", "imag", "T", "mT", "H", "mH", "_base", "grad_fn"})
_TRANSFORM = "a function transform (vmap, grad, jvp) runs in its forward"
_DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)


class TorchFunctions:
    """Runs each function on fakes, and for real where it follows from the inputs, and hands it to the writer."""

    def __init__(self, values: ValueTable, calls: CallStack, writer: NodeWriter, real_side: RealSide):
        self._values, self._calls, self._writer, self._real_side = values, calls, writer, real_side

    def call(self, function: Callable, args: tuple, kwargs: dict) -> object:
        """What ``function(*args, **kwargs)`` gives, written down as a node, a guard, or nothing.

        Raises ``NotTraceable`` for what a recording cannot hold.
        """
        if self._calls.hidden:
            return function(*args, **kwargs)
        name = short_name(function)
        if name == "__iter__":
            return iter(self.call(torch.unbind, (args[0], 0), {}))
        if name in _METADATA or (name == "__get__" and function.__self__.__name__ not in _DATA_PROPERTIES):
            return function(*args, **kwargs)
        if name == "__get__" and function.__self__.__name__ == "grad_fn" and _asked_by_checkpoint():
            return function(*args, **kwargs)
        if function is torch.Tensor.__deepcopy__ or name in _NEW_STATE:
            raise NotTraceable(self._calls.path, f"{name} on a tensor inside the forward")
        self._check_context()
        if isinstance(kwargs.get("generator"), torch.Generator):
            raise NotTraceable(self._calls.path, f"{name} draws from a generator of the model's own")
        if function in _FROM_LISTS and args and isinstance(args[0], (list, tuple)) and tensors(args[0]):
            return self._step(tensor_of, name, args, kwargs)
        if name in _TO_PYTHON:
            return self.python_value(function, name, args, kwargs)
        return self._step(function, name, args, kwargs)

    def _check_context(self) -> None:
        if peek_function_transform() is not None:
            raise NotTraceable(self._calls.path, _TRANSFORM)
        if self._writer.saved.foreign_hooks:
            raise NotTraceable(self._calls.path, "saved-tensor hooks are active in its forward")

    def python_value(self, function: Callable, name: str, args: tuple, kwargs: dict) -> object:
        """The Python value of a tensor, written down as a guard when it follows from the inputs."""
        encoded = self._values.encode((args, kwargs))
        real = self._values.reals((args, kwargs))
        if real is None:
            raise NotTraceable(self._calls.path, f"{self._calls.where()}: {name}() reads the value of a tensor "
                                                 "that depends on parameters or activations")
        with torch.no_grad():
            result = function(*real[0], **real[1])
        if name in ("numpy", "__array__"):
            result = result.copy()
        self._writer.write_guard(function, *encoded, result)
        return result

    def _step(self, function: Callable, name: str, args: tuple, kwargs: dict) -> object:
        encoded = self._values.encode((args, kwargs))
        fakes = self._values.fakes((args, kwargs))
        watch = WriteWatch(tensors(fakes))
        step = Step(self._calls.next_name(name if name not in ("__get__", "__set__") else function.__self__.__name__),
                    function, *encoded, reads=tensors((args, kwargs)), effect=name in _EFFECTS)
        shape_from_data = False
        try:
            with self._calls.hide(), self._writer.measured():       # it may call an autograd function of its own
                output = function(*fakes[0], **fakes[1])
        except _DATA_DEPENDENT as error:
            meter = self._writer.meter          # a fake that cannot run does not tell whether it draws random numbers
            with meter:
                output = self._real_side.known_result(function, args, kwargs)
            shape_from_data = output is not None
            if output is None:
                output = self._real_side.guessed_result(function, args, kwargs, meter)
            if output is None:
                raise NotTraceable(self._calls.path,
                                   f"{self._calls.where()}: {type(error).__name__}: {error}") from error
        if output is NotImplemented:
            return output
        writes = watch.written()
        if name == "__set__":
            writes.add(storage_number(fakes[0][0]))
        self._finish(step, function, args, kwargs, Outcome(output, writes, self._writer.meter.random,
                                                           shape_from_data=shape_from_data))
        return output

    def _finish(self, step: Step, function: Callable, args: tuple, kwargs: dict, outcome: Outcome) -> None:
        """Do for real what was done on fakes, or forget what unknown numbers were written to; then write the node."""
        place = step.name if outcome.random else None
        reals = self._real_side.beside(function, args, kwargs, outcome.output, place)
        if reals is None:
            self._values.forget_reals(outcome.writes)
        outcome.reals = reals or {}
        self._writer.write(step, outcome)

    def call_mapped(self, function: Callable, args: tuple, kwargs: dict) -> object:
        """Stands in for a function that ``torch.vmap`` has mapped: one node."""
        if self._calls.hidden or peek_function_transform() is not None:
            return function(*args, **kwargs)
        try:
            mapped = MappedFunction(function)
            with self._calls.hide(), self._writer.saved.paused():
                return self._step(mapped, "vmap", (tuple(mapped.captured), *args), kwargs)
        except Exception as error:
            raise NotTraceable(self._calls.path, f"{_TRANSFORM} ({type(error).__name__}: {error})") from error

    def call_whole_loss(self, function: Callable, output: object, target: object) -> torch.Tensor:
        """Stands in for a loss function that is called as it is; ``function(output, target)`` gives a tensor."""
        for leaf in leaves((output, target)):
            if not isinstance(leaf, torch.Tensor) and not is_shareable(leaf) and not is_cache(leaf):
                raise CaptureError(f"loss_fn is called as it is, because of what it does, and is handed a "
                                   f"{type(leaf).__name__}, which cannot be made again for every micro-batch")
        given = (output, target)
        step = Step(self._calls.next_name("loss_fn"), function, *self._values.encode((given, {})),
                    reads=tensors(given))
        self._writer.meter.clear()
        self._writer.saved.start()
        with self._calls.hide(), self._writer.saved.paused():
            loss = self._real_side.trial(function, given, {}, meter=self._writer.meter)
            if isinstance(loss, FakeTensor):
                raise CaptureError("loss_fn is called as it is, because of what it does, and reads parameters of the "
                                   "model, which other workers hold; let the model return what it needs of them")
            needs = any(tensor.requires_grad for tensor in tensors(given))
            loss = self._real_side.fakes_like(loss, needs_gradient=needs)
        self._writer.write(step, Outcome(loss, set(), self._writer.meter.random))
        return loss

    def call_autograd_function(self, own_apply: Callable, target: Callable, cls: type, args: tuple,
                               kwargs: dict) -> object:
        """Stands in for ``cls.apply(*args, **kwargs)`` of an ``autograd.Function``.

        ``own_apply`` is torch's own for ``cls``; the node calls ``target``.
        """
        if self._calls.hidden:
            return own_apply(*args, **kwargs)
        self._check_context()
        if cls.__name__ == "CheckpointFunction":
            run, _, *inputs = args
            with self._writer.saved.reentrant():
                return run(*inputs)

        def apply(*a, **k):
            return own_apply(*a, **k)
        apply.__name__ = cls.__name__
        with self._calls.hide():
            encoded = self._values.encode((args, kwargs))
            fakes = self._values.fakes((args, kwargs))
            watch = WriteWatch(tensors(fakes))
            try:
                with self._writer.measured():
                    output = apply(*fakes[0], **fakes[1])
            except Exception as error:
                raise NotTraceable(self._calls.path, f"autograd function {cls.__name__}: {type(error).__name__}: "
                                                     f"{error}") from error
            step = Step(self._calls.next_name(cls.__name__), target, *encoded, reads=tensors((args, kwargs)))
            # What its forward made and did not keep, its backward makes again, whole or in the same parts.
            self._finish(step, apply, args, kwargs, Outcome(output, watch.written(), self._writer.meter.random,
                                                            scratch=self._writer.scratch(output)))
            return output


def short_name(function: Callable) -> str:
    """The last part of a torch function's name."""
    return getattr(function, "__name__", None) or (resolve_name(function) or type(function).__name__).rsplit(".", 1)[-1]


def _asked_by_checkpoint() -> bool:
    """Whether torch's own checkpoint reads what it has just made (up to torch 2.12)."""
    return sys._getframe(3).f_code.co_filename == torch.utils.checkpoint.__file__
