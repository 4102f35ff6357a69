"""Record any model that runs eagerly, unmodified, and leave it as it was.

The forward runs once on fake tensors (see ``recorder``). What cannot be held at operator grain makes the innermost enclosing
module one node, and the model is recorded again; at the root it is a ``CaptureError``.
"""
from __future__ import annotations

import contextlib
import functools
import gc
import logging
import random
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace as replace_fields

import numpy
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from pipeengine.dataflow import unstable_guard
from pipeengine.errors import CaptureError
from pipeengine.randomness import keyed
from pipeengine.recorder import Meter, Promote, Recorder, made_up
from pipeengine.recording import Modes, Recording
from pipeengine.structure import leaves, replace

_MAX_ATTEMPTS = 200
_SMALL_BUFFER_BYTES = 1 << 24


@dataclass(frozen=True)
class Inputs:
    """What a forward is called with: positional and keyword arguments, and the target of ``loss_fn``."""

    args: tuple
    kwargs: dict
    target: object = None

    @classmethod
    def of(cls, example: object, target: object = None) -> Inputs:
        """From a dict of keyword arguments, a tuple of positional ones, or one tensor."""
        if isinstance(example, Mapping):
            return cls((), dict(example), target)
        return cls(tuple(example) if isinstance(example, (tuple, list)) else (example,), {}, target)

    def everything(self) -> tuple:
        return self.args, self.kwargs, self.target


def capture(model: torch.nn.Module, example: object, *, loss_fn: Callable | None = None, target: object = None,
            device: torch.device | str | None = None, random_key: int | None = 0,
            warm: Mapping[str, str] | None = None) -> Recording:
    """Record one forward of ``model`` on ``example`` (a dict of keyword arguments or a tuple of positional ones).

    The loss is ``loss_fn(output, target)`` when given, else the model's own (``output.loss``, ``output["loss"]``, the first
    of a tuple when it is a scalar, or a scalar output). Needs no memory for parameters; they may be on meta. ``warm`` holds
    modules known to be kept whole from an earlier recording of the same model; ``random_key`` chooses the random numbers that a
    forward may look at. Changes nothing in the model or in any random state.

    Raises ``CaptureError`` naming the module and the line when the forward cannot be recorded faithfully.
    """
    inputs = example if isinstance(example, Inputs) else Inputs.of(example, target)
    device = torch.device(device) if device is not None else _device_of(model)
    sealed = {**_never_opened(model), **(warm or {})}

    def key(place: str):
        return keyed(random_key or 0, place, device)
    with _Held(model, device) as held:
        return _record_until_faithful(model, inputs, loss_fn, held, sealed, key)


def _record_until_faithful(model, inputs: Inputs, loss_fn, held: _Held, sealed: dict[str, str], key) -> Recording:
    watch_random = None
    warmed = False
    for _ in range(_MAX_ATTEMPTS):
        try:
            recording, drew, traces = _record(model, inputs, loss_fn, held, sealed, key, watch_random)
        except Promote as stop:
            _seal(model, sealed, stop.path, stop.reason)
            held.restore_attributes()
            continue
        if drew and watch_random is None:
            watch_random = _look_or_set
            continue
        changed = {path: what for path, what in held.changed().items() if path not in sealed}
        if not warmed and (changed or held.keeps_fakes()):
            # What only a first call sets is no state. A tensor that is kept for the next call is: the second recording,
            # which finds a fake of the first in its way, then says so.
            warmed = True
            held.start_warm()
            continue
        if changed:
            for path, what in changed.items():
                _seal(model, sealed, path, f"its forward changes self.{what}")
            held.restore_attributes()
            continue
        held.traces = traces
        return recording
    raise CaptureError(f"no faithful recording after {_MAX_ATTEMPTS} attempts; last kept whole: {list(sealed.items())[-1]}")


def _seal(model: torch.nn.Module, sealed: dict[str, str], path: str, reason: str) -> None:
    """Keep the module whole from now on, and with it its likes: layers of one class fail alike."""
    if not path:
        raise CaptureError(
            f"the model's own forward cannot be recorded: {reason}. Move that code into a submodule, which then stays one "
            "node of the graph, or replace it")
    if path in sealed:
        raise CaptureError(f"module {path} cannot be recorded even as one node: {reason}")
    kind = type(model.get_submodule(path))
    sealed[path] = reason
    if not kind.__module__.startswith("torch."):
        sealed.update({other: reason for other, module in model.named_modules()
                       if type(module) is kind and other and other not in sealed})


