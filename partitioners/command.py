"""``plan`` on the command line, for graphs in files. The engine's door adds models."""
from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path

import networkx as nx

from partitioners.devices import MemoryModel
from partitioners.draw import draw
from partitioners.errors import GraphError, PipeEngineError
from partitioners.explain import cut_stories, explain, limits
from partitioners.graph import FORMAT, WORKLOAD, from_json, read_pipedream
from partitioners.plan import Plan
from partitioners.solve import OBJECTIVES, partition
from partitioners.verify import verify

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15,
         "ki": 2.0 ** 10, "mi": 2.0 ** 20, "gi": 2.0 ** 30, "ti": 2.0 ** 40, "pi": 2.0 ** 50}
TIMES = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
NUMBER = r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*"


def parse_size(text: str) -> float:
    """Bytes from ``"80GB"``, ``"16 GiB"``, ``"1e9"`` or ``"102,297,600 bytes"``."""
    match = re.fullmatch(NUMBER + r"(?:([kmgtp]i?)?b?|bytes)\s*", re.sub(r"(?<=\d),(?=\d{3})", "", text.lower()))
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; try 80GB, 16GiB or a number of bytes")
    return float(match[1]) * UNITS[match[2] or ""]


def parse_rate(text: str) -> float | None:
    """Bytes per second from ``"25GB/s"`` or ``"2.5e10"``; None for ``"inf"``."""
    if text.strip().lower() in ("inf", "none"):
        return None
    match = re.fullmatch(r"(.*?)(?:/\s*s)?\s*", text.lower())
    try:
        rate = parse_size(match[1] if match else text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate; try 25GB/s or a number of bytes per second") from None
    if not rate > 0:
        raise argparse.ArgumentTypeError(f"a link of {text!r} moves nothing; try 25GB/s")
    return rate


def parse_seconds(text: str) -> float:
    """Seconds from ``"5us"`` or ``"5e-6"``."""
    match = re.fullmatch(NUMBER + "(s|ms|us|ns)?" + r"\s*", text.lower())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; try 5us or a number of seconds")
    return float(match[1]) * TIMES[match[2] or ""]


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
    parser.add_argument("--memory", type=parse_size, help="bytes per device, such as 80GB")
    parser.add_argument("--bandwidth", type=parse_rate, help="of a link, such as 25GB/s (default: links are free)")
    parser.add_argument("--latency", type=parse_seconds, default=0.0, help="of a link, such as 5us")
    parser.add_argument("--objective", choices=OBJECTIVES, default="sum",
                        help="sum: compute + communication; overlap: the larger; 1f1b: the period with link latency")
    parser.add_argument("--microbatches", type=_count, help="per step; ties and activations count them (default: those that the "
                        "graph was made with, else 1)")
    parser.add_argument("--schedule", choices=("gpipe", "1f1b", "none"), default="gpipe",
                        help="how many micro-batches a stage holds")
    parser.add_argument("--parameter-factor", type=_fraction, default=4.0,
                        help="weights, gradients and optimizer state, in units of the weights")
    parser.add_argument("--stages-per-worker", type=_count, default=1)
    parser.add_argument("--recompute", action="store_true", help="compute activations again where memory would not do")
    parser.add_argument("--prefer-single-tensor", type=_fraction, default=None, metavar="FRACTION",
                        help="take a cut with fewer tensors if it is within this fraction of the best")
    parser.add_argument("--gap", type=_fraction, default=0.0, help="stop within this fraction of the best")
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
        graph, args.stages, objective=args.objective, bandwidth=args.bandwidth, latency=args.latency,
        memory=args.memory, memory_model=MemoryModel(args.parameter_factor, args.schedule),
        num_microbatches=microbatches_of(graph, args.microbatches), stages_per_worker=args.stages_per_worker, allow_empty=given,
        prefer_single_tensor=prefer, gap=args.gap, time_limit=args.time_limit,
        progress=lambda line: print(line, file=sys.stderr), recompute=args.recompute)
    verify(plan, graph)
    return plan


def microbatches_of(graph: nx.DiGraph, asked: int | None) -> int:
    """Micro-batches per step: those asked for, but no more than rows; else those that the graph was made with."""
    made = graph.graph.get("made_with", {})
    return min(asked, made.get("rows", asked)) if asked else made.get("num_microbatches", 1)


def assumptions(plan: Plan, graph: nx.DiGraph) -> dict:
    """What the plan's figures rest on: the batch, where the seconds come from, and the memory model."""
    setting = plan.setting
    held = [setting.memory_model.in_flight(stage, plan.num_stages, setting.num_microbatches) for stage in range(plan.num_stages)]
    return {"num_microbatches": setting.num_microbatches, "made_with": graph.graph.get("made_with"),
            "memory_schedule": setting.memory_model.schedule, "microbatches_held": held,
            "parameter_factor": setting.memory_model.parameter_factor}


def _tell_assumptions(found: dict) -> str:
    made, count, held = found["made_with"] or {}, found["num_microbatches"], found["microbatches_held"]
    batch = f"{count:,} micro-batch{'es' * (count != 1)}"
    if "rows" in made:
        batch = f"{made['rows']:,} rows" + (f" of {' x '.join(map(str, made['row']))}" if made.get("row") else "") + f" in {batch}"
    if made.get("num_microbatches", count) != count:
        batch += f", with seconds and bytes of one of {made['num_microbatches']:,}"
    source = {"measured": "seconds measured on {device}", "analytic": "analytic seconds for {flops_per_second:.3g} FLOP/s and "
              "{bytes_per_second:.3g} bytes/s of memory"}.get(made.get("costs"), "seconds as the file says")
    most = str(held[0]) if len(set(held)) == 1 else f"{held[0]} to {held[-1]}"
    return (f"planned for {batch}; {source.format(**made)}; memory as under {found['memory_schedule']}: {most} micro-batch{'es' * (held != [1] * len(held))} held, "
            f"{found['parameter_factor']:g} x parameters")


def render(plan: Plan, graph: nx.DiGraph, form: str) -> str:
    """The plan as ``json``, ``text`` or ``svg``."""
    if form == "svg":
        return draw(plan, graph)
    if form == "text":
        return f"{_tell_assumptions(assumptions(plan, graph))}\n\n{explain(plan, graph)}"
    found = limits(plan, graph)
    stories = cut_stories(plan, graph) if plan.num_stages > 1 else ()
    return json.dumps(plan.to_json() | {"cuts": [vars(story) for story in stories], "limits": vars(found),
                                        "assumptions": assumptions(plan, graph)})


def run(args: argparse.Namespace) -> tuple[int, str]:
    """Exit status and what to print; 2 when there is no valid answer."""
    try:
        graph = read_graph(args.graph)
        plan = plan_graph(graph, args)
        if args.save:
            plan.save(args.save)
        return 0, render(plan, graph, args.format)
    except (PipeEngineError, OSError) as error:
        return 2, json.dumps({"error": str(error)}) if args.format == "json" else f"error: {error}"


def main(arguments: list[str] | None = None) -> int:
    """``python -m partitioners.command graph.json --stages 4``."""
    parser = argparse.ArgumentParser(prog="partitioners", description=__doc__)
    add_arguments(parser)
    status, text = run(parser.parse_args(arguments))
    print(text)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
