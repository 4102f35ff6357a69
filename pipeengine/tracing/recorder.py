"""Watch one eager forward run on fake tensors, and write down what happens.

``Recorder`` is a ``TorchFunctionMode``: every torch function that the model's Python calls passes through it, with a fake
tensor (shape, dtype, strides, device, no memory) in the place of each real one. Values that follow from the model's inputs
also exist for real on the side, so that a forward that looks at its inputs (``if mask.all()``) takes the path that eager
execution takes; what it saw becomes a guard. A forward that looks at anything else cannot be written down at this grain:
``NotTraceable`` then names the innermost module, which becomes one node.
"""
from __future__ import annotations

import contextlib
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode, resolve_name

from pipeengine.errors import CaptureError
from pipeengine.tracing.meter import Meter, kept_bytes, tensor_bytes
from pipeengine.tracing.modes import current_modes
from pipeengine.tracing.pytree import leaves, tensors, tree_encode, tree_map
from pipeengine.tracing.recording import (
    OPAQUE,
    Call,
    Guard,
    Node,
    NodeCost,
    Recording,
    Ref,
    TensorSpec,
    Value,
    picks,
    refs,
)

# What these tell follows from shapes and types, which are part of a recording's key.
_METADATA = frozenset({
    "size", "dim", "ndimension", "stride", "numel", "nelement", "element_size", "itemsize", "nbytes", "is_contiguous",
    "is_floating_point", "is_complex", "is_signed", "storage_offset", "get_device", "type", "is_conj", "is_neg",
    "is_inference", "is_pinned", "dim_order", "is_same_size", "result_type", "can_cast", "__len__", "__hash__", "__repr__",
    "__format__", "__str__", "has_names", "is_shared", "_is_view", "is_nested", "promote_types", "untyped_storage",
    "dense_dim", "sparse_dim", "is_coalesced", "is_distributed", "is_set_to", "_nested_tensor_size", "names", "is_tensor",
    "is_storage", "broadcast_shapes", "get_default_dtype", "_has_compatible_shallow_copy_type", "is_autocast_enabled"})
_EFFECTS = frozenset({"register_hook", "retain_grad", "register_post_accumulate_grad_hook", "_assert_async"})
_NEW_STATE = frozenset({"backward", "__deepcopy__", "__reduce_ex__", "__setstate__", "data_ptr", "share_memory_"})
_DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)
_REAL_SIDE_LIMIT_BYTES = 1 << 28


class NotTraceable(BaseException):
    """The forward did what a recording at this grain cannot hold; ``path`` is the module where.

    Not an ``Exception``, so that a ``try`` in the user's forward does not swallow it.
    """

    def __init__(self, path: str, reason: str):
        super().__init__(reason)
        self.path, self.reason = path, reason


