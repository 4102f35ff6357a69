"""Measure what every node takes on the device at hand.

Each distinct piece of work (same module settings, same shapes) is run once, alone, on made-up numbers: a model larger
than the machine can still be measured, piece by piece.
"""
from __future__ import annotations

import copy
import json
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, thread_time

import torch

from pipeengine.autograd import Deferral, Replacement, run
from pipeengine.costs.roofline import DeviceDescription, Seconds, estimate
from pipeengine.rng import keyed
from pipeengine.tracing import Dataflow, Node, Recording, fill, refs, switch, tensors

_MIN_REPEATS, _MAX_REPEATS, _BUDGET_SECONDS = 3, 20, 0.03
_CACHE_BYTES = 24 * 2 ** 20      # about what the caches of processors and accelerators hold
_MIN_PASSES, _MAX_PASSES, _ENOUGH, _LONG_SECONDS = 3, 8, 0.02, 1.0
_SLOW_SECONDS = 0.1              # what disturbs a run is short beside this: two passes of one run tell enough
_SETTLED = 0.05
_NOISE = 2 ** 16                 # numbers, over and over: drawing all of a vocabulary's head takes longer than a run


@dataclass(frozen=True)
class Measured:
    """Seconds per placed node; how many distinct pieces there are; names of the nodes that had to be estimated."""

    seconds: Mapping[int, Seconds]
    pieces: int
    estimated: tuple[str, ...]


def measure(flow: Dataflow, model: torch.nn.Module, device: torch.device, *, deferrable: Mapping[int, Replacement] = {},
            cache: str | Path | None = None, progress: Callable[[str], None] | None = None) -> Measured:
    """Forward and backward seconds of every placed node: the least of repeats, which other load cannot make less.

    For nodes in ``deferrable`` also what of their backward can be put off. ``cache`` names a JSON file that keeps
    results under what was measured, so that it is measured once.
    """
    recording = flow.recording
    known = _read(cache)
    keys = {index: signature(recording, recording.nodes[index], model, device) for index in flow.placed}
    pieces = {key: index for index, key in reversed(keys.items()) if key not in known}
    found = _minima(recording, model, device, pieces, deferrable, Counter(keys.values()),
                    progress or (lambda line: None))
    found.update({key: known[key] for key in keys.values() if key in known})
    seconds = {index: found[key] for index, key in keys.items() if key in found}
    missing = [index for index, key in keys.items() if key not in found]
    _fill_in(recording, seconds, missing)
    if cache is not None:
        Path(cache).parent.mkdir(parents=True, exist_ok=True)
        Path(cache).write_text(json.dumps({**known, **found}))
    return Measured(seconds, len(set(keys.values())), tuple(recording.nodes[n].name for n in missing))


def _minima(recording: Recording, model: torch.nn.Module, device: torch.device, pieces: Mapping[str, int],
            deferrable: Mapping[int, Replacement], copies: Mapping[str, int],
            progress: Callable[[str], None]) -> dict[str, Seconds]:
    """The least that each piece has taken, in passes over all of them until another pass finds hardly less.

    A disturbance lasts longer than a piece: only much later is there another chance. Pieces that cannot run alone are
    left out.
    """
    found: dict[str, Seconds] = {}
    waiting, before, told = dict(pieces), float("inf"), perf_counter()
    others = _others(model, device)
    for number in range(_MAX_PASSES):
        for count, (key, index) in enumerate(tuple(waiting.items())):
            node = recording.nodes[index]
            replacement = deferrable.get(node.results[0]) if node.results else None
            seconds = _time(recording, node, model, device, others, replacement)
            if seconds is None or max(seconds[:2]) > _LONG_SECONDS or \
                    key in found and _is_settled(sum(seconds[:2]), sum(found[key][:2])):
                del waiting[key]
            if seconds is not None:
                found[key] = _least(found.get(key, seconds), seconds)
            if perf_counter() - told > 2:
                told = perf_counter()
                progress(f"measured {count + 1} of {len(waiting)} pieces, pass {number + 1}")
        total = sum(copies[key] * sum(seconds[:2]) for key, seconds in found.items())
        if not waiting or number + 1 >= _MIN_PASSES and total > (1 - _ENOUGH) * before:
            break
        before = total
    return found


