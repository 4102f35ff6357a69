"""Hold a model still while it is recorded: fakes in the place of its tensors, and everything put back afterwards."""
from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator

import torch

from pipeengine.torch_private import DisableTorchFunction, FakeTensor, FakeTensorMode
from pipeengine.tracing.meter import Meter, tensor_bytes
from pipeengine.tracing.module_state import (
    TENSOR_TABLES,
    difference,
    empty_caches,
    python_state,
    quiet_globals,
    restore,
    restore_children,
    shallow,
)
from pipeengine.tracing.pytree import tree_map
from pipeengine.tracing.real_side import made_up

_SMALL_BUFFER_BYTES = 1 << 24


class FakedModel:
    """Holds a model still while it is recorded: fakes in the place of its tensors, and everything put back
    afterwards.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device):
        """``device`` is where the model would run; the fakes say that they are there.

        Afterwards ``fakes_by_name`` has the fake of every parameter and buffer by its name, ``real_buffers`` copies
        of small buffers that are real, ``buffers`` the names of all buffers, and ``plain_names`` the names of
        tensors that are plain attributes of modules, by id.
        """
        self._device = device
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.modules = dict(model.named_modules())
        self._tensors = {path: (dict(m._parameters), dict(m._buffers)) for path, m in self.modules.items()}
        self._state_at_start = self._state = {path: python_state(m) for path, m in self.modules.items()}
        self._children_at_start = self._children = {path: dict(m._modules) for path, m in self.modules.items()}
        self.reshaped: frozenset[str] = frozenset()         # modules that a first run left another way than it found
        self._reassigned: dict[str, str] = {}               # module -> the buffer that the last run replaced
        self._grown: dict[str, str] = {}                    # of those: by one of another shape
        self._fake_of: dict[int, torch.Tensor] = {}         # id of the model's own tensor -> its fake
        self._own_of: dict[int, torch.Tensor] = {}          # id of a fake -> the model's own tensor
        self._stack = contextlib.ExitStack()
        self.traces: list[weakref.ref] = []
        self.fakes_by_name: dict[str, torch.Tensor] = {}
        self.real_buffers: dict[str, torch.Tensor] = {}
        self.buffers: set[str] = set()
        self.plain_names: dict[int, str] = {}

    def __enter__(self) -> FakedModel:
        self._stack.enter_context(quiet_globals())
        for path, module in self.modules.items():
            prefix = f"{path}." if path else ""
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    if isinstance(module, torch.jit.ScriptModule):
                        self._pair(tensor, tensor)
                    self._fake_attribute(prefix + name, tensor, name in module._buffers)
            for name, value in vars(module).items():
                for tensor in (leaf for leaf in shallow(value) if isinstance(leaf, torch.Tensor)):
                    self.plain_names.setdefault(id(tensor), prefix + name)
        return self

    def _pair(self, own: torch.Tensor, fake: torch.Tensor) -> None:
        self._fake_of[id(own)], self._own_of[id(fake)] = fake, own

    def _fake_attribute(self, name: str, tensor: torch.Tensor, is_buffer: bool) -> None:
        if is_buffer:
            self.buffers.add(name)
        if id(tensor) not in self._fake_of:
            fake = self.fake_like(tensor)
            if isinstance(tensor, torch.nn.Parameter):
                fake = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
            self._pair(tensor, fake)
            if is_buffer and tensor.device.type != "meta" and tensor_bytes(tensor) <= _SMALL_BUFFER_BYTES:
                self.real_buffers[name] = tensor.detach().clone()
        self.fakes_by_name[name] = self._fake_of[id(tensor)]

    def fake_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake tensor with the metadata of ``tensor`` on the device of the run."""
        if tensor.layout != torch.strided:
            return self.fake_mode.from_tensor(tensor.detach())
        with self.fake_mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self._device)

    @contextlib.contextmanager
    def fakes_in_place(self) -> Iterator[None]:
        """The model's tensors are fakes inside."""
        self._put(lambda tensor: self._fake_of[id(tensor)])
        try:
            yield
        finally:
            replaced = [(path, name, tensor) for path, module in self.modules.items()
                        for name, tensor in module._buffers.items() if tensor is not None
                        and tensor is not self._fake_of.get(id(self._tensors[path][1].get(name)))]
            self._reassigned = {path: name for path, name, _ in replaced}
            self._grown = {path: name for path, name, tensor in replaced
                           if getattr(self._tensors[path][1].get(name), "shape", None) != tensor.shape}
            self._put(lambda tensor: tensor)

    def _put(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for path, module in self.modules.items():
            if isinstance(module, torch.jit.ScriptModule):
                continue                                # its tensors live in compiled code and stay where they are
            parameters, buffers = self._tensors[path]
            for own, table in ((parameters, module._parameters), (buffers, module._buffers)):
                table.clear()
                table.update({name: None if tensor is None else pick(tensor) for name, tensor in own.items()})
            if isinstance(module, torch.nn.RNNBase):
                module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]

    def changed(self) -> dict[str, str]:
        """Modules whose Python state the forward changed, with the attribute."""
        attributes = {path: difference(self._state[path], python_state(module))
                      for path, module in self.modules.items()}
        swapped = {path: "_modules" for path, module in self.modules.items()
                   if dict(module._modules) != self._children[path]}
        return {**{path: name for path, name in attributes.items() if name}, **swapped, **self._reassigned}

    def grown(self) -> dict[str, str]:
        """Modules that replaced a buffer by one of another shape: a table that grows with longer batches."""
        return self._grown

    def keeps_fakes(self) -> bool:
        """Whether the run has left tensors in the attributes of modules."""
        return any(isinstance(leaf, FakeTensor) for module in self.modules.values()
                   for name, value in vars(module).items() if name not in TENSOR_TABLES for leaf in shallow(value))

    def start_warm(self) -> None:
        """Take what the run has left in attributes as the state before the next one.

        A module that has swapped children is not the user's any more: no call of it stands for what was recorded.
        """
        self._state = {path: python_state(module) for path, module in self.modules.items()}
        self._children = {path: dict(module._modules) for path, module in self.modules.items()}
        swapped = [path for path, children in self._children.items() if children != self._children_at_start[path]]
        if swapped:
            self.reshaped = frozenset(path for path, state in self._state.items()
                                      if difference(self._state_at_start[path], state)) | frozenset(swapped)

    def restore_attributes(self) -> None:
        """Put all attributes back as they were before the run."""
        for path, module in self.modules.items():
            restore(module, self._state[path])
            restore_children(module, self._children[path])

    def run_for_real(self, module: torch.nn.Module, original: Callable, args: tuple, kwargs: dict,
                     known: Callable[[torch.Tensor], torch.Tensor | None]) -> tuple[object, Meter]:
        """Run ``module`` on real tensors: inputs that are ``known``, its own parameters when real, made-up ones
        where not.

        Returns what ``original(module, *args, **kwargs)`` gave, and what it took.
        """
        real_of = self._real_numbers(known)
        below = [m for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
        saved = [(dict(m._parameters), dict(m._buffers)) for m in below]
        meter = Meter()
        try:
            for m in below:
                for name, tensor in m._parameters.items():
                    m._parameters[name] = None if tensor is None else real_of(tensor)
                for name, tensor in m._buffers.items():
                    m._buffers[name] = None if tensor is None else real_of(tensor).clone()
            with DisableTorchFunction(), meter:
                output = original(module, *tree_map(args, real_of), **tree_map(kwargs, real_of))
        finally:
            for m, (parameters, buffers) in zip(below, saved):
                m._parameters.update(parameters)
                m._buffers.update(buffers)
        return output, meter

    def _real_numbers(self, known: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[object], object]:
        """A function that gives the real tensor for a fake, the same one each time; other objects as they are."""
        reals: dict[int, torch.Tensor] = {}

        def real_of(fake: object) -> object:
            if not isinstance(fake, torch.Tensor):
                return fake
            if id(fake) not in reals:
                tensor = self._own_of.get(id(fake), known(fake))
                if tensor is None or tensor.device.type == "meta":
                    tensor = made_up(fake, self._device)
                    if isinstance(fake, torch.nn.Parameter):
                        tensor = torch.nn.Parameter(tensor, requires_grad=fake.requires_grad)
                    elif fake.requires_grad:
                        tensor.requires_grad_()
                reals[id(fake)] = tensor
            return reals[id(fake)]
        return real_of

    def __exit__(self, *exc) -> None:
        self._state, self._children = self._state_at_start, self._children_at_start
        self.restore_attributes()
        self._stack.close()
        if any(trace() is not None for trace in self.traces):
            empty_caches()
