"""What a run tells of its pipeline besides the user's values. Seconds, bytes, shares of 1."""
from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping

import torch

from pipeengine.pipeline import Pipeline
from pipeengine.report import measured_timeline

PREFIX = "pipeline/"


def worker_values(pipe: Pipeline, sent_bytes: int) -> dict[str, float]:
    """What only this worker knows: bytes that it sent in the step, and the most memory that it has had."""
    rank = pipe.replica * pipe.num_workers + pipe.rank
    values = {f"{PREFIX}sent_bytes/worker_{rank}": float(sent_bytes)}
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None and hasattr(torch.accelerator, "max_memory_allocated"):
        values[f"{PREFIX}peak_bytes/worker_{rank}"] = float(torch.accelerator.max_memory_allocated())
    else:
        # On a CPU nobody counts tensors: all that the process has had, Python and libraries included.
        unit = 1 if sys.platform == "darwin" else 1024
        values[f"{PREFIX}process_peak_bytes/worker_{rank}"] = \
            float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    return values


def timeline_values(pipe: Pipeline, published: Mapping[int, str], predicted_seconds: float
                    ) -> tuple[int, dict[str, float]] | None:
    """(the number of the step since the pipeline began, its values) of the step that all workers have published.

    None where they have published different ones. ``bubble`` is the mean share of the step's actions in which a worker
    does not compute, from the first start to the last end.
    """
    workers = pipe.num_workers
    published = {worker: text for worker, text in published.items() if worker < workers}    # those of replica 0
    steps = {json.loads(text)["step"] for text in published.values()}
    if len(steps) != 1 or len(published) != workers:
        return None
    timeline = measured_timeline(published, schedule="", num_workers=workers, num_stages=pipe.num_stages)
    if timeline is None:
        return None
    measured = timeline.makespan
    values = {"actions_seconds": measured, "predicted_seconds": predicted_seconds}
    if workers > 1:
        values |= {"bubble": float(timeline.idle_share.mean()),
                   "measured_over_predicted": measured / predicted_seconds if predicted_seconds else float("nan")}
        values |= {f"idle_share/worker_{worker}": float(share) for worker, share in enumerate(timeline.idle_share)}
    for stage in range(pipe.num_stages):
        mine = timeline.computes & (timeline.stage == stage)
        values[f"seconds/stage_{stage}"] = float((timeline.end - timeline.start)[mine].sum())
    return steps.pop(), {PREFIX + name: value for name, value in values.items()}


def parameters_of(pipe: Pipeline, config: Mapping[str, object] | None) -> dict[str, object]:
    """The run's parameters, flat: the user's by name, the pipeline's and the plan's with a prefix."""
    plan, holdings = pipe.plan, pipe.holdings()
    own = {"model": type(holdings.model).__name__, "schedule": holdings.schedule, "num_stages": pipe.num_stages,
           "num_workers": pipe.num_workers, "num_microbatches": pipe.run_report().num_microbatches,
           "parameters": sum(p.numel() for p in holdings.model.parameters()), "torch": torch.__version__}
    planned = {"bottleneck_seconds": plan.bottleneck, "lower_bound_seconds": plan.lower_bound, "gap": plan.gap}
    return {**_flat(config or {}), **{f"pipeline.{name}": value for name, value in own.items()},
            **{f"plan.{name}": value for name, value in planned.items()}}


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat
