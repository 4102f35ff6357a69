"""``partition``: from a cost graph to a plan with its proof."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Integral, Real

import networkx as nx

from partitioners.errors import InfeasibleError, PartitionError
from partitioners.graph import Cluster, Device, Link, MemoryModel, check
from partitioners.plan import Plan, Setting, deal
from partitioners.pricing import build_plan
from partitioners.solvers import (
    Problem,
    Solution,
    build_problem,
    fits_with_recomputation,
    interleave,
    shortest_period,
    solve,
    with_recomputation,
)

OBJECTIVES = ("sum", "overlap", "1f1b")


def partition(graph: nx.DiGraph, num_stages: int | None = None, *, devices: Cluster | Sequence[Device] | None = None,
              objective: str = "sum", bandwidth: float | None = None, latency: float = 0.0, memory: float | None = None,
              memory_model: MemoryModel = MemoryModel(), num_microbatches: int = 1, stages_per_worker: int = 1,
              worker_of: Sequence[int] | None = None,
              allow_empty: bool = False, prefer_single_tensor: float = 0.05, gap: float = 0.0,
              time_limit: float | None = None, progress: Callable[[str], None] | None = None,
              recompute: bool = False) -> Plan:
    """Cut ``graph`` into stages whose largest load is as small as possible.

    ``num_stages`` equal devices, or ``devices``: a ``Cluster``, or classes to use in any order. ``bandwidth`` in bytes
    per second (None: free links), ``latency`` in seconds, ``memory`` in bytes per device. ``objective``: ``"sum"``
    adds computing and communication, ``"overlap"`` takes the larger, ``"1f1b"`` is the period of that schedule with
    link latency. With several ``stages_per_worker``, stage ``s`` lives on worker ``s mod workers``, or on
    ``worker_of[s]`` if that is given (a V: ``(0, 1, 1, 0)``), and a worker's load counts.
    ``memory_model`` says what of a node's bytes a worker holds, under which schedule, with ``num_microbatches`` a step.
    ``recompute`` may compute blocks again in backward where memory would not do. Unless ``allow_empty``, there are
    exactly ``num_stages`` stages and each holds parameters. Among cuts within ``prefer_single_tensor`` of the best, the
    one whose boundaries carry the fewest tensors wins. Stops at ``gap`` above the best (0.01: one per cent) or after
    ``time_limit`` seconds; ``progress`` is told in words how far it is. Raises ``PartitionError`` for options that
    cannot be, ``InfeasibleError`` where nothing fits, ``GraphError`` for a graph that says too little.
    """
    if objective not in OBJECTIVES:
        raise PartitionError(f"objective {objective!r} is none of {', '.join(OBJECTIVES)}")
    if worker_of is not None:
        stages_per_worker = _most_together(worker_of, num_stages)
    if objective == "1f1b" and (stages_per_worker > 1 or recompute) or (recompute and stages_per_worker > 1):
        raise PartitionError(
            "1f1b, several stages per worker and recompute cannot be combined yet; ask for one of them"
        )
    _check_options(num_stages=num_stages, num_microbatches=num_microbatches, stages_per_worker=stages_per_worker,
                   prefer_single_tensor=prefer_single_tensor, gap=gap, time_limit=time_limit)
    check(graph)
    allow_empty &= stages_per_worker == 1    # an empty stage would deal all later ones to other workers
    cluster = _cluster(graph, num_stages, devices, Link(bandwidth, latency), memory)
    wanted = num_stages or cluster.num_devices
    problem = build_problem(graph, cluster=cluster, num_stages=wanted, objective=objective, memory_model=memory_model,
                            num_microbatches=num_microbatches, allow_empty=allow_empty)
    _check_size(graph, problem)
    if stages_per_worker > 1:
        solution = interleave(problem, worker_of or deal(wanted, stages_per_worker), prefer_single_tensor, time_limit,
                              progress)
    elif objective == "1f1b":
        solution = shortest_period(problem, gap, time_limit, progress)
    elif recompute and problem.memory_may_bind():
        solution = with_recomputation(problem, gap, time_limit, progress)
    else:
        solution = _plain(problem, prefer_single_tensor, gap, time_limit, progress)
    used = [stage for stage, items in enumerate(solution.stages) if items]
    setting = Setting(objective=objective, cluster=cluster, memory_model=memory_model,
                      num_microbatches=num_microbatches, stages_per_worker=stages_per_worker, allow_empty=allow_empty,
                      worker_of=tuple(worker_of or ()) if stages_per_worker > 1 else (), recompute=recompute,
                      stage_devices=tuple(_device_index(problem, cluster, solution.levels[stage]) for stage in used))
    stage_of = {node: number for number, stage in enumerate(used) for node in solution.stages[stage]}
    return build_plan(graph, stage_of, setting, lower_bound=solution.lower_bound, proof=solution.proof)


def _plain(problem: Problem, prefer_single_tensor: float, gap: float, time_limit: float | None,
           progress: Callable[[str], None] | None) -> Solution:
    """The best cut; where none fits, whether recomputation would help is told."""
    try:
        return solve(problem, prefer_single_tensor, gap, time_limit, progress)
    except InfeasibleError as error:
        if problem.memory_may_bind() and fits_with_recomputation(problem):
            raise InfeasibleError(f"{error} or recompute=True (--recompute), with which it fits") from None
        raise


def _most_together(worker_of: Sequence[int], num_stages: int | None) -> int:
    """How many stages the fullest worker has; workers are numbered from 0 without gaps."""
    if len(worker_of) != num_stages or set(worker_of) != set(range(max(worker_of, default=0) + 1)):
        raise PartitionError(
            f"worker_of is {tuple(worker_of)}; it must name the worker of each of the {num_stages} stages, "
            "workers numbered from 0"
        )
    return max(map(list(worker_of).count, worker_of))


def _check_options(**options: object) -> None:
    """Counts are whole numbers of at least 1, the other options numbers that are not negative (None: not given)."""
    for name, value in options.items():
        if value is None and name in ("num_stages", "time_limit"):
            continue
        count = name in ("num_stages", "num_microbatches", "stages_per_worker")
        if isinstance(value, bool) or not isinstance(value, Integral if count else Real) or not value >= int(count):
            wanted = "a whole number, at least 1" if count else "a number that is not negative"
            raise PartitionError(f"{name} is {value!r}; it must be {wanted}")


def _cluster(graph: nx.DiGraph, num_stages: int | None, devices: Cluster | Sequence[Device] | None, link: Link,
             memory: float | None) -> Cluster:
    """One cluster from the ways to name it; ordered ones get one entry per device."""
    known = graph.graph.get("devices", ())
    if devices is None and num_stages is None and not known:
        raise PartitionError("neither num_stages nor devices is given; say into how many stages to cut")
    if devices is None and num_stages is not None:
        base = next((device for device in known if device.pays_link), Device(_only_class(graph)))
        devices = (replace(base, count=num_stages),)
    if not isinstance(devices, Cluster):
        devices = Cluster(tuple(known if devices is None else devices), links=(link,))
    if memory is not None:
        devices = replace(devices, devices=tuple(replace(device, memory=memory) if device.pays_link else device
                                                 for device in devices.devices))
    if devices.ordered:
        devices = replace(devices, devices=tuple(replace(device, count=1) for device in devices.devices
                                                 for _ in range(device.count)))
    if devices.num_devices < 1:
        raise PartitionError(f"the {len(devices.devices)} device classes have no device among them; give one a count")
    if num_stages is not None and devices.num_devices != num_stages:
        raise PartitionError(
            f"num_stages is {num_stages} but there are {devices.num_devices} devices; give one of them"
        )
    return devices


def _only_class(graph: nx.DiGraph) -> str:
    """The device class that the costs name, if they name exactly one."""
    names = {name for _, data in graph.nodes(data=True) if isinstance(data.get("forward"), dict)
             for name in data["forward"]}
    return names.pop() if len(names) == 1 else "device"


def _device_index(problem: Problem, cluster: Cluster, level: int) -> int:
    if cluster.ordered:
        return level
    return cluster.devices.index(problem.levels[level].device)


def _check_size(graph: nx.DiGraph, problem: Problem) -> None:
    if problem.must_hold is None:
        return
    have = int(problem.must_hold.sum())
    if have < problem.num_stages:
        kind = "with parameters " if problem.has_parameters.any() else ""
        raise PartitionError(
            f"the model has {have} cuttable nodes {kind}but {problem.num_stages} stages were asked for; "
            + (f"try num_stages={have}" if have > 1 else "it runs whole only, with num_stages=1")
            + _largest_group(graph, problem)
        )


def _largest_group(graph: nx.DiGraph, problem: Problem) -> str:
    """What co-location ties together, if anything."""
    group = max(problem.items, key=len)
    labels = [data["colocate"] for node in group if (data := graph.nodes[node]).get("colocate") is not None]
    if len(group) < 2 or not labels:
        return ""
    return (f"; colocate={labels[0]!r} ties {len(group)} of the {len(graph)} nodes together, from {str(group[0])!r} to "
            f"{str(group[-1])!r}, with all that lies between them")
