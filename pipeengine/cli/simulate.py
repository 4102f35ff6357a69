"""``pipeengine simulate``: what a schedule would take, before there is a machine. Needs no torch."""
from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import NamedTuple

from partitioners.plan import Plan
from partitioners.tables import format_table
from partitioners.units import format_bytes, format_number, format_seconds, format_share, parse_size
from pipeengine.errors import InfeasibleError, PipeEngineError, ScheduleError, exit_status
from pipeengine.program import check
from pipeengine.report import chrome_trace, timeline_svg, timeline_text
from pipeengine.schedules import Edge, Schedule, Topology
from pipeengine.simulation import (
    Breakdown,
    Costs,
    LinkTimes,
    Timeline,
    breakdown,
    costs_of,
    edges_of,
    peak_activations,
    simulate,
)
from pipeengine.synthesis import SCHEDULES, build, find


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``pipeengine simulate``."""
    parser.add_argument(
        "--schedule",
        default="all",
        metavar="NAME",
        help=f"all (a table that compares them), one of {', '.join(SCHEDULES)}, or your own: a .csv file of "
        "torch's text form, or module:function or path/to/file.py:function; default all",
    )
    parser.add_argument("--workers", type=int, metavar="P", help="number of workers; with --plan, those of the plan")
    parser.add_argument(
        "--microbatches", type=int, metavar="M", help="number of micro-batches; with --plan, the plan's"
    )
    parser.add_argument("--stages-per-worker", type=int, metavar="V", help="for schedules that take any number")
    parser.add_argument("--forward", type=float, metavar="F",
                        help="time of one micro-batch's forward on one worker, shared by its stages; default 1")
    parser.add_argument("--input-grad", type=float, metavar="I", help="time of its input gradient; default 1")
    parser.add_argument("--weight-grad", type=float, metavar="W", help="time of its weight gradient; default 1")
    parser.add_argument("--hop", type=float, metavar="C", help="time of one message; default 0")
    parser.add_argument(
        "--max-peak",
        type=parse_size,
        metavar="A",
        help="activations a worker may keep, in micro-batches; with --plan the memory of a device, such as 80GB, for "
        "weights, gradients, optimizer and activations. auto is made for it (default what 1F1B needs), others that "
        "need more are refused",
    )
    parser.add_argument("--objective", choices=("makespan", "span"),
                        help="for auto: what to make short; default makespan")
    parser.add_argument("--weight-activation", type=float, metavar="S",
                        help="share of a micro-batch's activations kept between I and W; default 1, or the plan's (the "
                        "zero-bubble papers' tables: 0.5)")
    parser.add_argument("--plan", metavar="FILE", help="take stages, times and messages from a plan instead")
    parser.add_argument("--format", choices=("text", "json", "svg", "chrome"), default="text")
    parser.add_argument("--width", type=int, default=120, help="columns of the text grid")
    parser.add_argument("-o", "--output", metavar="FILE", help="write there instead of printing")


class _Result(NamedTuple):
    """One simulated schedule."""
    schedule: Schedule
    timeline: Timeline
    peaks: tuple[float, ...]
    parts: Breakdown
    bubble: float
    messages: int
    weights: tuple[float, ...] = ()         # bytes per worker besides activations, where they are known

    @property
    def memory(self) -> tuple[float, ...]:
        """Per worker: activations at their peak, in bytes with what else a plan's worker holds."""
        return tuple(map(sum, zip(self.peaks, self.weights))) if self.weights else self.peaks

    def to_dict(self) -> dict[str, object]:
        return {"schedule": self.schedule.name, "workers": self.timeline.num_workers,
                "microbatches": self.schedule.num_microbatches, "stages": self.schedule.topology.num_stages,
                "makespan": self.timeline.makespan, "span": self.timeline.span, "bubble": self.bubble,
                "peak_activations": list(self.peaks), "weight_bytes": list(self.weights), "messages": self.messages,
                "idle_share": self.timeline.idle_share.tolist(), "breakdown": asdict(self.parts)}


