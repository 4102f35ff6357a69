"""Watch one eager forward run on fake tensors, and write down what happens.

``Recorder`` is a ``TorchFunctionMode``: every torch function that the model's Python calls passes through it, with a
fake tensor (shape, dtype, strides, device, no memory) in the place of each real one. Values that follow from the
model's inputs also exist for real on the side, so that a forward that looks at its inputs (``if mask.all()``) takes
the path that eager execution takes; what it saw becomes a guard. A forward that looks at anything else cannot be
written down at this grain: ``NotTraceable`` then names the innermost module, which becomes one node.

The parts: ``value_table`` numbers the tensors, ``real_side`` computes with the real ones, ``open_calls`` knows where
the forward is, ``torch_functions`` and ``module_calls`` handle what it calls, ``node_writer`` writes it down.
"""
from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping

import torch
from torch.overrides import TorchFunctionMode

from pipeengine.tracing.fake_model import FakedModel
from pipeengine.tracing.modes import current_modes
from pipeengine.tracing.module_calls import ModuleCalls, PythonRandom
from pipeengine.tracing.node_writer import NodeWriter
from pipeengine.tracing.open_calls import CallStack, NotTraceable
from pipeengine.tracing.read_log import ReadLog
from pipeengine.tracing.real_side import RealSide, RngOfPlace
from pipeengine.tracing.recording import Recording
from pipeengine.tracing.torch_functions import TorchFunctions
from pipeengine.tracing.value_table import ValueTable


class Recorder(TorchFunctionMode):
    """Records what happens inside ``watching``; ``finish`` gives the ``Recording``."""

    def __init__(self, faked_model: FakedModel, leaf_modules: Mapping[str, str], *, rng_of_place: RngOfPlace,
                 reads: ReadLog, python_random: PythonRandom | None = None):
        """``leaf_modules``: path of a module that is kept whole -> why. ``reads`` notes what is read from Python.

        ``python_random`` looks at Python's and NumPy's random numbers, to find the modules that draw them; None: not
        asked.
        """
        super().__init__()
        self._leaf_modules, self._buffers = dict(leaf_modules), frozenset(faked_model.buffers)
        self._modes = current_modes()
        self._calls = CallStack()
        self._values = ValueTable(faked_model.fake_mode, faked_model.plain_names, self._calls)
        self._values.add_attributes(faked_model.fakes_by_name, faked_model.real_buffers)
        self._writer = NodeWriter(self._values, self._calls, faked_model.fake_mode)
        real_side = RealSide(self._values, faked_model.fake_mode, rng_of_place)
        self._functions = TorchFunctions(self._values, self._calls, self._writer, real_side)
        self._modules = ModuleCalls(self._values, self._calls, self._writer, real_side, faked_model, self._leaf_modules,
                                    reads, python_random)

    def add_input(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The fake that stands for an input of the model; the real one is remembered beside it."""
        return self._values.add_input(name, tensor)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self._functions.call(func, args, kwargs or {})

    def call_module(self, original: Callable, module: torch.nn.Module, args: tuple, kwargs: dict) -> object:
        """Stands in for ``module.__call__`` while recording; ``original`` is the class's own."""
        return self._modules.call(original, module, args, kwargs)

    def call_autograd_function(self, own_apply: Callable, target: Callable, cls: type, args: tuple,
                               kwargs: dict) -> object:
        """Stands in for ``cls.apply`` while recording; ``own_apply`` is torch's own, for ``cls``; the node calls
        ``target``.
        """
        return self._functions.call_autograd_function(own_apply, target, cls, args, kwargs)

    def call_mapped(self, function: Callable, args: tuple, kwargs: dict) -> object:
        """Stands in for ``function``, which ``torch.vmap`` has mapped."""
        return self._functions.call_mapped(function, args, kwargs)

    @property
    def hidden(self) -> bool:
        """Whether what runs now is part of one node."""
        return self._calls.hidden

    def call_whole_loss(self, function: Callable, output: object, target: object) -> torch.Tensor:
        """``function(output, target)`` as one node, whatever it does. Raises ``CaptureError`` where that cannot be."""
        return self._functions.call_whole_loss(function, output, target)

    def ask(self, function: Callable, args: tuple) -> object:
        """``function(*args)``, a Python value, for real; a guard from now on. Raises ``NotTraceable`` where the tensors
        in ``args`` do not follow from the inputs.
        """
        return self._functions.python_value(function, function.__name__, args, {})

    def refuse(self, reason: str) -> None:
        """The forward does what no recording holds: raises ``NotTraceable``, except inside a module that is kept
        whole.
        """
        if not self._calls.hidden:
            raise NotTraceable(self._calls.path, reason)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Record everything that runs inside."""
        with self._writer.saved.watching(), self:
            yield

    def finish(self, output: object, loss: torch.Tensor | None, *, returned: Callable[[object], bool]
               ) -> Recording:
        """Freeze what was seen. ``output`` is the model's output, of whose objects those that are to be ``returned``
        are kept, ``loss`` a tensor met on the way."""
        template = self._values.encode_output(output, returned)
        number = None if loss is None else self._values.lookup(loss)
        return Recording(self._values.values(), tuple(self._writer.nodes), tuple(self._calls.calls),
                         tuple(self._writer.guards), tuple(self._values.inputs), template, number,
                         dict(self._values.constants), dict(self._leaf_modules), self._buffers, self._modes)

    def release(self) -> None:
        """Let go of all tensors: autograd's own references to this recorder would keep them for ever."""
        self._values.clear()
        self._modules.release()

    def traces(self) -> list[weakref.ref]:
        """Weak references to every fake that was made: whoever still holds one afterwards has taken it out of the
        run.
        """
        return self._values.result_traces()
