"""Orders made for the costs at hand: ``auto``, and a bound that no order can beat.

Three steps. Build orders greedily in time, input gradients first, weight gradients into gaps, for a grid of warm-ups
and patiences, one worker's at a time after that; add what the built-in schedules do; then swap neighbours
on the critical path (tabu search, as for job shops: Nowicki and Smutnicki, Management Science 1996). The gap filling
goes back to Qi et al., Zero Bubble, ICLR 2024, section 3. Deterministic: every worker of a job finds the same order.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from pipeengine.errors import ScheduleError
from pipeengine.program import check
from pipeengine.schedules import PUBLISHED, B, F, I, Lane, Schedule, Topology, W, call_schedule
from pipeengine.simulation import Costs, peak_activations, simulate
from pipeengine.synthesis.bound import lower_bound
from pipeengine.synthesis.list_scheduling import (
    PATIENCES,
    InterleavedSchedule,
    WarmupSearch,
    build_lanes,
    warmup_candidates,
)
from pipeengine.synthesis.problem import SLACK, Problem, pose_problem
from pipeengine.synthesis.tabu import TabuSearch


def auto(num_workers: int, num_microbatches: int, stages_per_worker: int = 1, costs: Costs | None = None,
         max_peak: float | Sequence[float] | None = None, objective: str = "makespan") -> Schedule:
    """The best order found for ``costs``, with at most ``max_peak`` activations kept per worker (1F1B's unless given).

    Never worse than the best built-in schedule that fits the memory and runs these stages. ``max_peak`` is in the unit
    of ``costs.activation``, without that in micro-batches of a whole worker.
    """
    topology = Topology.looped(num_workers, stages_per_worker)
    costs = costs or Costs.uniform(topology)
    rivals = list(_built_in(num_workers, num_microbatches, stages_per_worker))
    best: tuple[float, Schedule] | None = None
    task = pose_problem(topology, num_microbatches, costs, max_peak, objective)

    def offer(schedule: Schedule) -> float:
        nonlocal best
        if (peak_activations(schedule, costs) <= np.array(task.cap) * (1 + SLACK)).all():
            price = getattr(simulate(schedule, replace(costs, exchange=None, optimizer=None, reduce=None)), objective)
            if best is None or price < best[0] * (1 - SLACK):
                best = price, schedule
            return price
        return float("inf")

    prices = {number: offer(rival) for number, rival in enumerate(rivals)}
    fits = sorted((price, number) for number, price in prices.items() if price < float("inf"))
    starts = [_split(rivals[number]) for _, number in fits[:1 if stages_per_worker == 1 else 5]]
    for schedule in _searched(task, costs, starts):
        offer(schedule)
        offer(_fused(schedule, costs))
    if best is None:
        raise ScheduleError(f"no order of {num_microbatches} micro-batches found under {max(task.cap):,.6g} of "
                            f"activations; 1F1B needs {num_workers} micro-batches' worth, try max_peak={num_workers}")
    schedule = replace(best[1], name="auto")
    check(schedule, max_peak=np.array(task.cap), costs=costs)
    return schedule


def _built_in(num_workers: int, num_microbatches: int, stages_per_worker: int) -> Iterable[Schedule]:
    # Rounds are as many micro-batches as workers where these divide: less memory, also when the last round is short.
    counts = sorted({num_microbatches, -(-num_microbatches // num_workers) * num_workers})
    for function, count in product(PUBLISHED.values(), counts):
        try:
            schedule = call_schedule(function, num_workers, count,
                                     stages_per_worker=stages_per_worker if stages_per_worker > 1 else None)
        except ScheduleError:
            continue
        if schedule.topology.num_stages == num_workers * stages_per_worker and schedule.topology.num_routes == 1:
            yield replace(schedule.keep(num_microbatches), pairs=())


def _searched(task: Problem, costs: Costs, starts: Sequence[Schedule]) -> Iterable[Schedule]:
    """Orders from list scheduling and swapping, each start's best."""
    linear = task.num_stages == task.num_workers
    bound = lower_bound(task.topology, task.microbatches, costs, task.cap) if task.objective == "makespan" else 0.0
    lanes: list[tuple[Topology, list[list[int]]]] = []
    if linear:
        search = WarmupSearch(task, budget=max(40, 330_000 // task.size))
        for patience in PATIENCES:
            for warmup in warmup_candidates(task):
                search.price(warmup, [patience] * task.num_workers)
            if search.reached(bound):
                break
        for key in search.best(3):
            lanes.append((task.topology, build_lanes(task, *(key if search.reached(bound) else search.refine(key)))))
    else:
        streams = [InterleavedSchedule(task, flying, patience) for flying in (task.num_workers, task.microbatches)
                   for patience in (1e-4, 0.3, 1.0)]
        lanes.append((task.topology, min(streams, key=InterleavedSchedule.build).lanes))
    lanes += [(start.topology, _numbers(task, start)) for start in starts]
    rounds = min(220, 160_000 // task.size) * (1 if linear else 2) if task.objective == "makespan" else 0
    for topology, order in lanes:
        here = replace(task, topology=topology)
        length, order = TabuSearch(here).improve(order, rounds, bound) if rounds else (float("inf"), order)
        yield _schedule(here, order)
        if length <= bound * (1 + SLACK):
            return


def _split(schedule: Schedule) -> Schedule:
    """``schedule`` with every B as I and W."""
    lanes = []
    for op, stage, microbatch in schedule.lanes:
        twice = np.where(op == B, 2, 1)
        op = np.repeat(op, twice)
        whole = np.flatnonzero(op == B)
        op[whole[::2]], op[whole[1::2]] = I, W
        lanes.append(Lane(op, np.repeat(stage, twice), np.repeat(microbatch, twice)))
    return replace(schedule, lanes=tuple(lanes), pairs=())


def _fused(schedule: Schedule, costs: Costs) -> Schedule:
    """``schedule`` with B for each I that its own W follows, where B takes no longer and nobody waits for the I."""
    lanes = []
    for op, stage, microbatch in schedule.lanes:
        gain = (np.array(costs.backward) <= np.add(costs.input_grad, costs.weight_grad) * (1 + SLACK))[stage[:-1]]
        joined = ((op[:-1] == I) & (op[1:] == W) & (stage[:-1] == stage[1:]) & (microbatch[:-1] == microbatch[1:])
                  & (stage[:-1] == 0) & gain)
        keep = np.append(True, ~joined)
        op = op.copy()
        op[:-1][joined] = B
        lanes.append(Lane(op[keep], stage[keep], microbatch[keep]))
    return replace(schedule, lanes=tuple(lanes))


def _numbers(task: Problem, schedule: Schedule) -> list[list[int]]:
    code = np.array([0, -1, 1, 2])
    return [((code[op] * task.num_stages + stage) * task.microbatches + microbatch).tolist()
            for op, stage, microbatch in schedule.lanes]


def _schedule(task: Problem, lanes: Sequence[Sequence[int]]) -> Schedule:
    letters = np.array([F, I, W])
    columns = []
    for lane in lanes:
        rest, microbatch = np.divmod(np.array(lane, np.int64), task.microbatches)
        op, stage = np.divmod(rest, task.num_stages)
        columns.append(Lane.of(letters[op], stage, microbatch))
    return Schedule("auto", task.topology, task.microbatches, tuple(columns))