def run(args: argparse.Namespace) -> tuple[int, str]:
    """Exit status and what to print; 2 for words that do not fit, 3 when there is no answer."""
    try:
        names = list(SCHEDULES) if args.schedule == "all" else [args.schedule]
        results, refused = _simulated(args, names)
        if not results:
            raise refused[0][1]
        text = (_ALL if args.schedule == "all" else _ONE)[args.format](args, results, refused)
        if args.output:
            with open(args.output, "w", encoding="utf-8") as file:
                file.write(text + "\n")
            text = f"wrote {args.output}"
        return 0, text
    except (PipeEngineError, OSError) as error:
        return exit_status(error), json.dumps({"error": str(error)}) if args.format == "json" else f"error: {error}"


def _simulated(args: argparse.Namespace,
               names: Sequence[str]) -> tuple[list[_Result], list[tuple[str, PipeEngineError]]]:
    """Each schedule's result, and those that these numbers do not suit, with the reason."""
    results, refused = [], []
    if args.stages_per_worker is not None and args.stages_per_worker < 1:
        raise ScheduleError(f"--stages-per-worker is {args.stages_per_worker}; give 1 or more")
    own = find(args.schedule) if args.schedule != "all" else None
    if isinstance(own, Schedule):
        args = argparse.Namespace(**vars(args) | {"workers": args.workers or own.topology.num_workers,
                                                  "microbatches": args.microbatches or own.num_microbatches})
    ask = _from_plan(args) if args.plan else _from_times(args)
    for name in names:
        try:
            results.append(ask(name))
        except ScheduleError as error:
            refused.append((name, error))
    return results, refused


def _from_times(args: argparse.Namespace) -> Callable[[str], _Result]:
    for option in ("workers", "microbatches"):
        if (getattr(args, option) or 0) < 1:
            raise ScheduleError(f"--{option} is {getattr(args, option)}; give 1 or more, or a --plan")
    times = {name: getattr(args, name) for name in _TIMES if getattr(args, name) is not None}

    def costs_for(topology: Topology) -> Costs:
        kept = 1.0 if args.weight_activation is None else args.weight_activation
        return Costs.uniform(topology, **times, weight_activation=kept)

    def ask(name: str) -> _Result:
        fixed = args.schedule == "all" and name not in _TAKES_STAGES
        schedule = build(name, num_workers=args.workers, num_microbatches=args.microbatches,
                         stages_per_worker=None if fixed else args.stages_per_worker,
                         max_peak=args.max_peak, objective=args.objective,
                         costs=costs_for(Topology.looped(args.workers, args.stages_per_worker or 1)))
        costs = costs_for(schedule.topology)
        work = args.microbatches * sum(times.get(name, 1.0) for name in _TIMES[:3])
        return _result(schedule, costs, schedule.topology.chain(), work, args.max_peak)
    return ask
_TIMES = ("forward", "input_grad", "weight_grad", "hop")
_TAKES_STAGES = ("interleaved-1f1b", "bfs", "interleaved-zb", "auto")


