"""Every private name of torch that this package uses, each with what it is for and what would replace it.

Other files take these names from here, so that a new torch version is looked at in one place. Known to hold for
torch 2.11 to 2.14; importing this file with another version raises ``ImportError``. (The tables of a module, such as
``_parameters``, are not gathered here: subclasses of ``nn.Module`` rely on them everywhere.)
"""
from __future__ import annotations

import signal
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import cache

import torch

__all__ = ["APPLY_IS_IN_C", "AutogradFunctionBase", "ConvNd", "DYNAMO_MODULE", "DataDependentOutputException",
           "DisableTorchFunction", "DropoutModule", "DynamicOutputShapeException", "FAKE_TENSOR_LOGGER", "FakeTensor",
           "FakeTensorMode", "LossModule", "PYTREE_NODES", "TorchDispatchMode", "apply_in_c", "argument_of",
           "bound_fake_cache", "check_version", "compilations", "cpu_attention", "default_store",
           "engine_run_backward", "foreach_norm", "global_module_hooks", "memory_events", "new_process_group",
           "peek_function_transform", "pop_saved_tensor_hooks", "profiler_enabled", "push_saved_tensor_hooks",
           "stop_workers_within", "storage_number", "top_saved_tensor_hooks", "version_of", "wrap_norm_of_clipping"]

_OLDEST, _TOO_NEW = (2, 11), (2, 15)


def check_version(version: str) -> None:
    """Raise ``ImportError`` unless ``version`` (such as ``"2.13.0+cpu"``) is one whose private names are known."""
    major, minor = (int(part) for part in version.split(".")[:2])
    if not _OLDEST <= (major, minor) < _TOO_NEW:
        raise ImportError(
            f"pipeengine runs with torch {_OLDEST[0]}.{_OLDEST[1]} to {_TOO_NEW[0]}.{_TOO_NEW[1] - 1}, and this is "
            f"torch {version}; install one of those, for example: pip install 'torch>={_OLDEST[0]}.{_OLDEST[1]},"
            f"<{_TOO_NEW[0]}.{_TOO_NEW[1]}'")


check_version(torch.__version__)

# Imported after the check, so that a missing name is told as a version that is not known.
# What a profile says of memory that was taken or given back.
from torch._C._profiler import _ExtraFields_Allocation as AllocationFields  # noqa: E402

# Tensors without memory that carry shape, dtype, strides and device; meta tensors would do, but lose the device.
from torch._subclasses.fake_tensor import (  # noqa: E402
    DataDependentOutputException,  # a fake was asked for its numbers
    DynamicOutputShapeException,  # the shape of a result follows from numbers
    FakeTensor,
    FakeTensorMode,
)

# Whether torch.profiler records, so that ranges are marked only for it; always marking them would replace it.
from torch.autograd import _profiler_enabled as profiler_enabled  # noqa: E402

# The backward engine, from graph edges; torch.autograd.backward with GradientEdge roots would replace it.
from torch.autograd.graph import _engine_run_backward as engine_run_backward  # noqa: E402

# Sees every operator below Python, to count FLOPs and bytes; has been documented for users, without a public name.
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

# Containers in trees of tensors (model outputs among them); torch.utils.pytree once it tells its registry.
from torch.utils._pytree import SUPPORTED_NODES as PYTREE_NODES  # noqa: E402

# Where fake tensors tell of kernels that they cannot run; missing, those lines would be printed.
FAKE_TENSOR_LOGGER = "torch._subclasses.fake_tensor"

# The module of torch.compile, looked for among the loaded ones; missing, nothing is compiled.
DYNAMO_MODULE = "torch._dynamo"

# Tensor functions inside go straight to torch, past any mode; torch.overrides has only the enabling half.
DisableTorchFunction = torch._C.DisableTorchFunction

# Whether a function transform (vmap, grad, jvp) runs: not None then. Without it such forwards fail the replay check.
peek_function_transform = torch._C._functorch.peek_interpreter_stack

# The innermost hooks on saved tensors as (pack, unpack), to know a checkpoint; public are only contexts that set them.
top_saved_tensor_hooks = torch._C._autograd._top_saved_tensors_default_hooks
pop_saved_tensor_hooks = torch._C._autograd._pop_saved_tensors_default_hooks
push_saved_tensor_hooks = torch._C._autograd._push_saved_tensors_default_hooks

# The class whose ``apply`` every call of a custom autograd function passes: up to torch 2.13 the base behind Function,
# from 2.14 on Function itself. Missing, such functions fail the replay check.
AutogradFunctionBase = torch.autograd.function._SingleLevelFunction \
    if isinstance(vars(torch.autograd.Function)["apply"], classmethod) else torch.autograd.Function

# Whether ``Square.apply``, bound once by the user, goes straight to C, past any change of the class.
APPLY_IS_IN_C = AutogradFunctionBase is torch.autograd.Function

# The ``apply`` in C that does the work in all these versions.
apply_in_c = torch._C._FunctionBase.__dict__["apply"]

# Hooks on all modules, by kind; public are only functions that put them on.
global_module_hooks = tuple(getattr(torch.nn.modules.module, f"_global_{kind}_hooks")
                            for kind in ("forward", "forward_pre", "backward", "backward_pre"))

# The class above all convolutions of torch.nn; the six public ones in a tuple would replace it.
ConvNd = torch.nn.modules.conv._ConvNd

# Attention as the CPU runs it, for which torch counts no FLOPs; missing, its work is priced at nothing.
cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

# Norms of many tensors in one call; torch.nn.utils.get_total_norm would replace it, for all at once.
foreach_norm = torch._foreach_norm