class Recorder(TorchFunctionMode):
    """Records what happens while it is entered; ``finish`` gives the ``Recording``."""

    def __init__(self, model: torch.nn.Module, fake: FakeTensorMode, *, attributes: Mapping[str, torch.Tensor],
                 real_buffers: Mapping[str, torch.Tensor], buffers: frozenset[str], plain: Mapping[int, str], leaf_modules: Mapping[str, str],
                 rng: Callable[[str], contextlib.AbstractContextManager], run_for_real: Callable,
                 watch_random: Callable[..., object] | None = None):
        super().__init__()
        self._fake, self._leaf_modules, self._rng, self._run_for_real = fake, dict(leaf_modules), rng, run_for_real
        self._watch_random = watch_random
        self._plain, self._buffers = plain, buffers
        self._paths = {module: path for path, module in model.named_modules()}
        self._all_paths: dict[torch.nn.Module, str] = {}
        self._values: list[list] = []                   # kind, name, node, tensor
        self._value_of: dict[int, int] = {}             # id of a tensor -> value; tensors are kept alive below
        self._alive: list[torch.Tensor] = []
        self._real: dict[int, torch.Tensor] = {}        # value -> the real tensor beside the fake one
        self._constants: dict[int, torch.Tensor] = {}
        self._fake_constant: dict[int, torch.Tensor] = {}
        self._nodes: list[Node] = []
        self._calls: list[Call | None] = []
        self._guards: list[Guard] = []
        self._stack: list[int] = []
        self._scopes: list[str] = []
        self._names: Counter[str] = Counter()
        self._calls_of: Counter[str] = Counter()
        self._suspended = 0
        self._running: list = []                        # modules whose outermost __call__ is active
        self._saved: dict[int, int] = {}
        self._attribute_storage: set[int] = set()
        self._pending_real: dict[int, torch.Tensor] = {}
        self.meter = Meter()
        self._inputs: list[int] = []
        self._base_modes = current_modes()
        self._attribute_value: dict[str, int] = {}
        for name, tensor in attributes.items():
            value = self._value_of.get(id(tensor))
            if value is None:
                value = self._add("attribute", name, -1, tensor)
                self._attribute_storage.add(_storage(tensor))
                if name in real_buffers:
                    self._real[value] = real_buffers[name]
            self._attribute_value[name] = value

    def _attributes_below(self, module: torch.nn.Module) -> tuple[int, ...]:
        found = [self._value_of.get(id(t)) for t in
                 (*module.parameters(), *module.buffers())]
        return tuple(dict.fromkeys(v for v in found if v is not None))

    # -- values -----------------------------------------------------------------------------------------------------

    def _add(self, kind: str, name: str, node: int, tensor: torch.Tensor) -> int:
        self._value_of[id(tensor)] = value = len(self._values)
        self._values.append([kind, name, node, tensor])
        self._alive.append(tensor)
        return value

    def add_input(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Make a fake for an input and remember the real one beside it."""
        fake = tensor if isinstance(tensor, FakeTensor) else self._fake.from_tensor(tensor.detach(), static_shapes=True)
        if id(fake) in self._value_of:
            fake = fake.detach()
        value = self._add("input", name, -1, fake)
        if not isinstance(tensor, FakeTensor):
            self._real[value] = tensor.detach().clone()     # the forward may write to it; the user's stays as it is
        self._inputs.append(value)
        return fake

    def _lookup(self, tensor: torch.Tensor) -> int:
        value = self._value_of.get(id(tensor))
        return self._adopt(tensor) if value is None else value

    def _adopt(self, tensor: torch.Tensor) -> int:
        """A tensor that no recorded step made: a constant, or something that escaped us."""
        if isinstance(tensor, FakeTensor):
            raise NotTraceable(self._path(), "a tensor was made where the recorder could not see it "
                                        "(stored by a module that is kept whole, or by code outside torch)")
        name = self._plain.get(id(tensor), "")
        if tensor.requires_grad:
            raise CaptureError(
                f"{self._where()}: a tensor of shape {tuple(tensor.shape)} that needs a gradient"
                f"{f' ({name})' if name else ''} is not a registered parameter of the model; register it (nn.Parameter "
                "as an attribute of a module, or nn.ParameterList) or detach it")
        if tensor.device.type == "meta":
            raise CaptureError(f"{self._where()}: the plain tensor attribute {name or 'used here'} is on the meta device; "
                               "register it as a buffer")
        value = self._add("constant", name or f"constant{len(self._constants)}", -1, tensor)
        self._constants[value] = tensor
        self._fake_constant[value] = self._fake.from_tensor(tensor, static_shapes=True)
        self._real[value] = tensor.clone() if tensor_bytes(tensor) < _REAL_SIDE_LIMIT_BYTES else None
        if self._real[value] is None:
            del self._real[value]
        return value

    def _encode(self, value: object) -> object:
        return tree_encode(value, lambda leaf: Ref(self._lookup(leaf)) if isinstance(leaf, torch.Tensor) else leaf)

    def _output_template(self, out: object) -> object:
        """``out`` with Refs for the tensors that are known; objects of the run itself are not kept."""
        def template(leaf):
            if isinstance(leaf, torch.Tensor):
                return Ref(self._value_of[id(leaf)]) if id(leaf) in self._value_of else OPAQUE
            return leaf if _is_shareable(leaf) else OPAQUE
        return tree_encode(out, template)

    def _fakes(self, value: object) -> object:
        """``value`` with constants replaced by their fakes."""
        if not self._constants:
            return value
        return tree_map(value, lambda leaf: self._fake_constant.get(self._value_of.get(id(leaf), -1), leaf)
                       if isinstance(leaf, torch.Tensor) else leaf)

    def _reals(self, value: object) -> object | None:
        """``value`` with real tensors in place of the fakes, or None when some have none."""
        found = [self._value_of.get(id(t), -1) for t in tensors(value)]
        if any(v not in self._real for v in found):
            return None
        return tree_map(value, lambda leaf: self._real[self._value_of[id(leaf)]]
                       if isinstance(leaf, torch.Tensor) else leaf)

    # -- where we are -----------------------------------------------------------------------------------------------

    def _path(self) -> str:
        return self._calls_path[self._stack[-1]] if self._stack else ""

    @property
    def _calls_path(self) -> list[str]:
        return [call[0] if isinstance(call, list) else call.path for call in self._calls]

    def _where(self) -> str:
        here = f"module {self._path() or '(root)'}"
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and "pipeengine/" not in f.filename]
        return f"{here}, {frames[-1].filename}:{frames[-1].lineno}" if frames else here

    def _name(self, op: str) -> str:
        base = f"{self._scopes[-1] if self._scopes else ''}:{op}"
        self._names[base] += 1
        return base if self._names[base] == 1 else f"{base}.{self._names[base] - 1}"

    # -- torch functions --------------------------------------------------------------------------------------------

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._suspended:
            return func(*args, **kwargs)
        name = _short_name(func)
        if name == "__iter__":
            return iter(self.__torch_function__(torch.unbind, types, (args[0], 0)))
        if name in _METADATA or (name == "__get__" and _is_metadata_property(func)):
            return func(*args, **kwargs)
        if func is torch.Tensor.__deepcopy__ or name in _NEW_STATE:
            raise NotTraceable(self._path(), f"{name} on a tensor inside the forward")
        self._check_context()
        if isinstance(kwargs.get("generator"), torch.Generator):
            raise NotTraceable(self._path(), f"{name} draws from a generator of the model's own")
        if name in ("__contains__", "tolist", "item", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__",
                    "__complex__", "equal", "is_nonzero", "allclose"):
            return self._guarded(func, args, kwargs)
        return self._step(func, name, args, kwargs)

    def _check_context(self) -> None:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise NotTraceable(self._path(), "a function transform (vmap, grad, jvp) runs in its forward")
        top = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if top is not None and top[0] is not self._pack_hook and not _is_checkpoint(top[0]):
            raise NotTraceable(self._path(), "saved-tensor hooks are active in its forward")

    def _guarded(self, func, args, kwargs) -> object:
        """The Python value of a tensor, written down as a guard when it follows from the inputs."""
        encoded = self._encode((args, kwargs))
        real = self._reals((args, kwargs))
        if real is None:
            raise NotTraceable(self._path(), f"{self._where()}: {_short_name(func)}() reads the value of a tensor "
                                        "that depends on parameters or activations")
        with torch.no_grad():
            result = func(*real[0], **real[1])
        if _short_name(func) in ("numpy", "__array__"):
            result = result.copy()
        self._guards.append(Guard(func, encoded[0], encoded[1], result, len(self._nodes), self._path(), self._where()))
        return result

    def _step(self, func, name: str, args, kwargs) -> object:
        """Run one function on fakes (and for real where it follows from the inputs), and write the node."""
        encoded = self._encode((args, kwargs))
        reads = [t for t in tensors((args, kwargs))]
        fakes = self._fakes((args, kwargs))
        watched = _watch(tensors(fakes))
        node_name = self._name(name if name not in ("__get__", "__set__") else func.__self__.__name__)
        self.meter.clear()
        self._saved = {}
        try:
            out = self._run_fake(func, *fakes)
        except _DATA_DEPENDENT as error:
            out = self._from_real_or_promote(func, args, kwargs, error)
        if out is NotImplemented:
            return out
        random = self.meter.random
        writes = _written(watched)
        if name == "__set__":
            writes.add(_storage(fakes[0][0]))
        self._run_real(func, args, kwargs, reads, out, writes, random, node_name)
        return self._write(node_name, func, False, encoded, out, writes, random, name, reads)

    def _run_fake(self, func, args, kwargs):
        with self._fake, self.meter:
            return func(*args, **kwargs)

    def _from_real_or_promote(self, func, args, kwargs, error: Exception) -> object:
        """The shape of the result depends on the data: take it from the real values, and guard it.

        Where there are none, made-up numbers must give the same shape twice: then the data do not matter to it after all.
        """
        real = self._reals((args, kwargs))
        if real is not None:
            with torch.no_grad():
                result = func(*real[0], **real[1])
            self._shape_guards = True
            return self._fakes_of(result, needs_gradient=False)
        tries = [self._try_out(func, args, kwargs, number) for number in (0, 1)]
        if None in tries or _shapes(tries[0]) != _shapes(tries[1]):
            raise NotTraceable(self._path(), f"{self._where()}: {type(error).__name__}: {error}") from error
        needs = torch.is_grad_enabled() and any(t.requires_grad for t in tensors((args, kwargs)))
        return self._fakes_of(tries[0], needs_gradient=needs)

    def _try_out(self, func, args, kwargs, number: int) -> object | None:
        """Run ``func`` on made-up numbers where there are no real ones."""
        def real_of(leaf):
            if not isinstance(leaf, torch.Tensor):
                return leaf
            known = self._real.get(self._value_of.get(id(leaf), -1))
            return made_up(leaf, leaf.device, number) if known is None else known
        try:
            with self._rng(f"made up {number}"), torch.no_grad():
                return func(*tree_map(args, real_of), **tree_map(kwargs, real_of))
        except Exception:
            return None

    def _fakes_of(self, result: object, *, needs_gradient: bool) -> object:
        """Fakes that look like the tensors in ``result``; floating-point ones follow from something trained if asked."""
        anchor = None
        if needs_gradient:
            with self._fake:
                anchor = torch.zeros((), requires_grad=True)

        def fake_of(leaf):
            if not isinstance(leaf, torch.Tensor):
                return leaf
            with self._fake:
                made = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
                return made + anchor if needs_gradient and leaf.is_floating_point() else made
        return tree_map(result, fake_of)

    def _run_real(self, func, args, kwargs, reads, out, writes: set[int], random: bool, node_name: str) -> None:
        """Keep the real values beside the fakes, or drop those that a step with unknown values wrote to."""
        made = tensors(out)
        real = self._reals((args, kwargs))
        small = all(tensor_bytes(t) <= _REAL_SIDE_LIMIT_BYTES for t in made)
        if real is not None and small and not any(t.requires_grad for t in made):
            with torch.no_grad(), (self._rng(node_name) if random else contextlib.nullcontext()):
                result = func(*real[0], **real[1])
            for fake, found in zip(made, tensors(result)):
                if id(fake) not in self._value_of:
                    self._pending_real[id(fake)] = found
        elif writes:
            for value, (_, _, _, tensor) in enumerate(self._values):
                if value in self._real and _storage(self._fake_constant.get(value, tensor)) in writes:
                    del self._real[value]

    def _write(self, name: str, target, is_module: bool, encoded, out, writes, random, op: str, reads,
               attributes=(), recompute=False) -> object:
        """Add the node for what has just run. A pure step that only returned what it was given adds nothing."""
        found = leaves(out)
        fresh = [(i, t) for i, t in enumerate(found) if isinstance(t, torch.Tensor) and id(t) not in self._value_of]
        if not is_module and not tensors(out) and out is not None and op not in _EFFECTS and not writes:
            return self._python_result(target, encoded, out)
        effect = op in _EFFECTS or (out is None and not writes and not is_module and bool(reads))
        if not (fresh or writes or effect or is_module):
            return out
        index = len(self._nodes)
        for position, tensor in fresh:
            value = self._add("result", name if len(fresh) == 1 else f"{name}[{position}]", index, tensor)
            if id(tensor) in self._pending_real:
                self._real[value] = self._pending_real[id(tensor)]
        self._pending_real.clear()
        results = tuple(self._value_of[id(tensor)] for _, tensor in fresh)
        cost = NodeCost(self.meter.flops, self.meter.bytes, tuple(self._saved.items()))
        self._nodes.append(Node(name, target, is_module, encoded[0], encoded[1], results,
                                picks(self._output_template(out), results),
                                self._stack[-1] if self._stack else -1, current_modes(), frozenset(writes), attributes,
                                random, effect, recompute, cost))
        if self._shape_guards:
            self._shape_guards = False
            for value in results:
                self._guards.append(Guard(None, (Ref(value),), {}, tuple(self._values[value][3].shape), index + 1,
                                          self._path(), self._where()))
        return out

    _shape_guards = False

    def _python_result(self, func, encoded, out) -> object:
        """A function of tensors returned no tensor: burnt in, so it must follow from the inputs."""
        reads = [v for v in refs(encoded)]
        if not reads:
            return out
        if any(v not in self._real for v in reads):
            raise NotTraceable(self._path(), f"{self._where()}: {_short_name(func)} turns a tensor into "
                                        f"{type(out).__name__}, which a recording would freeze")
        self._guards.append(Guard(func, encoded[0], encoded[1], out, len(self._nodes), self._path(), self._where()))
        return out

    # -- modules ----------------------------------------------------------------------------------------------------

    def call_module(self, original: Callable, module: torch.nn.Module, args: tuple, kwargs: dict) -> object:
        """Stands in for ``module.__call__`` while recording; ``original`` is the class's own."""
        if self._suspended or module not in self._paths:
            return original(module, *args, **kwargs)
        if self._running and self._running[-1][0] is module:
            return self._inner_call(original, module, args, kwargs)
        path = self._paths[module]
        if path in self._leaf_modules or (_is_leaf(module) and self._own_parameters(module)) or self._recompute_here():
            return self._whole(original, module, path, args, kwargs)
        return self._open(original, module, path, args, kwargs)

    def _inner_call(self, original, module, args, kwargs) -> object:
        """The base-class call inside an overridden ``__call__``: transparent only when it passes on what it got."""
        if self._recompute_here():
            raise NotTraceable(self._paths[module], "it recomputes its activations in backward")
        state = self._running[-1]
        same = [id(x) for x in leaves((args, kwargs))] == state[1] and not state[3]
        out = original(module, *args, **kwargs)
        state[2] = [id(x) for x in leaves(out)] if same else None
        state[3] = True
        return out

    def _own_parameters(self, module: torch.nn.Module) -> bool:
        """Whether the module still holds its registered tensors (functional_call puts others in their place)."""
        return all(id(t) in self._value_of and self._values[self._value_of[id(t)]][0] == "attribute"
                   for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)

    def _recompute_here(self) -> bool:
        top = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return self._in_reentrant or (top is not None and top[0] is not self._pack_hook and _is_checkpoint(top[0]))

    _in_reentrant = False

    def _scope(self, path: str) -> str:
        self._calls_of[path] += 1
        count = self._calls_of[path]
        return path if count == 1 else f"{path}#{count - 1}"

    def _open(self, original, module, path: str, args: tuple, kwargs: dict) -> object:
        scope = self._scope(path)
        plain = all(isinstance(leaf, torch.Tensor) or _is_shareable(leaf) for leaf in leaves((args, kwargs)))
        encoded = tree_encode((args, kwargs), lambda leaf: Ref(self._lookup(leaf)) if isinstance(leaf, torch.Tensor)
                         else leaf if _is_shareable(leaf) else OPAQUE)
        containers = [(c, len(c)) for c in (*args, *kwargs.values()) if isinstance(c, (list, dict))]
        index, parent = len(self._calls), self._stack[-1] if self._stack else -1
        self._calls.append([path])
        start = len(self._nodes)
        self._stack.append(index)
        self._scopes.append(scope)
        self._running.append([module, [id(x) for x in leaves((args, kwargs))], None, False])
        before = self._watch_random() if self._watch_random else None
        try:
            out = original(module, *args, **kwargs)
        except CaptureError:
            raise
        except Exception as error:
            raise NotTraceable(path, f"{type(error).__name__}: {error}") from error
        finally:
            self._stack.pop()
            self._scopes.pop()
            state = self._running.pop()
        if state[3] and state[2] != [id(x) for x in leaves(out)]:
            raise NotTraceable(path, "its class wraps __call__")
        if before is not None and before != self._watch_random():
            raise NotTraceable(path, "its forward draws from Python's or NumPy's random numbers")
        if any(len(c) != count for c, count in containers):
            plain = False
        output = self._output_template(out)
        self._calls[index] = Call(path, scope, parent, start, len(self._nodes), encoded[0], encoded[1], output,
                                  current_modes(), plain)
        return out

    def _whole(self, original, module, path: str, args: tuple, kwargs: dict) -> object:
        """Call a module as one node: a leaf of torch.nn, or one that must not be opened."""
        scope = self._scope(path)
        attributes = self._attributes_below(module)
        strange = [x for x in leaves((args, kwargs)) if not isinstance(x, torch.Tensor) and not _is_shareable(x)]
        if strange:
            raise CaptureError(
                f"module {path} is kept whole ({self._leaf_modules.get(path, 'recomputed')}) and is given a "
                f"{type(strange[0]).__name__}, an object born in the forward that cannot be made again for every "
                "micro-batch; switch it off (for a Hugging Face cache: model.config.use_cache = False)")
        encoded = self._encode((args, kwargs))
        fakes = self._fakes((args, kwargs))
        held = [self._values[v][3] for v in attributes]
        watched = _watch((*tensors(fakes), *held))
        self.meter.clear()
        self._saved = {}
        recompute = self._recompute_here()
        before = self._watch_random() if self._watch_random else None
        self._suspended += 1
        try:
            with self._fake, self.meter:
                out = original(module, *fakes[0], **fakes[1])
        except Exception as error:
            out = self.learn(module, path, original, fakes, error)
        finally:
            self._suspended -= 1
        if before is not None:
            self._watch_random(before)          # what a whole module draws is its own affair
        unknown = [x for x in leaves(out) if not isinstance(x, torch.Tensor) and not _is_shareable(x)]
        if unknown:
            raise CaptureError(f"module {path} is kept whole ({self._leaf_modules.get(path, 'a leaf')}) and returns a "
                               f"{type(unknown[0]).__name__}, which cannot cross to another stage; return tensors")
        writes = _written(watched)
        reads = tensors((args, kwargs))
        random = self.meter.random
        if recompute:
            self._saved = {_storage(t): kept_bytes(t) for t in reads if t.requires_grad}
        if not attributes and path not in self._leaf_modules:
            self._run_real(lambda *a, **k: self._quietly(original, module, a, k), args, kwargs, reads, out, writes,
                           random, scope)
        elif writes:
            self._run_real(None, args, kwargs, [], out, writes, random, scope)
        return self._write(scope, path, True, encoded, out, writes, random, "", reads, attributes, recompute)

    def _quietly(self, original, module, args, kwargs) -> object:
        self._suspended += 1
        try:
            return original(module, *args, **kwargs)
        finally:
            self._suspended -= 1

    def learn(self, module, path: str, original, fakes, error: Exception) -> object:
        """Run a module on made-up real tensors to learn what its output looks like."""
        def known(fake):
            return self._real.get(self._value_of.get(id(fake), -1))
        torch._C._autograd._pop_saved_tensors_default_hooks()       # function transforms do not work under such hooks
        try:
            out, cost = self._run_for_real(module, original, *fakes, known)
        except Exception as real_error:
            raise CaptureError(f"module {path or '(root)'} cannot run: {type(real_error).__name__}: {real_error}"
                               ) from real_error
        finally:
            torch._C._autograd._push_saved_tensors_default_hooks(*self._hooks)
        needs = torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors(fakes), *module.parameters()))
        result = self._fakes_of(out, needs_gradient=needs)
        self.meter.flops, self.meter.bytes, self.meter.random = cost.flops, cost.bytes, cost.random
        return result

    # -- custom autograd functions ----------------------------------------------------------------------------------

    def apply_function(self, original: Callable, cls: type, args: tuple, kwargs: dict) -> object:
        """Stands in for ``torch.autograd.Function.apply``."""
        if self._suspended:
            return original(cls, *args, **kwargs)
        if cls.__name__ == "CheckpointFunction":
            run, _, *inputs = args
            self._in_reentrant = True
            try:
                return run(*inputs)
            finally:
                self._in_reentrant = False
        self._suspended += 1
        try:
            name = cls.__name__

            def apply(*a, **k):
                return original(cls, *a, **k)
            apply.__name__ = name
            encoded = self._encode((args, kwargs))
            fakes = self._fakes((args, kwargs))
            watched = _watch(tensors(fakes))
            self.meter.clear()
            self._saved = {}
            try:
                out = self._run_fake(apply, *fakes)
            except Exception as error:
                raise NotTraceable(self._path(), f"autograd function {name}: {type(error).__name__}: {error}") from error
            writes = _written(watched)
            random = self.meter.random
            node_name = self._name(name)
            self._run_real(apply, args, kwargs, tensors((args, kwargs)), out, writes, random, node_name)
            return self._write(node_name, cls.apply, False, encoded, out, writes, random, name, tensors((args, kwargs)))
        finally:
            self._suspended -= 1

    # -- running ----------------------------------------------------------------------------------------------------

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = _storage(tensor)
        if storage not in self._attribute_storage:
            self._saved[storage] = kept_bytes(tensor)
        # A step that saves its own output would hold itself alive for ever through it.
        return tensor if id(tensor) in self._value_of else tensor.detach()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Record everything that runs inside."""
        self._pack_hook = self._pack
        self._hooks = (self._pack_hook, _same)
        with torch.autograd.graph.saved_tensors_hooks(*self._hooks), self:
            yield

    def finish(self, output: object, loss: torch.Tensor | None) -> Recording:
        """Freeze what was seen. ``output`` is the model's output, ``loss`` a tensor met on the way."""
        structure = tree_encode(output, lambda leaf: Ref(self._lookup(leaf)) if isinstance(leaf, torch.Tensor)
                           else leaf if _is_shareable(leaf) else None)
        values = tuple(Value(kind, name, node, _spec(tensor), _storage(self._fake_constant.get(index, tensor)))
                       for index, (kind, name, node, tensor) in enumerate(self._values))
        return Recording(values, tuple(self._nodes), tuple(self._calls), tuple(self._guards), tuple(self._inputs),
                         structure, None if loss is None else self._lookup(loss), dict(self._constants),
                         dict(self._leaf_modules), self._buffers, self._base_modes)

    def release(self) -> None:
        """Let go of all tensors: autograd's own references to this recorder would keep them for ever."""
        for held in (self._values, self._alive, self._real, self._constants, self._fake_constant, self._value_of, self._pending_real):
            held.clear()
        self._run_for_real = None

    def traces(self) -> list[weakref.ref]:
        """Weak references to every fake that was made: whoever still holds one afterwards has taken it out of the run."""
        return [weakref.ref(tensor) for kind, _, _, tensor in self._values if kind == "result"]


