"""Record any model that runs eagerly, unmodified, and leave it as it was.

The forward runs once on fake tensors (see ``recorder``). What cannot be recorded at operator grain makes the innermost
enclosing module one node, and the model is recorded again; at the root it is a ``CaptureError``.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch.nn.parameter import UninitializedTensorMixin

from pipeengine.errors import CaptureError
from pipeengine.rng import keyed
from pipeengine.torch_private import DisableTorchFunction, FakeTensor, bound_fake_cache
from pipeengine.tracing.dataflow import unstable_guard
from pipeengine.tracing.fake_model import FakedModel
from pipeengine.tracing.inputs import WHOLE_LOSS, Inputs, loss_of
from pipeengine.tracing.interception import intercepted
from pipeengine.tracing.module_calls import PythonRandom
from pipeengine.tracing.module_state import look_or_set, python_random, set_python_random
from pipeengine.tracing.open_calls import NotTraceable
from pipeengine.tracing.python_reads import PythonReads
from pipeengine.tracing.pytree import tree_map
from pipeengine.tracing.read_log import ReadLog
from pipeengine.tracing.real_side import RngOfPlace
from pipeengine.tracing.recorder import Recorder
from pipeengine.tracing.recording import Recording

_MAX_ATTEMPTS = 200
_MOST_FAKE_CALLS = 4096     # that torch keeps the results of: some hundred recordings of a small model


def capture(model: torch.nn.Module, example: object, *, loss_fn: Callable | None = None, target: object = None,
            device: torch.device | str | None = None, random_key: int | None = 0,
            known_leaf_modules: Mapping[str, str] | None = None) -> Recording:
    """Record one forward of ``model`` on ``example`` (a dict of keyword arguments or a tuple of positional ones).

    The loss is ``loss_fn(output, target)`` when given (``loss_fn(output)`` where it takes no more), else the model's
    own; in a structure it is ``.loss``, ``["loss"]`` or the first scalar of a tuple. Needs no memory for parameters,
    which may be on meta. ``known_leaf_modules`` holds modules known to be kept whole from an earlier recording of the
    same model; ``random_key`` chooses the random numbers that a forward may look at. Changes nothing in the model or in
    any random state.

    Raises ``CaptureError`` naming the module and the line when the forward cannot be recorded faithfully.
    """
    inputs = example if isinstance(example, Inputs) else Inputs.of(example, target)
    device = torch.device(device) if device is not None else _device_of(model)
    leaf_modules = {**_never_opened(model), **(known_leaf_modules or {})}

    def rng_of_place(place: str):
        return keyed(random_key or 0, place, device)
    with FakedModel(model, device) as faked_model:
        recording, log = _record_until_faithful(model, inputs, loss_fn, faked_model, leaf_modules, rng_of_place)
    bound_fake_cache(_MOST_FAKE_CALLS)
    # What is not what it was when it was read, now that the model is as before, was written by the forward itself.
    return replace(recording, python=PythonReads.of(log.entries()), reshaped=faked_model.reshaped)


def _record_until_faithful(model, inputs: Inputs, loss_fn, faked_model: FakedModel, leaf_modules: dict[str, str],
                           rng_of_place: RngOfPlace) -> tuple[Recording, ReadLog]:
    watch_random = None
    warmed = False
    for _ in range(_MAX_ATTEMPTS):
        log = ReadLog({module: path for path, module in faked_model.modules.items()})
        try:
            recording, drew, traces = _record(model, inputs, loss_fn, faked_model, leaf_modules, rng_of_place, log,
                                              watch_random)
        except NotTraceable as stop:
            _keep_whole(model, leaf_modules, stop.path, stop.reason)
            faked_model.restore_attributes()
            continue
        if drew and watch_random is None:
            watch_random = look_or_set
            continue
        changed = {path: what for path, what in faked_model.changed().items() if path not in leaf_modules}
        grown = {path: name for path, name in faked_model.grown().items() if path not in leaf_modules}
        if grown:
            changed = grown             # a second run, with the old buffer, would take it for the new one
        elif not warmed and (changed or faked_model.keeps_fakes()):
            # What only a first call sets is no state. A tensor that is kept for the next call is: the second recording,
            # which finds a fake of the first in its way, then says so.
            warmed = True
            faked_model.start_warm()
            continue
        if changed:
            for path, what in changed.items():
                _keep_whole(model, leaf_modules, path, f"its forward changes self.{what}")
            faked_model.restore_attributes()
            continue
        faked_model.traces = traces
        _refuse_changing_loss(log)
        return recording, log
    path, reason = list(leaf_modules.items())[-1]
    raise CaptureError(f"no faithful recording after {_MAX_ATTEMPTS} attempts; the last module kept whole is {path}, "
                       f"because {reason}; put a hook on the modules that are unusual, which keeps "
                       "them whole from the start")


def _refuse_changing_loss(log: ReadLog) -> None:
    """A loss that keeps count in Python would stand still in a recording; what the recording counted is put back."""
    changed = [entry for entry in log.entries() if entry.label.startswith("loss_fn") and not entry.holds()]
    for entry in changed:
        if isinstance(entry.place, dict):
            entry.place[entry.key] = entry.value
    if changed:
        raise CaptureError(f"the loss function changes {changed[0].label} while it runs, which a recording would do "
                           "once and never again; change it in the training loop, between steps")


def _keep_whole(model: torch.nn.Module, leaf_modules: dict[str, str], path: str, reason: str) -> None:
    """Keep the module whole from now on, and with it its likes: layers of one class fail alike."""
    if not path:
        raise CaptureError(
            f"the model's own forward cannot be recorded: {reason}. Move that code into a submodule, which then stays "
            "one node of the graph, or replace it")
    if path == WHOLE_LOSS:
        leaf_modules[path] = reason
        return
    if path in leaf_modules:
        raise CaptureError(f"module {path} cannot be recorded even as one node: {reason}")
    kind = type(model.get_submodule(path))
    leaf_modules[path] = reason
    if not kind.__module__.startswith("torch."):
        leaf_modules.update({other: reason for other, module in model.named_modules()
                       if type(module) is kind and other and other not in leaf_modules})


def _record(model, inputs: Inputs, loss_fn, faked_model: FakedModel, leaf_modules: dict[str, str],
            rng_of_place: RngOfPlace, log: ReadLog, watch_random: PythonRandom | None
            ) -> tuple[Recording, bool, list]:
    """One attempt. Also tells whether Python's or NumPy's random numbers were drawn outside of modules kept whole."""
    recorder = Recorder(faked_model, leaf_modules, rng_of_place=rng_of_place, reads=log, python_random=watch_random)
    fake_inputs: dict[int, torch.Tensor] = {}

    def fake_input(leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) not in fake_inputs:
            with DisableTorchFunction():
                example = leaf if leaf.device.type != "meta" else faked_model.fake_like(leaf)
                fake_inputs[id(leaf)] = recorder.add_input(f"input{len(fake_inputs)}", example)
        return fake_inputs[id(leaf)]
    args, kwargs, target = tree_map(inputs.everything(), fake_input)
    before = python_random()
    try:
        whole_loss = WHOLE_LOSS in leaf_modules
        functions = () if loss_fn is None else (loss_fn,)
        with faked_model.fakes_in_place(), intercepted(model, recorder), log.watching(functions), recorder.watching():
            output = model(*args, **kwargs)
            loss = _loss(recorder, loss_fn, output, target, whole_loss)
        return _finished(recorder, output, loss, before, inputs.returned)
    finally:
        recorder.release()


def _loss(recorder: Recorder, loss_fn: Callable | None, output: object, target: object,
          whole: bool) -> torch.Tensor | None:
    """What the loss function gives; where a recording cannot hold what it does, it is to be kept whole."""
    if loss_fn is not None and whole:
        return recorder.call_whole_loss(partial(loss_of, loss_fn), output, target)
    try:
        return loss_of(loss_fn, output, target)
    except NotTraceable as stop:
        if stop.path or loss_fn is None:
            raise
        raise NotTraceable(WHOLE_LOSS, stop.reason) from stop


def _finished(recorder: Recorder, output: object, loss: torch.Tensor | None, before: tuple,
              returned: Callable[[object], bool]) -> tuple[Recording, bool, list]:
    drew = python_random() != before
    set_python_random(before)
    recording = recorder.finish(output, loss, returned=returned)
    guard = unstable_guard(recording)
    if guard is not None:
        raise NotTraceable(guard.path, f"{guard.where}: its path depends on a buffer that it changes")
    return recording, drew, recorder.traces()


def _device_of(model: torch.nn.Module) -> torch.device:
    """Where the model will run: where its first real parameter is; for meta, the accelerator if there is one."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _never_opened(model: torch.nn.Module) -> dict[str, str]:
    """Modules that stay one node whatever their forward does, and why."""
    kept_whole = {}
    for path, module in model.named_modules():
        reason = _reason_to_keep_whole(module)
        if reason and not path:
            way_out = "Give the model before torch.compile (model._orig_mod), and compile parts of it instead" \
                if "compiled" in reason else "Remove it, or wrap the part that needs it in a submodule"
            raise CaptureError(f"the model itself {reason}; a pipeline would not run that. {way_out}")
        if any(isinstance(p, UninitializedTensorMixin) for p in module.parameters(recurse=False)):
            raise CaptureError(f"module {path or '(root)'} is lazy: its parameters have no shape yet; run it once on a "
                               "small batch before you make the pipeline")
        if reason:
            kept_whole[path] = reason
    return kept_whole


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
