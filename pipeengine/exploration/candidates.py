"""Candidates as people and ``Pipeline`` read them: a full plan with its configuration, and why others lose."""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import networkx as nx

from partitioners import Cluster, Device, MemoryModel, Plan, Setting
from partitioners.plan import price_stages
from partitioners.pricing import build_plan
from partitioners.units import format_share
from pipeengine.errors import PlanError
from pipeengine.exploration.chain import Chain
from pipeengine.exploration.judge import Scene, peak_bytes, play, schedule_of
from pipeengine.exploration.point_search import Candidate, Verdict
from pipeengine.exploration.space import Point
from pipeengine.exploration.ways import recomputing
from pipeengine.simulation import memory_model_of


@dataclass(frozen=True)
class Configuration:
    """What ``Pipeline`` is to do with a plan: the arguments that belong to it, by their names there.

    ``rows`` are those of a micro-batch; ``recompute`` names stages or modules.
    """

    num_replicas: int
    num_stages: int
    num_workers: int
    num_microbatches: int
    rows: int
    schedule: str
    recompute: tuple[int | str, ...] = ()
    shard: str | None = None
    near: str = "stages"

    @classmethod
    def from_json(cls, obj: Mapping) -> Configuration:
        """What ``asdict`` wrote. Raises ``PlanError`` for anything else."""
        try:
            return cls(**{**obj, "recompute": tuple(obj["recompute"])})
        except (TypeError, KeyError) as error:
            raise PlanError(f"the plan's configuration is damaged: {error}") from error


def configuration_in(plan: object) -> Configuration | None:
    """What a plan that a search has found says besides; None for any other plan. A path is read.

    Raises ``PlanError`` where a configuration is there but damaged.
    """
    if isinstance(plan, Choice):
        return plan.configuration
    if not isinstance(plan, (str, Path)):
        return None
    try:
        obj = json.loads(Path(plan).read_bytes())
    except (OSError, ValueError):       # whoever reads the plan itself says it best
        return None
    told = obj.get("configuration") if isinstance(obj, Mapping) else None
    return None if told is None else Configuration.from_json(told)