def _is_settled(seconds: float, before: float) -> bool:
    """Whether a pass found for a slow piece what one before it did."""
    return seconds > _SLOW_SECONDS and abs(seconds - before) <= _SETTLED * before


def _others(model: torch.nn.Module, device: torch.device) -> torch.Tensor:
    """Stands for the rest of the model, which has been through the caches since a piece last ran."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return torch.zeros(min(size, _CACHE_BYTES), dtype=torch.uint8, device=device)


def _least(one: Seconds, other: Seconds) -> Seconds:
    return Seconds(*(None if None in pair else min(pair) for pair in zip(one, other)))


def _read(cache: str | Path | None) -> dict[str, Seconds]:
    if cache is None or not Path(cache).exists():
        return {}
    return {key: Seconds(*value) for key, value in json.loads(Path(cache).read_text()).items()}


def signature(recording: Recording, node: Node, model: torch.nn.Module, device: torch.device) -> str:
    """Everything that the time of a node depends on, as text."""
    def show(value: int) -> str:
        spec = recording.values[value].spec
        return f"{tuple(spec.shape)}{spec.stride}{spec.dtype}{'g' if spec.requires_grad else ''}"
    if node.is_module:
        module = model.get_submodule(node.target)
        what = f"{type(module).__module__}.{type(module).__qualname__}({module.extra_repr()}){module.training}"
        if node.target in recording.leaf_modules:
            what += repr(module)
    else:
        name = getattr(node.target, "__qualname__", repr(type(node.target)))
        what = f"{getattr(node.target, '__module__', '')}.{name}"
    arguments = repr(fill((node.args, node.kwargs), show))
    attributes = ",".join(show(v) for v in node.attributes)
    where = torch.get_device_module(device).get_device_name(device) if device.type != "cpu" else torch.get_num_threads()
    return f"{what}|{arguments}|{attributes}|{node.modes}|{node.recompute}|{device.type}|{where}|{torch.__version__}"


def _time(recording: Recording, node: Node, model: torch.nn.Module, device: torch.device,
          others: torch.Tensor, deferrable: Replacement | None) -> Seconds | None:
    """Seconds of one node alone, or None when it cannot run alone."""
    try:
        with keyed(0, node.name, device), torch.enable_grad():
            piece = _Piece(recording, node, model, device, others)
            return Seconds(*piece.time(), None if deferrable is None else piece.weight_seconds(deferrable))
    except Exception:       # whatever it needs, it has it only inside the model: the caller estimates it
        return None


def _fill_in(recording: Recording, seconds: dict[int, Seconds], missing: list[int]) -> None:
    """Estimate what could not run alone, at the rate that the rest has shown."""
    reference = DeviceDescription()
    ratios = [sum(time[:2]) / sum(guess[:2]) for index, time in seconds.items()
              if sum((guess := estimate(recording, recording.nodes[index], reference))[:2]) > 0]
    scale = statistics.median(ratios) if ratios else 1.0
    for index in missing:
        forward, backward, _ = estimate(recording, recording.nodes[index], reference)
        seconds[index] = Seconds(forward * scale, backward * scale)


def _noise(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, filled with small numbers, or with zeros where they are whole."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
        return tensor.fill_(0)
    memory = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
    numbers = torch.empty(min(_NOISE, len(memory)), dtype=tensor.dtype, device=tensor.device).normal_(0, 0.02)
    rows = len(memory) // len(numbers)
    memory[:rows * len(numbers)].view(rows, -1).copy_(numbers)
    memory[rows * len(numbers):].copy_(numbers[:len(memory) - rows * len(numbers)])
    return tensor


class _Piece:
    """One node, set up to run alone."""

    def __init__(self, recording: Recording, node: Node, model: torch.nn.Module, device: torch.device,
                 others: torch.Tensor):
        self._recording, self._node, self._device, self._others = recording, node, device, others
        self._given: dict[int, torch.Tensor] = {}
        for value in dict.fromkeys((*refs(node.args), *refs(node.kwargs))):
            self._given[value] = self._make_up(value)
        self._target = self._module(model) if node.is_module else node.target
        self._differentiable = any(recording.values[v].spec.requires_grad for v in node.results)
        # With one thread the processor's own time is what the work takes, whatever else the machine is doing.
        self._clock = thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else perf_counter

    def _make_up(self, value: int) -> torch.Tensor:
        spec = self._recording.values[value].spec
        real = self._recording.constants.get(value)
        if real is not None:
            return real.clone()
        return _noise(torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=self._device))

    def _module(self, model: torch.nn.Module) -> torch.nn.Module:
        """A copy, so that the user's gradients and buffers stay as they are."""
        module = model.get_submodule(self._node.target)
        if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
            raise TypeError("a TorchScript module shares its tensors with its copies")
        memo: dict = {}
        for tensor in (*module.parameters(), *module.buffers()):
            copied = _noise(torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self._device))
            if isinstance(tensor, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, requires_grad=tensor.requires_grad)
                copied.grad = torch.zeros_like(copied) if tensor.requires_grad else None
            memo[id(tensor)] = copied
        return copy.deepcopy(module, memo)

    def _fresh(self, *encoded: object) -> tuple:
        """``encoded`` with new leaves for its values, each the same one wherever it stands."""
        fresh: dict[int, torch.Tensor] = {}

        def value_of(value: int) -> torch.Tensor:
            if value not in fresh:
                spec = self._recording.values[value].spec
                tensor = self._given[value].detach()
                if spec.requires_grad and self._differentiable:
                    tensor.requires_grad_()
                    if self._recording.values[value].kind == "attribute":
                        tensor.grad = torch.zeros_like(tensor)      # accumulating is part of the work
                    if self._node.writes:
                        tensor = tensor.clone()
                fresh[value] = tensor
            return fresh[value]
        return tuple(fill(one, value_of) for one in encoded)

    def _synchronize(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

    def weight_seconds(self, deferrable: Replacement) -> float:
        """Minimum of repeated runs of what the node puts off."""
        method, given = deferrable
        for value in refs(given):
            self._given.setdefault(value, self._make_up(value))
        best, deferral = float("inf"), Deferral()
        for _ in range(_MIN_REPEATS):
            args, = self._fresh(given)
            queue = deferral.begin()
            with switch(self._node.modes):
                out = getattr(deferral, method)(*args)
            out.backward(torch.ones_like(out))
            self._synchronize()
            start = self._clock()
            run(queue)
            self._synchronize()
            best = min(best, self._clock() - start)
        return best

    def time(self) -> tuple[float, float]:
        """Minimum of repeated runs, forward and backward apart."""
        best_forward = best_backward = float("inf")
        start, repeats = perf_counter(), 0
        while repeats < _MIN_REPEATS or (perf_counter() - start < _BUDGET_SECONDS and repeats < _MAX_REPEATS):
            forward, backward = self._once()
            is_slow = max(forward, backward) > _SLOW_SECONDS
            if repeats or is_slow:                      # the first run warms up, unless it is long enough not to matter
                best_forward, best_backward = min(best_forward, forward), min(best_backward, backward)
            repeats += 1
            if is_slow:
                break
        return best_forward, best_backward

    def _chill(self) -> None:
        """Parameters have left the caches since they were last used; the inputs have only just been made."""
        self._others.add_(1)
        for value, tensor in self._given.items():
            if self._recording.values[value].kind != "attribute":
                tensor.clone()

    def _once(self) -> tuple[float, float]:
        args, kwargs = self._fresh(self._node.args, self._node.kwargs)
        self._chill()
        with switch(self._node.modes):
            self._synchronize()
            start = self._clock()
            out = self._target(*args, **kwargs)
            self._synchronize()
            forward = self._clock() - start
        made = [t for t in tensors(out) if t.requires_grad]
        if self._node.writes and not made:
            made = [t for t in tensors((args, kwargs)) if t.grad_fn is not None]
        if not self._differentiable or not made:
            return forward, 0.0
        gradients = [torch.ones_like(t) for t in made]
        self._synchronize()
        start = self._clock()
        torch.autograd.backward(made, gradients)
        self._synchronize()
        return forward, self._clock() - start
