"""Weights in: each worker makes or reads only what its own stages hold."""
from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch

from pipeengine.checkpoint.hugging_face import Source, files_of, read, sources_of
from pipeengine.checkpoint.slots import get_tensor, put_tensor, tensor_slots
from pipeengine.errors import InputError
from pipeengine.rng import generators, mix, place_number
from pipeengine.torch_private import TorchDispatchMode, storage_number


def load_stage(model: torch.nn.Module, held: Collection[str], device: torch.device, *, weights: str | Path | None,
               seed: int) -> None:
    """Put the tensors named in ``held`` on ``device``: real ones are moved, those on meta are made.

    Made tensors come from the modules' own initialisers, keyed by name, so that any number of stages gives the same
    weights, and then from the Hugging Face checkpoint folder ``weights``, if given. Nothing else of the model is
    touched.
    """
    slots = tensor_slots(model)
    created: set[str] = set()
    for name, places in slots.items():
        if name not in held:
            continue
        module, own = places[0]
        tensor = get_tensor(module, own)
        if tensor.device.type == "meta":
            created.add(name)
            put_tensor(places, _empty_like(tensor, device))
        elif tensor.device != device:
            _move(places, tensor, device)
    read = _read_weights(model, slots, held, Path(weights)) if weights is not None else set()
    if created:
        _initialise(model, slots, created, read, device, seed)


def _empty_like(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if isinstance(tensor, torch.nn.Parameter):
        made = torch.nn.Parameter(made, requires_grad=tensor.requires_grad)
        made.__dict__.update(tensor.__dict__)
    return made


def _move(places: list[tuple[torch.nn.Module, str]], tensor: torch.Tensor, device: torch.device) -> None:
    if isinstance(tensor, torch.nn.Parameter):
        tensor.data = tensor.data.to(device)            # the same object: an optimizer made before keeps working
        if tensor.grad is not None:
            tensor.grad = tensor.grad.to(device)
    else:
        put_tensor(places, tensor.to(device))


class _Seeded(TorchDispatchMode):
    """Gives every tensor random numbers of its own, whatever else is initialised before it; notes what was written."""

    def __init__(self, names: Mapping[int, str], seed: int, device: torch.device):
        super().__init__()
        self._names, self._seed, self._generators = names, seed, generators(device)
        self._draws: Counter[str] = Counter()
        self.path = ""
        self.written: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        target = args[0] if args and isinstance(args[0], torch.Tensor) else None
        name = None
        if target is not None and target.device.type != "meta":
            name = self._names.get(storage_number(target))
        if torch.Tag.nondeterministic_seeded in func.tags:
            place = name or f"in {self.path}"
            self._draws[place] += 1
            number = mix(self._seed, place_number(place), self._draws[place])
            for generator in self._generators:
                generator.manual_seed(number)
        if name is not None and func._schema.is_mutable:
            self.written.add(name)
        return func(*args, **kwargs)


def _initialise(model: torch.nn.Module, slots, created: set[str], read: set[str], device: torch.device,
                seed: int) -> None:
    """Run the modules' own initialisers on what has just been made and not read from a file."""
    names = {storage_number(get_tensor(*slots[name][0])): name for name in created}
    kept = {name: get_tensor(*slots[name][0]).detach().clone() for name in read & created}
    states = [generator.get_state() for generator in generators(device)]
    mode = _Seeded(names, seed, device)
    try:
        with mode, torch.no_grad():
            for path, _, initialise in _initialisers(model, {id(m) for n in created for m, _ in slots[n]}):
                mode.path = path
                initialise()
    finally:
        for generator, state in zip(generators(device), states):
            generator.set_state(state)
    with torch.no_grad():
        for name, value in kept.items():
            get_tensor(*slots[name][0]).copy_(value)
    missing = sorted(created - read - mode.written)
    if missing:
        module = slots[missing[0]][0][0]
        raise InputError(
            f"{len(missing)} of {len(created)} tensors on meta have no initial value, first {missing[0]}: no "
            f"reset_parameters or "
            f"_init_weights of {type(module).__name__} or of a module around it writes it. Give the class a "
            f"reset_parameters, "
            "pass weights=, or build the model for real"
        )


def _initialisers(model: torch.nn.Module, owners: set[int]) -> Iterator[tuple[str, torch.nn.Module, object]]:
    """First every module's own reset, then ``_init_weights`` of the model around it, children before parents."""
    modules = dict(model.named_modules())
    for path, module in modules.items():
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if id(module) in owners and callable(reset):
            yield path, module, reset
    around = {
        path: next((modules[p] for p in _upwards(path) if callable(getattr(modules[p], "_init_weights", None))), None)
        for path in modules
    }
    for path in sorted(modules, key=lambda p: -p.count(".") - (p != "")):
        if around[path] is not None:
            module = modules[path]
            yield path, module, lambda module=module, outer=around[path]: outer._init_weights(module)


def _upwards(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _read_weights(model: torch.nn.Module, slots, owned: Collection[str], folder: Path) -> set[str]:
    """Copy from a checkpoint folder what this worker holds; returns the names that were found."""
    files = files_of(folder)
    sources = sources_of(model, files)
    aliases = _aliases(model)
    persistent = set(model.state_dict(keep_vars=True))
    names_of: dict[Source, list[tuple[str, str]]] = defaultdict(list)
    missing = []
    for name in (name for name in slots if name in owned):
        alias = next((alias for alias in aliases[name] if alias in sources), None)
        if alias is not None:
            names_of[sources[alias]].append((name, alias))
        elif any(alias in persistent for alias in aliases[name]):
            missing.append(name)
    if missing:
        raise InputError(
            f"{folder} lacks {len(missing)} of {len(missing) + sum(map(len, names_of.values()))} tensors of this "
            f"worker's stages, first {missing[0]}; it holds {len(files)}, such as {next(iter(files), 'none')}. Is it "
            "a checkpoint of this architecture?"
        )
    with torch.no_grad():
        for source, tensors in read(folder, files, names_of):
            for name, alias in names_of[source]:
                target, value = get_tensor(*slots[name][0]), tensors[alias]
                if target.shape != value.shape:
                    raise InputError(
                        f"{folder}: {source.keys[0]} has shape {tuple(value.shape)}, the model's {name} has "
                        f"{tuple(target.shape)}"
                    )
                if target.is_floating_point() != value.is_floating_point() or target.is_complex() != value.is_complex():
                    raise InputError(f"{folder / files[source.keys[0]]}: {source.keys[0]} holds {value.dtype}, the "
                                     f"model's {name} {target.dtype}; give a checkpoint of this model")
                target.copy_(value)
    return {name for entries in names_of.values() for name, _ in entries}


def _aliases(model: torch.nn.Module) -> dict[str, list[str]]:
    first: dict[int, str] = {}
    found: dict[str, list[str]] = defaultdict(list)
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        found[first.setdefault(id(tensor), name)].append(name)
    return found