def wrap_norm_of_clipping(wrap: Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]) -> None:
    """Put ``wrap(norm)`` in the place of what ``get_total_norm`` and ``clip_grad_norm_``, whoever has imported them,
    take a norm with.

    Missing, clipping by one worker's gradients is not noticed; a hook on clipping would replace it.
    """
    import torch.nn.utils.clip_grad as clipping
    norm = clipping._get_total_norm
    cells = dict(zip(norm.__code__.co_freevars, norm.__closure__ or ()))
    if "func" in cells:         # of the decorator that torch puts around it: the function itself stays
        cells["func"].cell_contents = wrap(cells["func"].cell_contents)
    else:
        clipping._get_total_norm = wrap(norm)


def compilations() -> tuple[int, dict[str, int]]:
    """How many graphs torch.compile has made in this process, and how often it left one, by reason; a public callback
    on compilations would replace it."""
    dynamo = sys.modules.get(DYNAMO_MODULE)
    if dynamo is None:
        return 0, {}
    counters = dynamo.utils.counters
    return counters["stats"]["unique_graphs"], dict(counters["graph_break"])


def default_store() -> torch.distributed.Store:
    """The key-value store of the default process group; a TCPStore of our own would replace it, with a port of its
    own.
    """
    return torch.distributed.distributed_c10d._get_default_store()


def new_process_group(ranks: Sequence[int], backend: str, name: str,
                      timeout: timedelta | None) -> torch.distributed.ProcessGroup:
    """A group of ``ranks``, numbered in this order, under ``name``; its members alone call it.

    torch.distributed.new_group would replace it if it took a name: those that it makes up are the same for groups of
    other processes, and come again after a group was destroyed.
    """
    c10d = torch.distributed.distributed_c10d
    members, timeout = list(ranks), timeout or c10d.default_pg_timeout
    group, _ = c10d._new_process_group_helper(
        len(members), members.index(torch.distributed.get_rank()), members, torch.distributed.Backend(backend),
        default_store(), c10d.GroupName(name), timeout=timeout, device_id=c10d._get_default_group().bound_device_id)
    c10d._world.pg_group_ranks[group] = {rank: number for number, rank in enumerate(members)}
    return group


def stop_workers_within(seconds: int) -> None:
    """Let torchrun's agent, in this process, kill workers that have not ended ``seconds`` after being asked to, before
    a restart or by a second signal.

    Its own ``shutdown_timeout`` counts when the agent ends, and anew for a second signal; before a restart it waits
    for 30 seconds whatever it is.
    """
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    _shut_down()                                    # before it is replaced
    asked: weakref.WeakSet[LocalElasticAgent] = weakref.WeakSet()

    def shut_down(agent: LocalElasticAgent, death_sig: signal.Signals = signal.SIGTERM, timeout: int = seconds) -> None:
        again = agent in asked
        asked.add(agent)
        _shut_down()(agent, death_sig, seconds if again else timeout)
    LocalElasticAgent._shutdown = shut_down         # type: ignore[assignment, method-assign]
    LocalElasticAgent._stop_workers = (             # type: ignore[method-assign]
        lambda self, worker_group: _shut_down()(self, timeout=seconds))


@cache
def _shut_down() -> Callable[..., None]:
    """What torchrun's agent does by itself to end its workers."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    return LocalElasticAgent._shutdown


def version_of(tensor: torch.Tensor) -> int:
    """How often ``tensor`` was written to in place; torch tells it nowhere else. Inference tensors have none and
    raise.
    """
    return tensor._version


def argument_of(operator: torch._ops.OpOverload, name: str, args: Sequence[object], kwargs: Mapping[str, object]
                ) -> object:
    """What a call passes to ``operator`` as ``name``, its default included; None where it takes no such argument. A
    public schema of operators would replace this.
    """
    for place, argument in enumerate(operator._schema.arguments):
        if argument.name == name:
            return args[place] if place < len(args) else kwargs.get(name, argument.default_value)
    return None


def storage_number(tensor: torch.Tensor) -> int:
    """A number that tensors share while they share memory, fakes and meta tensors included (``data_ptr`` is 0 for
    those).

    Sparse tensors and other layouts have no storage of their own: then the number is the tensor's.
    """
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return id(tensor)

# What all losses, and all dropouts, of torch.nn are: without these bases a list of their classes would do.
LossModule = torch.nn.modules.loss._Loss
DropoutModule = torch.nn.modules.dropout._DropoutNd


def memory_events(seen: torch.profiler.profile, device: torch.device) -> tuple[
        list[tuple[int, int, int]], list[tuple[str, int, int]]]:
    """What a profile with ``profile_memory`` saw: (nanoseconds, address, bytes) of every piece of memory of ``device``
    that was taken or, less than 0, given back; (name, start, end) of every range and operator.

    The public summary has sums alone, without addresses and times; a public list of events would replace this.
    """
    assert seen.profiler is not None and seen.profiler.kineto_results is not None, "the profile has been stopped"
    memory, ranges = [], []
    waiting = list(seen.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        taken = event.extra_fields
        if isinstance(taken, AllocationFields):
            if taken.device.type == device.type:
                memory.append((event.start_time_ns, taken.ptr, taken.alloc_size))
        else:
            ranges.append((event.name, event.start_time_ns, event.end_time_ns))
    return memory, ranges


def bound_fake_cache(most: int) -> None:
    """Forget what torch keeps of calls on fake tensors, where it is more than ``most`` calls: each new shape adds some,
    and nothing else removes them."""
    if FakeTensorMode.cache_info().size > most:
        FakeTensorMode.cache_clear()
