"""What a search chooses where a user says "auto": micro-batches, schedule, recomputation, for the workers at hand."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import networkx
import torch

from partitioners.units import format_seconds, format_share
from pipeengine.costs import example_rows
from pipeengine.defaults import progress
from pipeengine.distributed import Workers
from pipeengine.errors import InputError
from pipeengine.exploration import Choice, Search, search
from pipeengine.options import Options
from pipeengine.simulation import LinkTimes

AUTO = "auto"
_EFFORT = 20_000_000        # a few seconds beside the measurements that a pipeline makes anyway
_CLEARED: dict[str, Any] = {"num_microbatches": None, "schedule": "1f1b", "recompute": False}


def choose(options: Options, workers: Workers, device: torch.device, link: LinkTimes) -> Options:
    """The options with a plan in place of "auto" for ``num_microbatches`` or ``recompute``, and then for ``schedule``.

    Worker 0 searches, and tells what was chosen; the plan in its options counts for all. ``schedule="auto"`` alone is
    an order made for the plan, and no search. Raises ``InputError`` for what leaves nothing to choose.
    """
    if AUTO not in (options.num_microbatches, options.recompute):
        return options
    cleared = replace(options, **{name: default for name, default in _CLEARED.items()
                                  if getattr(options, name) == AUTO})

    def found() -> Choice | None:
        cleared.validate()
        _refuse(options)
        if workers.rank:
            return None
        answer = _searched(options, workers, device, link)
        if answer.best is None:
            raise InputError(f"nothing was found to run on {workers.size} workers: {answer}")
        told = answer.best.configuration
        again = f", {len(told.recompute)} computed again" if told.recompute else ""
        progress(0)(f"chosen: {told.num_microbatches} micro-batches, {told.schedule}, {told.num_stages} stages{again}; "
                    f"{format_seconds(answer.best.seconds)} for a step, at most {format_share(answer.gap)} above "
                    "the best")
        return answer.best
    return replace(cleared, plan=workers.run_synchronized(found))


def _refuse(options: Options) -> None:
    """Raise ``InputError`` for options that a search knows nothing of."""
    if options.plan is not None:
        raise InputError("a plan has its micro-batches and recomputation; leave out plan=, or \"auto\"")
    if not isinstance(options.schedule, str):
        raise InputError("with \"auto\" the schedule is chosen too, or named; give schedule=\"auto\" or a name")
    if options.batch_dims is not None:
        raise InputError("\"auto\" cuts batches by dimension 0; with batch_dims= give num_microbatches= and recompute=")
    if options.recompute not in (AUTO, False):
        raise InputError("num_microbatches=\"auto\" goes with recompute=\"auto\" or False, not with chosen modules")


def _searched(options: Options, workers: Workers, device: torch.device, link: LinkTimes) -> Search:
    replicas, alone = workers.grid.num_replicas, workers.size == 1
    rows = example_rows(options.model, options.example, options.target)
    given: dict[str, Any] = {}
    if options.num_stages:
        given["stages"] = options.num_stages
        given["stages_per_worker"] = 1 if alone else options.num_stages // workers.grid.width
    if isinstance(options.num_microbatches, int):
        given["microbatch_rows"] = -(-rows // options.num_microbatches)
    if options.schedule != AUTO:
        given["schedule"] = options.schedule
    is_graph = isinstance(options.costs, networkx.DiGraph)
    return search(
        options.costs if is_graph else options.model, None if is_graph else options.example,
        num_devices=(options.num_stages or 1) if alone else workers.size, memory=_memory(device),
        bandwidth=link.bytes_per_second, latency=link.latency_seconds + link.send_overhead_seconds,
        rows=rows * replicas, costs="analytic" if options.costs == "analytic" else "measured",
        loss_fn=options.loss_fn, target=options.target, replicas=replicas, shard=options.shard, effort=_EFFORT,
        recompute=("stages", "blocks") if options.recompute == AUTO else "none", **given)


def _memory(device: torch.device) -> float | None:
    """Bytes of the accelerator's memory; None where there is none to run out of first."""
    return float(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None
