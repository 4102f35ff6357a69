"""What must be equal on every worker when a pipeline is made: compared by name, so that an error shows both values."""
from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from types import CodeType

import torch

from pipeengine.distributed import Workers
from pipeengine.errors import InputError
from pipeengine.options import Options
from pipeengine.tracing import Dataflow, settings_of

_NOTHING = "nothing of that name"


def agree_on_construction(options: Options, layout: Mapping[str, object], flow: Dataflow, workers: Workers) -> None:
    """Raise ``InputError`` on every worker unless all were given the same; ``layout`` is what was made of it so far."""
    facts = {**_given(options), **layout, "the model or the example": hashed(_shape(options.model, flow)),
             "what the forward or the loss reads from Python": f"values with hash {flow.recording.python.digest}",
             **settings_of(options.model)}
    everybody = workers.all_gather_object(facts)
    for name, first in everybody[0].items():
        other = next((rank for rank, theirs in enumerate(everybody) if theirs.get(name, _NOTHING) != first), None)
        if other is not None:
            raise InputError(f"workers disagree on {name}: worker 0 has {first}, worker {other} has "
                             f"{everybody[other].get(name, _NOTHING)}; start every worker with the same arguments")


def _given(options: Options) -> dict[str, object]:
    """The user's options, and the versions that they meet. A plan is not among them: that of worker 0 counts."""
    costs = options.costs if options.costs is None or isinstance(options.costs, str) else "a graph"
    return {"the versions": f"Python {platform.python_version()}, torch {torch.__version__}",
            "compile": _plain(options.compile),
            "num_microbatches": options.num_microbatches, "shard": options.shard, "seed": options.seed,
            "check": options.check, "costs": costs,
            "batch_dims": sorted((options.batch_dims or {}).items()),
            # Machines may have it in different places.
            "weights": None if options.weights is None else f"a folder called {Path(options.weights).name}",
            "loss_fn": describe(options.loss_fn), "loss_weight": describe(options.loss_weight)}


def describe(function: Callable | None) -> str | None:
    """A function as text that is the same on every worker: its name and a hash of its code, without addresses."""
    if function is None:
        return None
    name = getattr(function, "__qualname__", type(function).__qualname__)
    code = getattr(function, "__code__", None)
    return name if code is None else f"{name} with code {_number(_code(code)):x}"


def _code(code: CodeType) -> str:
    constants = [_code(constant) if isinstance(constant, CodeType) else
                 repr(sorted(constant, key=repr)) if isinstance(constant, frozenset) else repr(constant)
                 for constant in code.co_consts]
    return repr((code.co_code, constants, code.co_names))


def _plain(given: bool | Mapping[str, object]) -> object:
    """Options of torch.compile as text; of what has an address its name."""
    if isinstance(given, bool):
        return given
    return sorted((key, getattr(value, "__qualname__", value) if callable(value) else value)
                  for key, value in given.items())


def _shape(model: torch.nn.Module, flow: Dataflow) -> str:
    """The model and the example, as text."""
    parameters = [(name, tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()]
    nodes = [(node.name, [flow.recording.values[v].spec.shape for v in node.results]) for node in flow.recording.nodes]
    return repr((parameters, nodes))


def hashed(text: str) -> str:
    """Words for a text that is too long to be shown, the same on every worker that has it."""
    return f"that with hash {_number(text)}"


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