def _record(model, inputs: Inputs, loss_fn, held: _Held, sealed, key, watch_random) -> tuple[Recording, bool, list]:
    """One attempt. Also tells whether Python's or NumPy's random numbers were drawn outside of sealed modules."""
    recorder = Recorder(model, held.fake, attributes=held.fakes_by_name, real_buffers=held.real_buffers,
                        buffers=frozenset(held.buffers), plain=held.plain,
                        sealed=sealed, draw=key, run_for_real=held.run_for_real, watch_random=watch_random)
    faked: dict[int, torch.Tensor] = {}

    def fake_input(leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) not in faked:
            with _plain_torch():
                moved = leaf if leaf.device.type != "meta" else held.fake_like(leaf)
                faked[id(leaf)] = recorder.add_input(f"input{len(faked)}", moved)
        return faked[id(leaf)]
    args, kwargs, target = replace(inputs.everything(), fake_input)
    before = _python_random()
    try:
        with held.fakes_in_place(), _patched(model, recorder), recorder.watching():
            output = model(*args, **kwargs)
            loss = loss_fn(output, target) if loss_fn is not None else find_loss(output)
        return _finished(recorder, output, loss, before)
    finally:
        recorder.release()


def _finished(recorder: Recorder, output: object, loss: object, before: tuple) -> tuple[Recording, bool, list]:
    drew = _python_random() != before
    _set_python_random(before)
    if loss is not None and not isinstance(loss, torch.Tensor):
        raise CaptureError(f"loss_fn returned a {type(loss).__name__}, not a tensor")
    recording = recorder.finish(output, loss)
    guard = unstable_guard(recording)
    if guard is not None:
        raise Promote(guard.path, f"{guard.where}: its path depends on a buffer that it changes")
    return recording, drew, recorder.traces()


def find_loss(output: object) -> torch.Tensor | None:
    """The model's own loss: ``output.loss``, ``output["loss"]``, the first of a tuple when scalar, or a scalar output."""
    found = getattr(output, "loss", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("loss")
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if found is None:
        found = output
    return found if isinstance(found, torch.Tensor) and found.dim() == 0 and found.is_floating_point() else None


def _device_of(model: torch.nn.Module) -> torch.device:
    """Where the model will run: where its first real parameter is; for meta, the accelerator if there is one."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _never_opened(model: torch.nn.Module) -> dict[str, str]:
    """Modules that stay one node whatever their forward does, and why."""
    found = {}
    for path, module in model.named_modules():
        reason = _reason_to_keep_whole(module)
        if reason and not path:
            raise CaptureError(f"the model itself {reason}; a pipeline would not run that. Remove it, or wrap the part that "
                               "needs it in a submodule")
        if reason:
            found[path] = reason
    return found


_HOOKS = {"_forward_hooks": "has forward hooks", "_forward_pre_hooks": "has forward pre-hooks",
          "_backward_hooks": "has backward hooks", "_backward_pre_hooks": "has backward pre-hooks"}


def _reason_to_keep_whole(module: torch.nn.Module) -> str:
    for attribute, reason in _HOOKS.items():
        if any(not _is_inert(hook) for hook in getattr(module, attribute).values()):
            return reason
    if getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule":
        return "is compiled"
    if isinstance(module, torch.jit.ScriptModule):
        return "is a TorchScript module"
    if type(module).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
        return f"is wrapped in {type(module).__name__}"
    if any(type(p) not in (torch.nn.Parameter, torch.Tensor, FakeTensor) for p in module.parameters(recurse=False)):
        return "has parameters of a tensor subclass"
    return ""


def _is_inert(hook: Callable) -> bool:
    """Hooks that Hugging Face leaves on layers act only while its own collector is active."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def _python_random() -> tuple:
    kind, keys, position, has_gauss, cached = numpy.random.get_state()
    return random.getstate(), (kind, keys.tobytes(), position, has_gauss, cached)


def _look_or_set(state: tuple | None = None) -> tuple | None:
    return _python_random() if state is None else _set_python_random(state)


def _set_python_random(state: tuple) -> None:
    random.setstate(state[0])
    kind, keys, position, has_gauss, cached = state[1]
    numpy.random.set_state((kind, numpy.frombuffer(keys, dtype=numpy.uint32), position, has_gauss, cached))


class _Held:
    """Holds a model still while it is recorded: fakes in the place of its tensors, and everything put back afterwards."""

    def __init__(self, model: torch.nn.Module, device: torch.device):
        self._model, self._device = model, device
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self) -> _Held:
        self._stack = contextlib.ExitStack()
        self.traces: list = []
        self._stack.enter_context(_quiet_globals())
        self._modules = dict(self._model.named_modules())
        self._tensors = {path: (dict(m._parameters), dict(m._buffers)) for path, m in self._modules.items()}
        self._attributes = {path: _picture(m) for path, m in self._modules.items()}
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
                for tensor in (leaf for leaf in _shallow(value) if isinstance(leaf, torch.Tensor)):
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
                 if (what := _difference(self._attributes[path], _picture(module)))}
        return {**found, **self._reassigned}

    def keeps_fakes(self) -> bool:
        """Whether the run has left tensors in the attributes of modules."""
        return any(isinstance(leaf, FakeTensor) for module in self._modules.values() for name, value in vars(module).items()
                   if name not in _TENSOR_TABLES for leaf in _shallow(value))

    def start_warm(self) -> None:
        """Take what the run has left in attributes as the state before the next one."""
        self._first = self.__dict__.get("_first", self._attributes)
        self._attributes = {path: _picture(m) for path, m in self._modules.items()}

    def restore_attributes(self) -> None:
        for path, module in self._modules.items():
            _restore(module, self._attributes[path])

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
            with _plain_torch(), meter:
                out = original(module, *replace(args, real_of), **replace(kwargs, real_of))
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
            _empty_caches()


