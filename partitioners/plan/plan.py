"""What a partition is: stages, their figures, what crosses between them."""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from partitioners.errors import PlanError
from partitioners.graph import Cluster, Device, Link, MemoryModel
from partitioners.notebook import html_of
from partitioners.tables import format_table
from partitioners.units import format_bytes, format_seconds, format_share

FORMAT = "pipeline-plan/1"


@dataclass(frozen=True)
class Boundary:
    """Values that stage ``source`` hands to stage ``target`` for each micro-batch, in wire order (that of production).

    ``bytes`` go forward; ``gradients`` names the values whose gradient comes back from ``target``, ``gradient_bytes``
    its bytes. The gradient of a value with several reading stages comes back by way of each of them, the last one
    first.
    """
    source: int
    target: int
    values: tuple[str, ...]
    bytes: int
    gradients: tuple[str, ...] = ()
    gradient_bytes: int = 0


@dataclass(frozen=True)
class Tie:
    """Parameter ``name`` of ``bytes`` that several ``stages`` hold; each exchanges its gradient once per step, if it
    is trained."""
    name: str
    stages: tuple[int, ...]
    bytes: int
    trained: bool = True


@dataclass(frozen=True)
class StageCost:
    """What one stage costs per micro-batch, in seconds and bytes.

    ``load`` is what the objective counts. ``weight_grad`` is the part of ``backward`` that a schedule may put off, and
    ``kept_bytes`` what stays until then; ``workspace_bytes`` is what a backward needs on top of the
    activations that it lets go of, ``first_workspace_bytes`` the same when it also makes the gradients.
    ``param_bytes`` are all weights, ``frozen_bytes`` those of them that are not trained.
    ``memory_bytes`` is what the schedule needs at its peak; ``sent_bytes`` are values out and gradients back.
    ``recomputed`` names the blocks that are computed again (nodes, where the graph names no blocks): ``backward``,
    ``activation_bytes`` and the workspaces are those with it.
    """
    forward: float
    backward: float
    communication: float
    load: float
    param_bytes: float
    activation_bytes: float
    memory_bytes: float
    sent_bytes: float
    num_nodes: int
    device: str = "device"
    recomputed: tuple[str, ...] = ()
    weight_grad: float = 0.0
    kept_bytes: float = 0.0
    workspace_bytes: float = 0.0
    first_workspace_bytes: float = 0.0
    frozen_bytes: float = 0.0


@dataclass(frozen=True)
class Setting:
    """Everything a plan's figures depend on besides the graph."""
    objective: str = "sum"
    cluster: Cluster = Cluster((Device(),))
    stage_devices: tuple[int, ...] = ()
    memory_model: MemoryModel = MemoryModel()
    num_microbatches: int = 1
    stages_per_worker: int = 1
    worker_of: tuple[int, ...] = ()             # empty: stages are dealt out in turns
    allow_empty: bool = False
    recompute: bool = False

    def device(self, stage: int) -> Device:
        """The device class of ``stage``."""
        return self.cluster.devices[self.stage_devices[stage]]

    def links(self, stage: int) -> tuple[Link, Link]:
        """The links before and after ``stage``."""
        links = self.cluster.links
        if not self.cluster.ordered:
            return links[0], links[0]
        place = self.stage_devices[stage]
        return links[min(max(place - 1, 0), len(links) - 1)], links[min(place, len(links) - 1)]

    def workers(self, num_stages: int) -> tuple[int, ...]:
        """The worker of each stage."""
        return self.worker_of or deal(num_stages, self.stages_per_worker)


def gap_above(bottleneck: float, lower_bound: float) -> float:
    """How far ``bottleneck`` may be above the best, as a fraction of ``lower_bound``, which nothing can beat."""
    if bottleneck <= lower_bound:
        return 0.0
    return (bottleneck - lower_bound) / lower_bound if lower_bound > 0 else float("inf")


