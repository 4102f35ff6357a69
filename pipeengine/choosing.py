"""What is run: as a user asked, as a plan says, or, where neither does, as it is chosen here, which is told."""
from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import networkx
import torch

from partitioners import Plan
from partitioners.units import format_seconds, format_share
from pipeengine.costs import example_rows
from pipeengine.distributed import Workers
from pipeengine.errors import InputError, PlanError
from pipeengine.exploration import Choice, Configuration, Search, configuration_in, search
from pipeengine.options import Options
from pipeengine.runtime import BatchReader
from pipeengine.simulation import LinkTimes
from pipeengine.tracing import Inputs

AUTO = "auto"
_EFFORT = 20_000_000        # a few seconds beside the measurements that a pipeline makes anyway
_CLEARED: dict[str, Any] = {"num_microbatches": None, "schedule": "1f1b", "recompute": False}


@dataclass(frozen=True)
class Chosen:
    """``options`` with nothing left open, the ``plan`` that was given or found, what reads batches, and how many
    micro-batches the example makes."""

    options: Options
    plan: Plan | None
    reader: BatchReader
    num_microbatches: int


def choose(options: Options, workers: Workers, device: torch.device, link: LinkTimes) -> Chosen:
    """What is run, the same on every worker. The workers stand in as many replicas as it has afterwards."""
    options = read_configuration(search_for(options, workers, device, link), workers)
    plan = read_plan(options.plan, workers)

    def chosen() -> Chosen:
        options.validate()
        count = count_microbatches(options, plan, workers, device)
        reader = BatchReader.of(options.model, device, count, loss_fn=options.loss_fn, batch_dims=options.batch_dims)
        return Chosen(options, plan, reader, used_microbatches(options, reader, workers.rank))
    return workers.run_synchronized(chosen)


# -- what "auto" searches for -----------------------------------------------------------------------------------------


def search_for(options: Options, workers: Workers, device: torch.device, link: LinkTimes) -> Options:
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


# -- what a plan says -------------------------------------------------------------------------------------------------


def read_configuration(options: Options, workers: Workers) -> Options:
    """The options, with what the first worker's plan says besides its cuts, if a search has found it.

    The workers then stand in as many replicas as the plan has.
    """
    told = workers.broadcast_object(workers.run_synchronized(
        lambda: None if workers.rank or (found := configuration_in(options.plan)) is None else asdict(found)))
    if told is None:
        return options
    configured = workers.run_synchronized(lambda: options.configured(Configuration.from_json(told), workers.grid))
    workers.arrange(configured.num_replicas or 1)
    return configured


def read_plan(plan: Plan | Choice | str | Path | None, workers: Workers) -> Plan | None:
    """The plan that the first worker was given, on every worker."""
    def read() -> dict | None:
        if plan is None or workers.rank:
            return None
        if not isinstance(plan, (Plan, str, Path)):
            raise InputError(f"plan is a {type(plan).__name__}; give a Plan or the path of one")
        try:
            return (plan if isinstance(plan, Plan) else Plan.load(plan)).to_json()
        except OSError as error:
            raise PlanError(f"cannot read the plan: {error}") from error
    data = workers.broadcast_object(workers.run_synchronized(read))
    return None if data is None else Plan.from_json(data)


# -- micro-batches ----------------------------------------------------------------------------------------------------


def count_microbatches(options: Options, plan: Plan | None, workers: Workers, device: torch.device) -> int:
    """How many micro-batches: as asked, else the plan's, else what pays for the example's rows, which is told."""
    if isinstance(options.num_microbatches, int):
        return options.num_microbatches
    width, tell = workers.grid.width, progress(workers.rank)
    if plan is not None:
        count = plan.setting.num_microbatches
        if count < width:           # more workers than micro-batches wait for each other most of the time
            tell(f"{count} micro-batches, as the plan was made for, on {width} workers; pass num_microbatches= to "
                 "choose")
        return count
    if width == 1:
        return 1
    reader = BatchReader.of(options.model, device, 1, loss_fn=options.loss_fn, batch_dims=options.batch_dims)
    rows = reader.read(Inputs.of(options.example, options.target)).rows
    count = paying_microbatches(rows, options.num_stages or width)
    tell(f"{count} micro-batches of a batch of {rows} rows; pass num_microbatches= to choose")
    return count


def used_microbatches(options: Options, reader: BatchReader, rank: int) -> int:
    """How many micro-batches the example makes: as many as the reader is asked for, at most one per row, which is
    told."""
    rows = reader.read(Inputs.of(options.example, options.target)).rows
    if rows < reader.num_microbatches:
        progress(rank)(f"{rows} micro-batches for now, one per row of the example; {reader.num_microbatches:,} were "
                       "asked for")
    return min(rows, reader.num_microbatches)


def paying_microbatches(rows: int, num_stages: int) -> int:
    """How many micro-batches pay for a batch of ``rows``: up to four for every stage, which leaves a fifth of a step
    idle.

    The most that is a divisor of the rows, so that all are alike, where that is at least two for every stage. One stage
    has nothing to wait for.
    """
    most = 1 if num_stages == 1 else min(rows, 4 * num_stages)
    even = max(count for count in range(1, most + 1) if rows % count == 0)
    return even if even >= min(most, 2 * num_stages) else most


def progress(rank: int) -> Callable[[str], None]:
    """Tells the user a line, on worker 0 alone."""
    def tell(line: str) -> None:
        if rank == 0:
            print(f"pipeengine: {line}", file=sys.stderr, flush=True)
    return tell