def _empty_caches() -> None:
    """A cached function of the user's may have kept a fake tensor; it shall make a real one next time."""
    for found in gc.get_objects():
        if type(found) is functools._lru_cache_wrapper and found.cache_info().currsize and _holds_fakes(found):
            found.cache_clear()


def _holds_fakes(cache: object) -> bool:
    """Whether an ``lru_cache`` holds fakes: in its links, their contents, or what those hold directly."""
    layer = [cache]
    for _ in range(5):
        layer = [x for x in gc.get_referents(*layer) if type(x) not in (type, types.ModuleType, types.FunctionType)]
        if any(type(x) is FakeTensor for x in layer):
            return True
    return False


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Whatever runs inside leaves no trace in buffers, attributes or random states."""
    modules = dict(model.named_modules())
    attributes = {path: _picture(module) for path, module in modules.items()}
    buffers = {path: {name: (tensor, tensor.detach().clone()) for name, tensor in module._buffers.items() if tensor is not None}
               for path, module in modules.items()}
    with _quiet_globals():
        try:
            yield
        finally:
            for path, module in modules.items():
                _restore(module, attributes[path])
                for name, (tensor, value) in buffers[path].items():
                    with torch.no_grad():
                        tensor.copy_(value)
                    module._buffers[name] = tensor


@contextlib.contextmanager
def _plain_torch() -> Iterator[None]:
    with torch._C.DisableTorchFunction():
        yield


_TENSOR_TABLES = ("_parameters", "_buffers", "_modules", "_flat_weights", "_non_persistent_buffers_set")


def _shallow(value: object) -> list:
    """``value`` and, for a plain container, what it holds."""
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple, set)) else [value]


def _picture(module: torch.nn.Module) -> dict[str, tuple]:
    """The Python state of a module: every attribute, with the contents of plain containers."""
    return {name: (value, _contents(value)) for name, value in vars(module).items() if name not in _TENSOR_TABLES}


def _contents(value: object) -> object:
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, (list, set)) or type(value).__name__ == "deque":
        return list(value)
    return None


def _difference(before: dict[str, tuple], after: dict[str, tuple]) -> str:
    """Name of the first attribute that is not what it was, or an empty text. Tensors are data, not state."""
    for name in {**before, **after}:
        if name not in after:
            return name
        value, contents = after[name]
        if all(isinstance(leaf, FakeTensor) or leaf is None for leaf in _shallow(value)) and name not in before:
            continue
        old, old_contents = before.get(name, (None, None))
        if isinstance(value, torch.Tensor) or isinstance(old, torch.Tensor):
            continue
        same = value is old or (isinstance(value, (int, float, str, bool)) and type(value) is type(old) and value == old)
        if not same or not _same_contents(old_contents, contents):
            return name
    return ""


def _same_contents(before: object, after: object) -> bool:
    if isinstance(before, dict) and isinstance(after, dict):
        return list(before) == list(after) and all(before[k] is after[k] or _is_number(before[k]) and before[k] == after[k]
                                                   or isinstance(after[k], FakeTensor) for k in after)
    if isinstance(before, list) and isinstance(after, list):
        return len(before) == len(after) and all(a is b or isinstance(b, FakeTensor) for a, b in zip(before, after))
    return before is None and after is None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, bool, str))


def _restore(module: torch.nn.Module, before: dict[str, tuple]) -> None:
    for name in [name for name in vars(module) if name not in _TENSOR_TABLES]:
        _restore_attribute(module, name, before)
    for name in before:
        if name not in vars(module):
            _restore_attribute(module, name, before)


def _restore_attribute(module: torch.nn.Module, name: str, before: dict[str, tuple]) -> None:
    if name not in before:
        del vars(module)[name]
        return
    value, contents = before[name]
    vars(module)[name] = value
    if contents is None or _same_contents(contents, _contents(value)):
        return
    value.clear()
    (value.update if isinstance(value, (dict, set)) else value.extend)(contents)


@contextlib.contextmanager
def _quiet_globals() -> Iterator[None]:
    """Random states and the autocast cache come out as they went in."""
    python = _python_random()
    cache = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    log = logging.getLogger("torch._subclasses.fake_tensor")    # a kernel that cannot be faked is no news here
    level = log.level
    log.setLevel(logging.CRITICAL)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = [] if accelerator is None else list(range(torch.accelerator.device_count()))
    try:
        with torch.random.fork_rng(devices, device_type=accelerator.type if accelerator else "cuda"):
            yield
    finally:
        log.setLevel(level)
        _set_python_random(python)
        torch.set_autocast_cache_enabled(cache)


@contextlib.contextmanager
def _patched(model: torch.nn.Module, recorder: Recorder) -> Iterator[None]:
    """Send module calls, autograd functions and changes of random state to the recorder; put everything back after."""
    with contextlib.ExitStack() as stack:
        classes = {cls for module in model.modules() for cls in type(module).__mro__ if "__call__" in vars(cls)}
        for cls in classes:
            if issubclass(cls, torch.nn.Module):
                _set(stack, cls, "__call__", _through(recorder, vars(cls)["__call__"]))
        base = torch.autograd.function._SingleLevelFunction
        original_apply = base.apply.__func__ if hasattr(base.apply, "__func__") else None
        _set(stack, base, "apply", classmethod(_apply_through(recorder, original_apply)))
        for owner, name in ((torch, "manual_seed"), (torch, "set_rng_state"), (torch, "seed"),
                            (torch.random, "manual_seed"), (torch.random, "set_rng_state"), (torch.random, "fork_rng")):
            _set(stack, owner, name, _refuse(recorder, getattr(owner, name), "sets the state of the random numbers"))
        for name in ("from_numpy", "frombuffer"):
            _set(stack, torch, name, _refuse(recorder, getattr(torch, name), f"calls torch.{name}"))
        hub = sys.modules.get("transformers.utils.import_utils")
        if hub is not None and hasattr(hub, "is_fake_tensor"):
            # It takes other paths for fake tensors than for real ones; the recording must take the real ones' path.
            _set(stack, hub, "is_fake_tensor", lambda tensor: False)
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _set(stack: contextlib.ExitStack, owner: object, name: str, value: object) -> None:
    inherited = isinstance(owner, type) and name not in vars(owner)
    old = None if inherited else (vars(owner)[name] if isinstance(owner, type) else getattr(owner, name))
    setattr(owner, name, value)
    stack.callback(delattr, owner, name) if inherited else stack.callback(setattr, owner, name, old)


def _through(recorder: Recorder, original: Callable) -> Callable:
    def __call__(module, *args, **kwargs):
        return recorder.call_module(original, module, args, kwargs)
    return __call__


def _apply_through(recorder: Recorder, original: Callable | None) -> Callable:
    def call(cls, *args, **kwargs):
        if original is not None:
            return original(cls, *args, **kwargs)
        return super(torch.autograd.function._SingleLevelFunction, cls).apply(*args, **kwargs)

    def apply(cls, *args, **kwargs):
        return recorder.apply_function(call, cls, args, kwargs)
    return apply


def _refuse(recorder: Recorder, original: Callable, what: str) -> Callable:
    def stand_in(*args, **kwargs):
        if recorder._suspended:
            return original(*args, **kwargs)
        raise Promote(recorder._path(), what)
    return stand_in