def deal(num_stages: int, stages_per_worker: int) -> tuple[int, ...]:
    """The worker of each stage when they are dealt out in turns: stage ``s`` on worker ``s mod workers``."""
    workers = max(1, -(-num_stages // stages_per_worker))
    return tuple(stage % workers for stage in range(num_stages))


@dataclass(frozen=True)
class Plan:
    """Who lives where. ``bottleneck`` is ``gap`` above ``lower_bound``, which no valid plan can beat.

    ``gap`` is ``(bottleneck - lower_bound) / lower_bound``; ``proof`` says how the bound was found. ``alternatives``
    holds, for each cut, the best bottleneck when that cut must move.
    """
    num_stages: int
    stage_of: Mapping[str, int]
    stages: tuple[StageCost, ...]
    boundaries: tuple[Boundary, ...]
    ties: tuple[Tie, ...]
    bottleneck: float
    lower_bound: float
    gap: float
    proof: str
    objective: str
    graph_digest: str
    setting: Setting = field(default_factory=Setting)

    @property
    def proved(self) -> bool:
        """Whether no plan can be better (to one part in 10^9)."""
        return self.gap <= 1e-9

    def nodes(self, stage: int) -> tuple[str, ...]:
        """Names of the nodes on ``stage``, in the order of production."""
        return tuple(name for name, place in self.stage_of.items() if place == stage)

    def to_json(self) -> dict:
        """One JSON object; ``from_json`` reads it back."""
        return {"format": FORMAT, **asdict(self), "stage_of": dict(self.stage_of)}

    @classmethod
    def from_json(cls, obj: Mapping) -> Plan:
        """The plan that ``to_json`` made ``data`` of. Raises ``PlanError`` for anything else."""
        kind = obj.get("format") if isinstance(obj, Mapping) else None
        if kind != FORMAT:
            raise PlanError(f"expected a plan with format {FORMAT!r}, found "
                            + (f"format {kind!r}" if isinstance(obj, Mapping) else type(obj).__name__))
        try:
            return cls(**{entry.name: _READ.get(entry.name, lambda value: value)(obj[entry.name])
                          for entry in fields(cls)})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise PlanError(f"the plan object is damaged: {type(error).__name__}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what ``save`` wrote."""
        text = Path(path).read_bytes()
        try:
            obj = json.loads(text)
        except ValueError as error:
            raise PlanError(f"{path} is no plan: it starts with {text[:40]!r}, which is not JSON ({error})") from error
        try:
            return cls.from_json(obj)
        except PlanError as error:
            raise PlanError(f"{path} is no plan: {error}") from error

    def __repr__(self) -> str:
        return (f"<Plan of {len(self.stage_of)} nodes on {self.num_stages} stages: bottleneck "
                f"{format_seconds(self.bottleneck)}, gap {format_share(self.gap, 2)}>")

    def _repr_html_(self) -> str | None:
        return html_of(self)

    def __str__(self) -> str:
        heads = ("stage", "device", "nodes", "forward", "backward", "link", "load", "parameters", "memory", "sends")
        rows = [(str(number), cost.device, f"{cost.num_nodes:,}",
                 *map(format_seconds, (cost.forward, cost.backward, cost.communication, cost.load)),
                 *map(format_bytes, (cost.param_bytes, cost.memory_bytes, cost.sent_bytes)))
                for number, cost in enumerate(self.stages)]
        proof = "proved optimal" if self.proved else f"at most {format_share(self.gap, 2)} above the best"
        return (f"{format_table(heads, rows, left=(1,))}\nbottleneck {format_seconds(self.bottleneck)}, lower bound "
                f"{format_seconds(self.lower_bound)}: {proof} ({self.proof})")


def _record(kind):
    """Reader of one frozen record, with lists turned back into tuples."""
    return lambda obj: kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in obj.items()})


def _records(kind):
    return lambda obj: tuple(map(_record(kind), obj))


def _read_setting(obj: Mapping) -> Setting:
    cluster = obj["cluster"]
    return Setting(**{**obj, "stage_devices": tuple(obj["stage_devices"]),
                      "worker_of": tuple(obj.get("worker_of", ())),
                      "memory_model": MemoryModel(**obj["memory_model"]),
                      "cluster": Cluster(_records(Device)(cluster["devices"]), cluster["ordered"],
                                         _records(Link)(cluster["links"]))})
_READ = {"stages": _records(StageCost), "boundaries": _records(Boundary), "ties": _records(Tie),
         "stage_of": dict, "setting": _read_setting, "num_stages": int}