@dataclass(frozen=True)
class Choice:
    """A configuration with its plan and what it takes: seconds of a step, bytes per worker at its fullest.

    ``bubble`` is the idle share of the workers' time. ``plan`` is a plan like any other; ``save`` writes it together
    with the configuration, and ``Pipeline(..., plan=)`` reads either.
    """

    configuration: Configuration
    plan: Plan
    seconds: float
    rows_per_second: float
    peak_bytes: tuple[float, ...]
    bubble: float
    flops_share: float | None = None

    def to_json(self) -> dict:
        """A plan's JSON object with ``configuration`` and ``predicted`` beside it."""
        predicted = {name: getattr(self, name) for name in ("seconds", "rows_per_second", "peak_bytes", "bubble",
                                                            "flops_share")}
        return {**self.plan.to_json(), "configuration": asdict(self.configuration), "predicted": predicted}

    def save(self, path: str | Path) -> None:
        """Write ``to_json``; ``Plan.load`` reads the plan in it."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n")


def choice_of(candidate: Candidate, chain: Chain, scene: Scene, peak_flops: float | None) -> Choice:
    """The candidate with its full plan, priced on the cost graph itself and played through once more."""
    point, (places, until) = candidate.point, candidate.cut
    schedule = schedule_of(point.schedule, point.workers, point.num_microbatches, point.stages_per_worker)
    plan = full_plan(chain, candidate, scene, memory_model_of(schedule), schedule.topology.worker_of)
    priced = price_stages(plan, recomputing(candidate.cut)) if point.recompute == "stages" else (
        replace(plan, stages=chain.price(places, until, point.recompute).stages))
    seconds, timeline, _ = play(scene, priced, schedule)
    recompute = recomputed(chain, candidate)
    rows = scene.training.global_rows
    flops = chain.graph.graph.get("made_with", {}).get("flops")
    share = None
    if flops and peak_flops and scene.hardware.num_devices:
        share = flops * rows / point.rows / (seconds * peak_flops * scene.hardware.num_devices)
    configuration = Configuration(point.replicas, point.num_stages, point.workers, point.num_microbatches, point.rows,
                                  point.schedule, recompute, point.shard, point.near)
    return Choice(configuration, plan, seconds, rows / seconds, peak_bytes(scene, priced, schedule),
                  1 - float(timeline.busy.mean()) / seconds, share)


def full_plan(chain: Chain, candidate: Candidate, scene: Scene, memory_model: MemoryModel,
              worker_of: tuple[int, ...]) -> Plan:
    """The cut as ``partitioners`` writes plans: with names, boundaries, ties, and loads under ``"overlap"``.

    Its bound says nothing of cuts alone; the search's own does.
    """
    places, point = candidate.cut[0], candidate.point
    stage_of: dict = dict(zip(chain.order, chain.stage_of(places).tolist()))
    device = Device(memory=scene.hardware.memory, count=point.num_stages)
    far = any(link == scene.hardware.between for row in scene.links[0] for link in row)
    cluster = Cluster((device,), links=(scene.hardware.between if far else scene.hardware.inside,))
    setting = Setting(objective="overlap", cluster=cluster, stage_devices=(0,) * point.num_stages,
                      memory_model=replace(memory_model, parameter_factor=scene.state_factor + 1),
                      num_microbatches=point.num_microbatches, stages_per_worker=point.stages_per_worker,
                      worker_of=worker_of if point.stages_per_worker > 1 else ())
    return build_plan(chain.graph, stage_of, setting, lower_bound=0.0, proof="chosen by the search for the whole step")


def recomputed(chain: Chain, candidate: Candidate) -> tuple[int | str, ...]:
    """What runs again in backward: stages by number, or the first blocks of stages, by path."""
    if candidate.point.recompute == "stages":
        return recomputing(candidate.cut)
    spans = zip(candidate.cut[0], candidate.cut[1]) if candidate.point.recompute == "blocks" else ()
    paths = (chain.blocks[chain.places[start]:chain.places[until]] for start, until in spans)
    return tuple(dict.fromkeys(path for run in paths for path in run if path))


@dataclass(frozen=True)
class Loser:
    """Another configuration and why it is not the best; ``seconds`` None where it was not played through.

    No cut of it is faster than ``bound`` seconds.
    """

    point: Point
    bound: float
    seconds: float | None
    why: str


def loser_of(verdict: Verdict, best: Candidate) -> Loser:
    """Why this point is not the best, in a few words."""
    if verdict.best is None:
        return Loser(verdict.point, verdict.bound, None, str(verdict.why) or (
            f"no cut of it is faster than {_slower(verdict.bound, best.seconds)}"))
    slower, why = _slower(verdict.best.seconds, best.seconds), []
    if verdict.best.bubble > best.bubble + 0.002:
        why.append(f"{format_share(verdict.best.bubble - best.bubble)} more bubble")
    work, least = (sum(stage.forward + stage.backward for stage in one.plan.stages) * one.point.rows ** -1
                   for one in (verdict.best, best))
    if work > least * 1.002:
        why.append(f"{format_share(work / least - 1)} more work per row" + (
            ", recomputing" if recomputing(verdict.best.cut) else ""))
    if verdict.best.seconds <= best.seconds * (1 + 1e-9):
        return Loser(verdict.point, verdict.bound, verdict.best.seconds, "as fast")
    return Loser(verdict.point, verdict.bound, verdict.best.seconds, f"{slower}: {' and '.join(why) or 'longer ends'}")


def _slower(seconds: float, best: float) -> str:
    return f"{format_share(seconds / best - 1)} slower" if seconds > best else "the best found"


def check_graph(graph: nx.DiGraph) -> int:
    """Rows of the micro-batch that a cost graph is of. 1 where it does not say."""
    made = graph.graph.get("made_with", {})
    return max(1, round(made.get("rows", 1) / made.get("num_microbatches", 1)))