def _from_plan(args: argparse.Namespace) -> Callable[[str], _Result]:
    both = [f"--{name.replace('_', '-')}" for name in _TIMES if getattr(args, name) is not None]
    if both:
        raise ScheduleError(f"--plan and {both[0]} both give times; give one of them")
    plan = Plan.load(args.plan)
    link = plan.setting.cluster.links[0]
    costs, edges = costs_of(plan, LinkTimes(link.latency, bytes_per_second=link.bandwidth)), edges_of(plan)
    if args.weight_activation is not None:
        costs = replace(costs, weight_activation=tuple(args.weight_activation * held for held in costs.activation))
    microbatches = args.microbatches or plan.setting.num_microbatches

    def ask(name: str) -> _Result:
        per_worker = args.stages_per_worker or _stages_per_worker(name, args, plan)
        if args.workers is not None and args.workers * per_worker != plan.num_stages:
            fitting = ", ".join(str(count) for count in range(1, plan.num_stages + 1) if plan.num_stages % count == 0)
            raise ScheduleError(
                f"--workers is {args.workers}, with {per_worker} stages each; the plan has {plan.num_stages} stages: "
                f"leave --workers out, or give one of {fitting}"
            )
        workers = plan.num_stages // per_worker
        room = args.max_peak
        if room is not None and name in SCHEDULES:
            # What a worker holds besides depends on its stages, so the order is made twice.
            shape = build(name, num_workers=workers, num_microbatches=microbatches, stages_per_worker=per_worker,
                          costs=costs).topology
            room = _room(args.max_peak, _held(plan, shape))
        schedule = build(name, num_workers=workers, num_microbatches=microbatches, stages_per_worker=per_worker,
                         costs=costs, max_peak=room, objective=args.objective)
        if schedule.topology.num_stages != plan.num_stages or schedule.topology.num_routes > 1:
            raise ScheduleError(f"schedule {name} on {workers} workers has {schedule.topology.num_stages} stages, the "
                                f"plan has {plan.num_stages}; plan for that many stages")
        work = microbatches * sum(costs.forward + costs.backward) / workers
        weights = _held(plan, schedule.topology)
        room = None if args.max_peak is None else _room(args.max_peak, weights)
        return _result(schedule, costs, edges, work, room)._replace(weights=weights)
    return ask


def _held(plan: Plan, topology: Topology) -> tuple[float, ...]:
    """Bytes of weights, gradients, optimizer state and scratch that each worker holds whatever the order."""
    held = [0.0] * topology.num_workers
    for cost, worker in zip(plan.stages, topology.worker_of):
        held[worker] += plan.setting.memory_model.weights(cost.param_bytes, cost.frozen_bytes) + cost.workspace_bytes
    return tuple(held)


def _room(memory: float, held: Sequence[float]) -> float:
    """What is left for activations on the worker that holds most besides. Raises ``ScheduleError`` if nothing is."""
    if memory <= max(held):
        raise InfeasibleError(f"--max-peak is {memory:,.0f} bytes, and a worker of {len(held)} needs {max(held):,.0f} "
                            "for weights, gradients and optimizer alone; give more memory, or plan more stages")
    return memory - max(held)


