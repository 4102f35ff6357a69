"""Hold a model still while it is recorded: fakes in the place of its tensors, and everything put back afterwards."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from pipeengine.tracing.meter import Meter
from pipeengine.tracing.module_state import (
    TENSOR_TABLES,
    difference,
    empty_caches,
    python_state,
    quiet_globals,
    restore,
    shallow,
)
from pipeengine.tracing.pytree import tree_map
from pipeengine.tracing.recorder import made_up

_SMALL_BUFFER_BYTES = 1 << 24


class FakedModel:
    """Holds a model still while it is recorded: fakes in the place of its tensors, and everything put back afterwards."""

    def __init__(self, model: torch.nn.Module, device: torch.device):
        self._model, self._device = model, device
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self) -> FakedModel:
        self._stack = contextlib.ExitStack()
        self.traces: list = []
        self._stack.enter_context(quiet_globals())
        self._modules = dict(self._model.named_modules())
        self._tensors = {path: (dict(m._parameters), dict(m._buffers)) for path, m in self._modules.items()}
        self._attributes = {path: python_state(m) for path, m in self._modules.items()}
        self._fake_of: dict[int, torch.Tensor] = {}
        self.fakes_by_name: dict[str, torch.Tensor] = {}
        self.real_buffers: dict[str, torch.Tensor] = {}
        self.buffers: set[str] = set()
        self.plain: dict[int, str] = {}
        for path, module in self._modules.items():
            prefix = f"{path}." if path else ""
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    if isinstance(module, torch.jit.ScriptModule):
                        self._fake_of[id(tensor)] = tensor
                    self._fake_attribute(prefix + name, tensor, name in module._buffers)
            for name, value in vars(module).items():
                for tensor in (leaf for leaf in shallow(value) if isinstance(leaf, torch.Tensor)):
                    self.plain.setdefault(id(tensor), prefix + name)
        return self

    def _fake_attribute(self, name: str, tensor: torch.Tensor, is_buffer: bool) -> None:
        if is_buffer:
            self.buffers.add(name)
        made = self._fake_of.get(id(tensor))
        if made is None:
            made = self.fake_like(tensor)
            if isinstance(tensor, torch.nn.Parameter):
                made = torch.nn.Parameter(made, requires_grad=tensor.requires_grad)
            self._fake_of[id(tensor)] = made
            if is_buffer and tensor.device.type != "meta" and tensor.numel() * tensor.element_size() <= _SMALL_BUFFER_BYTES:
                self.real_buffers[name] = tensor.detach().clone()
        self.fakes_by_name[name] = made

    def fake_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake tensor with the metadata of ``tensor`` on the device of the run."""
        if tensor.layout != torch.strided:
            return self.fake.from_tensor(tensor.detach())
        with self.fake:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self._device)

    @contextlib.contextmanager
    def fakes_in_place(self) -> Iterator[None]:
        """The model's tensors are fakes inside."""
        self._put(lambda tensor: self._fake_of[id(tensor)])
        try:
            yield
        finally:
            self._reassigned = {path: name for path, m in self._modules.items() for name, tensor in m._buffers.items()
                                if tensor is not None and tensor is not
                                self._fake_of.get(id(self._tensors[path][1].get(name)))}
            self._put(lambda tensor: tensor)

    def _put(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for path, module in self._modules.items():
            if isinstance(module, torch.jit.ScriptModule):
                continue                                # its tensors live in compiled code and stay where they are
            parameters, buffers = self._tensors[path]
            for held, own in ((parameters, module._parameters), (buffers, module._buffers)):
                own.clear()
                own.update({name: None if tensor is None else pick(tensor) for name, tensor in held.items()})
            if isinstance(module, torch.nn.RNNBase):
                module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]

    def changed(self) -> dict[str, str]:
        """Modules whose Python state the forward changed, with the attribute."""
        found = {path: what for path, module in self._modules.items()
                 if (what := difference(self._attributes[path], python_state(module)))}
        return {**found, **self._reassigned}

    def keeps_fakes(self) -> bool:
        """Whether the run has left tensors in the attributes of modules."""
        return any(isinstance(leaf, FakeTensor) for module in self._modules.values() for name, value in vars(module).items()
                   if name not in TENSOR_TABLES for leaf in shallow(value))

    def start_warm(self) -> None:
        """Take what the run has left in attributes as the state before the next one."""
        self._first = self.__dict__.get("_first", self._attributes)
        self._attributes = {path: python_state(m) for path, m in self._modules.items()}

    def restore_attributes(self) -> None:
        for path, module in self._modules.items():
            restore(module, self._attributes[path])

    def run_for_real(self, module, original: Callable, args, kwargs, known: Callable) -> tuple[object, Meter]:
        """Run ``module`` on real tensors: inputs that are ``known``, its own parameters when real, made-up ones where not."""
        real = {id(fake): tensor for key, fake in self._fake_of.items() for tensor in [self._by_id(key)]}
        below = [m for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
        saved = [(dict(m._parameters), dict(m._buffers)) for m in below]
        made: dict[int, torch.Tensor] = {}

        def real_of(fake):
            if not isinstance(fake, torch.Tensor):
                return fake
            if id(fake) not in made:
                tensor = real.get(id(fake), known(fake))
                if tensor is None or tensor.device.type == "meta":
                    tensor = made_up(fake, self._device)
                    if isinstance(fake, torch.nn.Parameter):
                        tensor = torch.nn.Parameter(tensor, requires_grad=fake.requires_grad)
                    elif fake.requires_grad:
                        tensor.requires_grad_()
                made[id(fake)] = tensor
            return made[id(fake)]
        meter = Meter()
        try:
            for m in below:
                for name, tensor in m._parameters.items():
                    m._parameters[name] = None if tensor is None else real_of(tensor)
                for name, tensor in m._buffers.items():
                    m._buffers[name] = None if tensor is None else real_of(tensor).clone()
            with plain_torch(), meter:
                out = original(module, *tree_map(args, real_of), **tree_map(kwargs, real_of))
        finally:
            for m, (parameters, buffers) in zip(below, saved):
                m._parameters.update(parameters)
                m._buffers.update(buffers)
        return out, meter

    def _by_id(self, key: int) -> torch.Tensor:
        if "_originals" not in self.__dict__:
            self._originals = {id(t): t for parameters, buffers in self._tensors.values()
                               for t in (*parameters.values(), *buffers.values()) if t is not None}
        return self._originals[key]

    def __exit__(self, *exc) -> None:
        self._attributes = self.__dict__.get("_first", self._attributes)
        self.restore_attributes()
        self._stack.close()
        if any(trace() is not None for trace in self.traces):
            empty_caches()


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Torch functions inside go straight to torch, past any mode."""
    with torch._C.DisableTorchFunction():
        yield
