"""``plan`` on the command line, for graphs in files. The engine's door adds models."""
from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
from pathlib import Path

import networkx as nx

from partitioners.errors import GraphError, PipeEngineError, exit_status
from partitioners.graph import (
    FORMAT,
    MASTER,
    OPTIMIZER_STATES,
    WORKLOAD,
    Link,
    MemoryModel,
    from_json,
    parameter_factor,
    read_pipedream,
)
from partitioners.partitioning import OBJECTIVES, partition
from partitioners.plan import Plan, verify
from partitioners.reporting.drawing import draw
from partitioners.reporting.explanation import cut_stories, explain, limits
from partitioners.units import format_seconds, parse_memory, parse_rate, parse_seconds

COLUMNS = 100       # of a line of text, at most


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return int(text)


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number that is not negative")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``plan``."""
    parser.add_argument("graph", help="a cost graph: pipeline-graph/1, pipeline-workload/1 or a PipeDream profile")
    parser.add_argument("--stages", type=_count, help="number of stages (default: the devices that the file names)")
    parser.add_argument("--memory", type=parse_memory, help="bytes per device, such as 80GB")
    parser.add_argument("--bandwidth", type=parse_rate, help="of a link, such as 25GB/s (default: links are free)")
    parser.add_argument("--latency", type=parse_seconds, default=0.0, help="of a link, such as 5us")
    parser.add_argument("--objective", choices=OBJECTIVES, default="sum",
                        help="sum: compute + communication; overlap: the larger; 1f1b: the period with link latency")
    parser.add_argument(
        "--microbatches",
        type=_count,
        help="per step; ties and activations count them (default: those that the graph was made with, else 1)",
    )
    parser.add_argument("--schedule", choices=("gpipe", "1f1b", "none"), default="gpipe",
                        help="how many micro-batches a stage holds")
    parser.add_argument("--optimizer", choices=(*OPTIMIZER_STATES, "adamw" + MASTER), default="adamw",
                        help="whose state counts as memory (default: adamw)")
    parser.add_argument("--master-weights", action="store_true",
                        help="the optimizer works on copies of 4 bytes of lower-precision weights")
    parser.add_argument("--replicas", type=_count, default=1, help="pipelines side by side that sum their gradients")
    parser.add_argument("--shard", choices=("none", "optimizer", "parameters"), default="none",
                        help="optimizer: each replica keeps its part of the state; parameters: and of the weights, "
                        "which are whole during a step besides")
    parser.add_argument("--parameter-factor", type=_fraction, default=None,
                        help="weights, gradients and optimizer state in units of the weights (default: by --optimizer)")
    parser.add_argument("--stages-per-worker", type=_count, default=1)
    parser.add_argument("--recompute", action="store_true",
                        help="compute blocks again in backward where memory would not do")
    parser.add_argument("--prefer-single-tensor", type=_fraction, default=None, metavar="FRACTION",
                        help="take a cut with fewer tensors if it is within this fraction of the best")
    parser.add_argument("--gap", type=_fraction, default=0.0,
                        help="stop at this fraction above the best (default: 0, the best)")
    parser.add_argument("--time-limit", type=parse_seconds, default=None)
    parser.add_argument("--format", choices=("json", "text", "svg"), default="text")
    parser.add_argument("--save", metavar="PLAN", help="also write the plan here")


def read_graph(path: str | Path) -> nx.DiGraph:
    """A cost graph from a file, whichever of the three formats it is in."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise GraphError(f"cannot read {path}: {error}") from error
    try:
        obj = json.loads(text)
    except (ValueError, RecursionError) as error:
        if " -- " in text:
            return read_pipedream(text)
        raise GraphError(f"{path} holds neither {FORMAT} nor {WORKLOAD} nor a PipeDream profile: {error}") from error
    graph = from_json(obj)
    graph.graph["format"] = obj["format"]
    return graph


def plan_graph(graph: nx.DiGraph, args: argparse.Namespace) -> Plan:
    """Plan and verify as the options say. A workload file may leave devices unused, and weighs only its objective."""
    given = graph.graph.get("format") == WORKLOAD
    prefer = args.prefer_single_tensor if args.prefer_single_tensor is not None else 0.0 if given else 0.05
    plan = partition(
        graph,
        args.stages,
        objective=args.objective,
        bandwidth=args.bandwidth,
        latency=args.latency,
        memory=args.memory,
        memory_model=MemoryModel(_factor(graph, args), args.schedule),
        num_microbatches=microbatches_of(graph, args.microbatches),
        stages_per_worker=args.stages_per_worker,
        allow_empty=given,
        prefer_single_tensor=prefer,
        gap=args.gap,
        time_limit=args.time_limit,
        progress=lambda line: print(line, file=sys.stderr),
        recompute=args.recompute,
    )
    verify(plan, graph)
    return plan


def _factor(graph: nx.DiGraph, args: argparse.Namespace) -> float:
    """Of the memory model: as given, else by the optimizer, its shards, and the precision of the graph's weights."""
    if args.parameter_factor is not None:
        return args.parameter_factor
    size = graph.graph.get("made_with", {}).get("bytes_per_weight")
    if (args.master_weights or args.optimizer.endswith(MASTER)) and not size:
        raise GraphError("the graph does not say how many bytes a weight has, which --master-weights needs; give "
                         "--parameter-factor (8 for AdamW on bf16 weights with fp32 copies)")
    whole = parameter_factor(args.optimizer, bytes_per_weight=size or 4.0, master_weights=args.master_weights)
    if args.replicas == 1 or args.shard == "none":
        return whole
    # Weights and gradients are whole during a step; with sharded parameters the replica's own part is there besides.
    return 2.0 + (whole - (1.0 if args.shard == "parameters" else 2.0)) / args.replicas