def _stages_per_worker(name: str, args: argparse.Namespace, plan: Plan) -> int:
    if args.workers:
        return max(plan.num_stages // args.workers, 1)
    if plan.setting.stages_per_worker > 1:
        return plan.setting.stages_per_worker
    if name not in SCHEDULES:
        return 1
    return build(name, num_workers=2, num_microbatches=8).topology.num_stages // 2 if name != "auto" else 1


def _result(schedule: Schedule, costs: Costs, edges: Sequence[Edge], work: float, max_peak: float | None) -> _Result:
    check(schedule, edges=edges, max_peak=max_peak, costs=costs)
    timeline = simulate(schedule, costs, edges)
    owner, visits = schedule.topology.worker_of, schedule.topology.visits(schedule.num_microbatches)
    messages = sum((edge.activation + edge.gradient) * int((visits[edge.source] & visits[edge.target]).sum())
                   for edge in edges if owner[edge.source] != owner[edge.target])
    bubble = (timeline.span - work) / timeline.span if timeline.span else 0.0
    return _Result(schedule, timeline, tuple(peak_activations(schedule, costs).tolist()),
                   breakdown(schedule, costs, edges), bubble, messages)


def _writers(args: argparse.Namespace) -> tuple[Callable[[float], str], Callable[[float], str]]:
    """How times and peaks are written: with units where a plan gave them."""
    return (format_seconds, format_bytes) if args.plan else (format_number, "{:,.4g}".format)


def _text(args: argparse.Namespace, results: list[_Result], refused: object) -> str:
    [result] = results
    timeline, parts, (clock, size) = result.timeline, result.parts, _writers(args)
    kept = ", weights and optimizer included" if args.plan else " micro-batches' activations"
    return "\n".join([
        f"{result.schedule.name}: {timeline.num_workers} workers, {result.schedule.topology.num_stages} stages, "
        f"{result.schedule.num_microbatches} micro-batches", "", timeline_text(timeline, args.width), "",
        format_table((), [
            ("makespan", f"{clock(timeline.makespan)} = ideal {clock(parts.ideal)} + fill and drain "
             f"{clock(parts.fill_drain)} {_more(clock, parts.imbalance, 'imbalance', 'that uneven stages save')} "
             f"{_more(clock, parts.communication, 'communication', 'that messages save')}"),
            ("span", f"{clock(timeline.span)} of the worker at it longest, of which bubble (waiting between "
             f"its first and last action) {format_share(result.bubble, 2)}"),
            ("idle", f"{', '.join(map(format_share, timeline.idle_share))} of the makespan, by worker"),
            ("peak", f"{' '.join(map(size, result.memory))}{kept}"),
            ("messages", f"{result.messages:,} per step")], left=(0, 1))])


def _more(clock: Callable[[float], str], seconds: float, what: str, saved: str) -> str:
    """One more part of a makespan; a part below 0 is said to be a saving."""
    return f"+ {what} {clock(seconds)}" if seconds >= 0 else f"- {clock(-seconds)} {saved}"


def _json(args: argparse.Namespace, results: list[_Result], refused: object) -> str:
    return json.dumps(results[0].to_dict())


def _svg(args: argparse.Namespace, results: list[_Result], refused: object) -> str:
    peak = format_bytes if args.plan else lambda number: f"{number:.4g} micro-batches"
    panels = [(f"{r.schedule.name}: peak {peak(max(r.memory))}", r.timeline)
              for r in sorted(results, key=lambda result: -result.timeline.makespan)]
    return timeline_svg(panels, unit=_unit(args), hover=False)


def _unit(args: argparse.Namespace) -> str:
    """Of the times: a plan's are seconds, and so are those that were given; else a forward of a worker takes 1."""
    return "forwards" if args.plan is None and args.forward is None else "s"


def _chrome(args: argparse.Namespace, results: list[_Result], refused: object) -> str:
    return json.dumps(chrome_trace(*(result.timeline for result in results)))


def _table(args: argparse.Namespace, results: list[_Result], refused: list[tuple[str, PipeEngineError]]) -> str:
    heads = ("schedule", "workers", "stages", "makespan", "span", "bubble", "fill/drain", "imbalance", "comm.", "peak",
             "messages")
    groups: dict[int, list[_Result]] = {}
    for result in sorted(results, key=lambda r: (-r.timeline.num_workers, r.timeline.makespan)):
        groups.setdefault(result.timeline.num_workers, []).append(result)
    rows = [row for group in groups.values() for row in ((), *(_row(result, *_writers(args)) for result in group))]
    best = "; ".join(f"{group[0].schedule.name} on {workers} workers" for workers, group in groups.items())
    return "\n".join([
        format_table(heads, rows), "", f"fastest step: {best}" + (
            "; another number of workers is another number of devices" if len(groups) > 1 else ""),
        "peak with weights, gradients and optimizer" if args.plan else
        "times as given, peak in micro-batches of a whole worker", *(f"{name}: {error}" for name, error in refused)])


def _row(r: _Result, clock: Callable[[float], str], size: Callable[[float], str]) -> tuple[str, ...]:
    return (r.schedule.name, str(r.timeline.num_workers), str(r.schedule.topology.num_stages),
            clock(r.timeline.makespan), clock(r.timeline.span), format_share(r.bubble, 2), clock(r.parts.fill_drain),
            clock(r.parts.imbalance), clock(r.parts.communication), size(max(r.memory)), f"{r.messages:,}")


def _all_json(args: argparse.Namespace, results: list[_Result], refused: list[tuple[str, PipeEngineError]]) -> str:
    return json.dumps({"schedules": {r.schedule.name: r.to_dict() for r in results},
                       "refused": {name: str(error) for name, error in refused}})
_ONE = {"text": _text, "json": _json, "svg": _svg, "chrome": _chrome}
_ALL = {"text": _table, "json": _all_json, "svg": _svg, "chrome": _chrome}