def made_up(fake: torch.Tensor, device: torch.device, number: int = 0) -> torch.Tensor:
    """A real tensor that looks like ``fake``: small random numbers, or ``number`` for integers."""
    made = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=device)
    if fake.is_floating_point() or fake.is_complex():
        return made.normal_(0, 0.02)
    return made.fill_(1 - number if fake.dtype == torch.bool else number)


def _shapes(value: object) -> list:
    return [(t.shape, t.dtype) for t in tensors(value)]


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _watch(found: Iterable[torch.Tensor]) -> list[tuple]:
    """Remember tensors, to see afterwards which of them were changed in place."""
    return [(t, -1 if t.is_inference() else t._version, t.requires_grad) for t in {id(t): t for t in found}.values()]


def _written(watched: list[tuple]) -> set[int]:
    return {_storage(t) for t, version, needs in watched
            if (not t.is_inference() and t._version != version) or (t.requires_grad != needs and t.is_leaf)}


def _storage(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):         # sparse and other layouts have no storage of their own
        return id(tensor)


def _spec(tensor: torch.Tensor) -> TensorSpec:
    stride = tuple(tensor.stride()) if tensor.layout == torch.strided else ()
    return TensorSpec(tuple(tensor.shape), tensor.dtype, stride, tensor.requires_grad)


def _short_name(func: Callable) -> str:
    return getattr(func, "__name__", None) or (resolve_name(func) or type(func).__name__).rsplit(".", 1)[-1]


def _is_metadata_property(func: Callable) -> bool:
    return func.__self__.__name__ not in ("data", "grad", "real", "imag", "T", "mT", "H", "mH", "_base", "grad_fn")


def _is_checkpoint(pack: Callable) -> bool:
    return "checkpoint" in getattr(pack, "__qualname__", "").lower()


def _is_leaf(module: torch.nn.Module) -> bool:
    """Modules of torch.nn without children: one operation to a reader of the plan."""
    return type(module).__module__.startswith("torch.nn.modules.") and next(module.children(), None) is None
_SHAREABLE = (torch.dtype, torch.device, type, torch.Generator, range, frozenset, torch.Size)


def _is_shareable(leaf: object) -> bool:
    """Objects that mean the same for every micro-batch: functions, types, and settings that live as long as the model."""
    return (callable(leaf) and not isinstance(leaf, torch.nn.Module)) or isinstance(leaf, _SHAREABLE) \
        or type(leaf).__name__.endswith("Config") or type(leaf).__module__ == "enum" or hasattr(leaf, "_value_")