def replica_line(plan: Plan, args: argparse.Namespace) -> str:
    """What the replicas add to a step, for people: "" without any."""
    if args.replicas == 1:
        return ""
    steps, link = 2 * (args.replicas - 1), Link(args.bandwidth, args.latency)
    seconds = [link.seconds(steps / args.replicas * (stage.param_bytes - stage.frozen_bytes), steps)
               for stage in plan.stages]
    step = plan.bottleneck * (plan.setting.num_microbatches + plan.num_stages - 1)
    text = f"{args.replicas} replicas: to sum gradients takes {format_seconds(max(seconds))} behind the last backward"
    if args.shard == "parameters":
        half = format_seconds(max(seconds) / 2)
        text = (f"{args.replicas} replicas: to make parameters whole takes {half} before the first forward, to sum "
                f"gradients {half} behind the last backward")
    return text + (f", beside {format_seconds(step)} for a step of equal stages" if step else "")


def microbatches_of(graph: nx.DiGraph, asked: int | None) -> int:
    """Micro-batches per step: those asked for, but no more than rows; else those that the graph was made with."""
    made = graph.graph.get("made_with", {})
    return min(asked, made.get("rows", asked)) if asked else made.get("num_microbatches", 1)


def assumptions(plan: Plan, graph: nx.DiGraph) -> dict:
    """What the plan's figures rest on: the batch, where the seconds come from, and the memory model."""
    setting = plan.setting
    held = [
        setting.memory_model.in_flight(stage, plan.num_stages, setting.num_microbatches)
        for stage in range(plan.num_stages)
    ]
    return {"num_microbatches": setting.num_microbatches, "made_with": graph.graph.get("made_with"),
            "memory_schedule": setting.memory_model.schedule, "microbatches_held": held,
            "parameter_factor": setting.memory_model.parameter_factor}


def _tell_assumptions(assumed: dict) -> str:
    origin, count, kept = assumed["made_with"] or {}, assumed["num_microbatches"], assumed["microbatches_held"]
    batch = f"{count:,} micro-batch{'es' * (count != 1)}"
    if "rows" in origin:
        batch = (
            f"{origin['rows']:,} rows"
            + (f" of {' x '.join(map(str, origin['row']))}" if origin.get("row") else "")
            + f" in {batch}"
        )
    if origin.get("num_microbatches", count) != count:
        batch += f", with seconds and bytes of one of {origin['num_microbatches']:,}"
    source = {
        "measured": "seconds measured on {device}",
        "analytic": "analytic seconds for {flops_per_second:.3g} FLOP/s and {bytes_per_second:.3g} bytes/s of memory",
    }.get(origin.get("costs"), "seconds as the file says")
    most = str(kept[0]) if len(set(kept)) == 1 else f"{kept[0]} to {kept[-1]}"
    return (
        f"planned for {batch}; {source.format(**origin)}; memory as under {assumed['memory_schedule']}: {most} "
        f"micro-batch{'es' * (kept != [1] * len(kept))} held, "
        f"{assumed['parameter_factor']:g} x parameters"
    )


def render(plan: Plan, graph: nx.DiGraph, form: str) -> str:
    """The plan as ``json``, ``text`` or ``svg``."""
    if form == "svg":
        return draw(plan, graph)
    if form == "text":
        return _wrapped(f"{_tell_assumptions(assumptions(plan, graph))}\n\n{explain(plan, graph)}")
    found = limits(plan, graph)
    stories = cut_stories(plan, graph) if plan.num_stages > 1 else ()
    return json.dumps(plan.to_json() | {"cuts": [vars(story) for story in stories], "limits": vars(found),
                                        "assumptions": assumptions(plan, graph)})


def _wrapped(text: str) -> str:
    """Sentences on lines of at most 100 columns, what goes on indented; rows of a table stay as they are."""
    return "\n".join(line if len(line) <= COLUMNS else textwrap.fill(
        line, COLUMNS, subsequent_indent=" " * (len(line) - len(line.lstrip()) + 4), break_long_words=False,
        break_on_hyphens=False, drop_whitespace=True, replace_whitespace=False) for line in text.split("\n"))


def run(args: argparse.Namespace) -> tuple[int, str]:
    """Exit status and what to print; 2 for a graph that cannot be used, 3 when there is no answer."""
    try:
        graph = read_graph(args.graph)
        plan = plan_graph(graph, args)
        if args.save:
            plan.save(args.save)
        return 0, render(plan, graph, args.format)
    except (PipeEngineError, OSError) as error:
        return exit_status(error), json.dumps({"error": str(error)}) if args.format == "json" else f"error: {error}"


def main(arguments: list[str] | None = None) -> int:
    """``python -m partitioners.command graph.json --stages 4``."""
    parser = argparse.ArgumentParser(prog="partitioners", description=__doc__)
    add_arguments(parser)
    status, text = run(parser.parse_args(arguments))
    print(text)
    return status
if __name__ == "__main__":
    raise SystemExit(main())
