"""What is chosen where the user has not chosen, and how that is told."""
from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from partitioners import Plan
from pipeengine.distributed import Workers
from pipeengine.options import Options
from pipeengine.runtime import BatchReader
from pipeengine.tracing import Inputs


def count_microbatches(options: Options, plan: Plan | None, workers: Workers, device: torch.device) -> int:
    """How many micro-batches: as asked, else the plan's, else what pays for the example's rows, which is told."""
    options.validate()
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
