"""From a model to its cost graph, without a pipeline: what planning needs."""
from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import networkx
import torch

from pipeengine.autograd import find_deferrable
from pipeengine.costs.cost_graph import cost_graph
from pipeengine.costs.measured import measure
from pipeengine.costs.roofline import DeviceDescription, analytic
from pipeengine.data import argument_names, take_apart
from pipeengine.errors import InputError
from pipeengine.tracing import Dataflow, Inputs, analyse, capture, node_refs, refs


def profile(model: torch.nn.Module, example: object, *, num_microbatches: int = 1,
            costs: str | DeviceDescription = "measured", loss_fn: Callable | None = None, target: object = None,
            device: torch.device | str | None = None, cache: str | Path | None = None,
            progress: Callable[[str], None] | None = None) -> networkx.DiGraph:
    """The cost graph of one micro-batch of ``example`` (the inputs of a whole batch), for ``partition``.

    - ``num_microbatches`` (1): the batch is cut into so many; the graph's seconds and bytes are those of one of them.
    - ``costs`` ("measured"): "measured" (on ``device``, each distinct piece once), "analytic", or a
      ``DeviceDescription`` to compute with. The model may be on meta.
    - ``loss_fn`` (the model's own loss), ``target`` (made up): as ``Pipeline`` takes them.
    - ``device`` (where the model is, else the accelerator), ``cache`` (None): a JSON file that keeps measurements.
    - ``progress`` (None): is told in words how far measuring is.

    Raises ``InputError`` for other costs, and ``CaptureError`` where the model cannot be recorded.
    """
    if costs not in ("measured", "analytic") and not isinstance(costs, DeviceDescription):
        raise InputError(f'costs is {costs!r}; give "measured", "analytic" or a DeviceDescription')
    batch = take_apart(Inputs.of(example, target), names=argument_names(model), batch_dims=None)
    parts = batch.split(num_microbatches, batch.tensors[0].device)
    where = torch.device(device) if device is not None else _device_of(model)
    inputs = batch.again(parts[0])
    if loss_fn is not None and target is None:
        inputs = Inputs(inputs.args, inputs.kwargs, made_up_target(model, inputs, loss_fn, where))
    with torch.enable_grad():
        flow = analyse(capture(model, inputs, loss_fn=loss_fn, device=where), outputs=False)
    deferrable = find_deferrable(flow.recording, model)
    if costs == "measured":
        seconds = measure(flow, model, where, deferrable=deferrable, cache=cache, progress=progress).seconds
    else:
        seconds = analytic(flow, costs if isinstance(costs, DeviceDescription) else DeviceDescription())
    graph = cost_graph(flow, seconds, deferrable)
    graph.graph["made_with"] = {"rows": batch.rows, "row": list(batch.tensors[0].shape[1:]),
                                "num_microbatches": len(parts), "flops": training_flops(flow),
                                **_source(costs, where)}
    weights = [p for p in model.parameters() if p.requires_grad]
    if weights:
        size = sum(p.numel() * p.element_size() for p in weights)
        graph.graph["made_with"]["bytes_per_weight"] = size / max(1, sum(p.numel() for p in weights))
    return graph


def example_rows(model: torch.nn.Module, example: object, target: object = None) -> int:
    """Rows of a batch."""
    return take_apart(Inputs.of(example, target), names=argument_names(model), batch_dims=None).rows


def training_flops(flow: Dataflow) -> float:
    """Operations of forward and backward of one micro-batch, nothing computed twice."""
    recording = flow.recording
    total = 0.0
    for index in flow.placed:
        node = recording.nodes[index]
        gradients = sum(1 for v in node_refs(node) if recording.values[v].spec.requires_grad)
        differentiable = any(recording.values[v].spec.requires_grad for v in node.results)
        total += node.cost.flops * (1 + min(gradients, 2) * differentiable)
    return float(total)


def made_up_target(model: torch.nn.Module, inputs: Inputs, loss_fn: Callable, device: torch.device) -> torch.Tensor:
    """A target that ``loss_fn`` takes, in the shape of the model's first output: class numbers, or its own dtype.

    Raises ``InputError`` when it takes neither.
    """
    recording = capture(model, inputs, device=device)
    spec = next((recording.values[v].spec for v in refs(recording.output)), None)
    if spec is None:
        raise InputError("loss_fn= needs a tensor output of the model, or an example target: pass target=")
    shapes = [(spec.shape[:-1], torch.int64), (spec.shape, spec.dtype)]
    if len(spec.shape) > 2:
        shapes.insert(0, ((spec.shape[0], *spec.shape[2:]), torch.int64))
    for shape, dtype in shapes:
        made = torch.zeros(shape, dtype=dtype, device=device)
        try:
            with warnings.catch_warnings(action="ignore"):      # about targets that do not fit: the next one may
                capture(model, Inputs(inputs.args, inputs.kwargs, made), loss_fn=loss_fn, device=device)
            return made
        except Exception:               # whatever the user's function says to a target that does not suit it
            continue
    raise InputError(f"loss_fn takes no target made in the shape of the output {tuple(spec.shape)}; give an example "
                     "target")


def _source(costs: str | DeviceDescription, where: torch.device) -> dict:
    """Where the seconds come from."""
    if costs == "measured":
        return {"costs": costs, "device": str(where)}
    described = costs if isinstance(costs, DeviceDescription) else DeviceDescription()
    return {"costs": "analytic", "flops_per_second": described.flops_per_second,
            "bytes_per_second": described.bytes_per_second}


def _device_of(model: torch.nn.Module) -> torch.device:
    real = next((t.device for t in model.parameters() if t.device.type != "meta"), None)
    return real or torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
