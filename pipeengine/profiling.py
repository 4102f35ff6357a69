"""From a model to its cost graph, without a pipeline: what planning needs."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import networkx
import torch

from pipeengine.batching import argument_names, take_apart
from pipeengine.capturing import Inputs, capture
from pipeengine.costs import DeviceDescription, analytic, cost_graph
from pipeengine.dataflow import analyse
from pipeengine.deferral import put_off
from pipeengine.errors import InputError
from pipeengine.measure import measure


def profile(model: torch.nn.Module, example: object, *, num_microbatches: int = 1,
            costs: str | DeviceDescription = "measured", loss_fn: Callable | None = None, target: object = None,
            device: torch.device | str | None = None, cache: str | Path | None = None,
            progress: Callable[[str], None] | None = None) -> networkx.DiGraph:
    """The cost graph of one micro-batch of ``example`` (the inputs of a whole batch), for ``partition``.

    ``costs`` is ``"measured"`` (on ``device``, each distinct piece once, results kept in the JSON file ``cache`` if given),
    ``"analytic"``, or a ``DeviceDescription`` to reckon with. The model may be on meta. Seconds and bytes per micro-batch.
    """
    if costs not in ("measured", "analytic") and not isinstance(costs, DeviceDescription):
        raise InputError(f'costs is {costs!r}; give "measured", "analytic" or a DeviceDescription')
    batch = take_apart(Inputs.of(example, target), names=argument_names(model), batch_dims=None)
    parts = batch.split(num_microbatches, batch.tensors[0].device)
    where = torch.device(device) if device is not None else _device_of(model)
    with torch.enable_grad():
        flow = analyse(capture(model, batch.again(parts[0]), loss_fn=loss_fn, device=where), outputs=False)
    waits = put_off(flow.recording, model)
    if costs == "measured":
        seconds = measure(flow, model, where, waits=waits, cache=cache, progress=progress).seconds
    else:
        seconds = analytic(flow, costs if isinstance(costs, DeviceDescription) else DeviceDescription())
    return cost_graph(flow, seconds, waits)


def _device_of(model: torch.nn.Module) -> torch.device:
    real = next((t.device for t in model.parameters() if t.device.type != "meta"), None)
    return real or torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
