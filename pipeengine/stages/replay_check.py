"""Check once that a recording does what eager execution does: loss and gradients, on two batches and two seeds."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch

from pipeengine.errors import CaptureError, InputError, told
from pipeengine.rng import RngStreams
from pipeengine.stages.codegen import compile_part
from pipeengine.stages.guards import guard_check, guard_nodes
from pipeengine.stages.splitting import split
from pipeengine.tracing import (
    Dataflow,
    Inputs,
    Recording,
    fill,
    leaves,
    loss_of,
    refs,
    switch,
    tensors,
    tree_map,
    undisturbed,
)


def check_recording(model: torch.nn.Module, flow: Dataflow, stage_of: Mapping[int, int], num_stages: int,
                    inputs: Inputs, loss_fn: Callable | None) -> None:
    """Run the stages one after the other and compare with the model itself; raise ``CaptureError`` naming what differs.

    Agreement is to 32 units of rounding of each tensor's largest entry; where a model is more sensitive than that, to
    what its own results move when its parameters are rounded otherwise. Gradients, buffers, modes and the global
    random state are left as they were.
    """
    device = next(model.parameters()).device
    rng = RngStreams(device)
    if any(flow.recording.nodes[n].random for n in flow.replicated):
        # Stages that draw the same number do so by its place in the model; eager execution draws it once.
        stage_of = dict.fromkeys(stage_of, 0)
    cut = split(flow, stage_of, num_stages, outputs=False)
    parts = [compile_part(part, flow.recording, model, rng) for part in cut.parts]
    holds = guard_check(flow, model, rng)
    seed_decides = any(flow.recording.nodes[n].random for n in guard_nodes(flow))
    if flow.recording.reshaped and any(node.random for node in flow.recording.nodes):
        return      # eager execution makes modules on its way, whose initial values use up random numbers
    for seed, example in enumerate((inputs, _shuffled(inputs))):
        given = _moved(_tensors(example), device)
        if holds is not None and not holds(given, 0):
            continue                    # takes another path: that one would be recorded by itself
        with torch.enable_grad():
            try:
                with undisturbed(model), _seeded(seed, device):
                    truth = _eager(model, _again(example, given), loss_fn)
            except (RuntimeError, IndexError, ValueError, AssertionError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                if seed:
                    continue            # it does not take its rows in another order
                raise InputError(f"the model itself, run as it is, fails on the example: {told(error)}") from error
            with undisturbed(model), _seeded(seed, device):
                replayed = _replay(model, flow.recording, parts, given)
        if seed_decides and not _close(truth[0], replayed[0]):
            continue                    # random numbers chose another path in eager execution than in the recording
        _compare(model, example, loss_fn, flow.recording, truth, replayed, given, seed)


def _tensors(inputs: Inputs) -> list[torch.Tensor]:
    distinct = {id(t): t for t in tensors(inputs.everything())}
    return list(distinct.values())


def _moved(found: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    return [tensor.detach().to(device).clone() for tensor in found]


def _again(inputs: Inputs, given: list[torch.Tensor]) -> Inputs:
    """``inputs`` with copies of ``given`` in place of its tensors; one tensor under two names stays one."""
    at = {id(t): new.clone() for t, new in zip(_tensors(inputs), given)}
    return Inputs(*tree_map(inputs.everything(),
                            lambda leaf: at[id(leaf)] if isinstance(leaf, torch.Tensor) else leaf))


def _shuffled(inputs: Inputs) -> Inputs:
    """Another batch of the same kind: the entries of every tensor in reverse order of rows."""
    given = [tensor.flip(0) if tensor.dim() else tensor for tensor in _tensors(inputs)]
    return _again(inputs, given)


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    torch.manual_seed(seed)
    yield


def _trained(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def _gradients(loss: torch.Tensor, model: torch.nn.Module) -> list[torch.Tensor | None]:
    """Gradients of all trained parameters; what was in ``.grad`` stays there."""
    trained = _trained(model)
    if any(p._post_accumulate_grad_hooks for p in trained):
        # Such a hook may be an optimizer; re-entrant checkpoints, which need backward(), cannot be compared then.
        return list(torch.autograd.grad(loss, trained, allow_unused=True))
    held = [p.grad for p in trained]
    try:
        for p in trained:
            p.grad = None
        loss.backward()
        return [p.grad for p in trained]
    finally:
        for p, gradient in zip(trained, held):
            p.grad = gradient


def _eager(model, inputs: Inputs, loss_fn) -> tuple[torch.Tensor, list]:
    output = model(*inputs.args, **inputs.kwargs)
    loss = loss_of(loss_fn, output, inputs.target)
    return loss.detach(), _gradients(loss, model)


def _replay(model, recording: Recording, parts, given: list[torch.Tensor]) -> tuple[torch.Tensor, list]:
    made: dict[int, torch.Tensor] = {}
    for compiled in parts:
        received = [made[v] for boundary in compiled.part.receives for v in boundary.values]
        out = compiled.run(*[given[i].clone() for i in compiled.inputs], *received)
        made.update(zip(compiled.part.returns, out))
    loss = made[recording.loss]
    return loss.detach(), _gradients(loss, model)


Results = tuple[torch.Tensor, list]
"""A loss, and the gradients of all trained parameters (None where there is none)."""
_UNITS_OF_ROUNDING = 32
_TIMES_OWN_ROUNDING = 16


def _close(a: torch.Tensor | None, b: torch.Tensor | None, least: float = 0.0, own: float = 0.0) -> bool:
    """Equal but for rounding, relative to the largest entry or to ``least``, whichever is more; ``own`` is a difference
    that is allowed besides.
    """
    if a is None or b is None:
        return a is None and b is None or not bool(_dense(a if b is None else b).any())
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = _dense(a), _dense(b)
    if torch.equal(a, b) or not a.numel():
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return False
    scale = a.abs().max().double()
    if not torch.isfinite(scale):
        return bool(torch.allclose(a, b, equal_nan=True))
    allowed = _UNITS_OF_ROUNDING * torch.finfo(a.dtype).eps * max(float(scale), least) + own
    return _distance(a, b) <= allowed


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def _distance(a: torch.Tensor | None, b: torch.Tensor | None) -> float:
    """The largest difference of two tensors of one shape; 0 where there is nothing to compare."""
    if a is None or b is None or not a.numel():
        return 0.0
    kind = torch.complex128 if a.is_complex() else torch.float64
    return float((_dense(a).to(kind) - _dense(b).to(kind)).abs().max())


def _own_rounding(model: torch.nn.Module, run: Callable[[], Results], truth: Results) -> list[float]:
    """How far loss and gradients move, at the most, when every parameter is moved by a unit of rounding.

    Nothing where the model does not even repeat itself: then what moves is not its rounding.
    """
    moved = [0.0] * (1 + len(truth[1]))
    loss, gradients = run()
    if any(_distance(a, b) for a, b in zip((truth[0], *truth[1]), (loss, *gradients))):
        return moved
    for number in range(3):
        with _rounded_otherwise(model, number):
            loss, gradients = run()
        pairs = zip((truth[0], *truth[1]), (loss, *gradients))
        moved = [max(old, _distance(a, b)) for old, (a, b) in zip(moved, pairs)]
    return [_TIMES_OWN_ROUNDING * distance for distance in moved]


@contextlib.contextmanager
def _rounded_otherwise(model: torch.nn.Module, number: int) -> Iterator[None]:
    """Inside, copies of the parameters, each entry moved by up to one unit of rounding, are in their place."""
    generator = torch.Generator().manual_seed(number)
    tables = [module._parameters for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    before = [dict(table) for table in tables]
    copies: dict[int, torch.nn.Parameter] = {}

    def moved(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        if id(parameter) not in copies:
            data = parameter.detach().clone()
            if data.is_floating_point():
                signs = torch.randint(0, 2, data.shape, generator=generator).to(data) * 2 - 1
                data += data * signs * torch.finfo(data.dtype).eps
            copies[id(parameter)] = torch.nn.Parameter(data, requires_grad=parameter.requires_grad)
        return copies[id(parameter)]
    try:
        for table in tables:
            table.update({name: moved(p) for name, p in table.items() if type(p) is torch.nn.Parameter})
        yield
    finally:
        for table, own in zip(tables, before):
            table.update(own)


def _compare(model, example, loss_fn, recording, truth: Results, replayed: Results, given, seed: int) -> None:
    pairs = list(zip((truth[0], *truth[1]), (replayed[0], *replayed[1])))
    if all(_close(a, b) for a, b in pairs):
        return
    names = ["loss", *(f"gradient of {name}" for name, p in model.named_parameters() if p.requires_grad)]
    # A gradient that is zero but for rounding (a key's bias in attention) has no digits of its own to agree in.
    sizes = [_distance(g, torch.zeros_like(g)) for g in truth[1] if g is not None]
    least = [0.0] + [1e-3 * max(sizes, default=0.0)] * len(truth[1])
    if all(_close(a, b, floor) for (a, b), floor in zip(pairs, least)):
        return
    device = next(model.parameters()).device

    def eager() -> Results:
        with torch.enable_grad(), undisturbed(model), _seeded(seed, device):
            return _eager(model, _again(example, given), loss_fn)
    own = _own_rounding(model, eager, truth)
    problems = [name for name, (a, b), floor, more in zip(names, pairs, least, own) if not _close(a, b, floor, more)]
    if not problems:
        return
    what = problems[0] if problems[0] != "loss" else f"loss {truth[0].item():.9g} against {replayed[0].item():.9g}"
    place = _first_difference(model, example, loss_fn, recording, given, seed)
    raise CaptureError(
        f"the recording does not do what the model does ({what}, eager against recorded"
        f"{f', and {len(problems) - 1} more' if len(problems) > 1 else ''}); the first difference is at {place}. Keep "
        "that module whole by moving what is unusual in it into a submodule with a hook, or pass check=False if you "
        "know better")


def _first_difference(model, example: Inputs, loss_fn, recording: Recording, given: list[torch.Tensor],
                      seed: int) -> str:
    """Name of the first module call whose output differs between eager execution and the recording."""
    device = next(model.parameters()).device
    paths = {module: path for path, module in model.named_modules()}
    counts: dict[str, int] = {}
    seen: list[tuple[str, list[torch.Tensor]]] = []

    def note(module, args, out):
        if module in paths:
            path = paths[module]
            counts[path] = counts.get(path, 0) + 1
            scope = path if counts[path] == 1 else f"{path}#{counts[path] - 1}"
            seen.append((scope, [t.detach().clone() for t in tensors(out)]))
    with undisturbed(model), _seeded(seed, device):
        handle = torch.nn.modules.module.register_module_forward_hook(note)
        try:
            _eager(model, _again(example, given), loss_fn)
        finally:
            handle.remove()
    recorded = _interpret(model, recording, given, seed, device)
    for scope, outputs in seen:
        if scope in recorded and not all(map(_close, outputs, recorded[scope])):
            return scope or "the model itself"
    return "no module's output: in code between modules, or in backward"


def _interpret(model, recording: Recording, inputs, seed: int, device) -> dict[str, list[torch.Tensor]]:
    """Run the recording node by node; the outputs of every module call, by scope."""
    tables = {**dict(model.named_parameters(remove_duplicate=False)),
              **dict(model.named_buffers(remove_duplicate=False))}
    tensors: dict[int, torch.Tensor] = {v: tensor.clone() for v, tensor in zip(recording.inputs, inputs)}
    tensors.update(recording.constants)
    tensors.update({i: tables[v.name] for i, v in enumerate(recording.values) if v.kind == "attribute"})
    outputs: dict[str, list[torch.Tensor]] = {}
    with undisturbed(model), _seeded(seed, device), torch.no_grad():
        for node in recording.nodes:
            target = model.get_submodule(node.target) if node.is_module else node.target
            with switch(node.modes), torch.no_grad():
                out = target(*fill(node.args, tensors.__getitem__), **fill(node.kwargs, tensors.__getitem__))
            for value, pick in zip(node.results, node.picks):
                tensors[value] = _picked(out, pick)
            if node.is_module:
                outputs[node.name] = [tensors[v].clone() for v in node.results]
    for call in recording.calls:
        outputs.setdefault(call.scope, [tensors[v] for v in refs(call.output) if v in tensors])
    return outputs


def _picked(out: object, pick: str) -> torch.Tensor:
    """One result of a node, taken from what its target returned; ``pick`` is an entry of ``Node.picks``."""
    if pick == "":
        return out
    return leaves(out)[int(pick[1:])] if pick[0] == "@" else out[int(pick[1:-1])]
