"""``pipeengine search``: what to run on the devices that there are, how fast it will be, whether it fits, and why."""
from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import networkx

from partitioners.reporting import command
from partitioners.units import parse_memory, parse_rate, parse_seconds
from pipeengine.device_cards import CARDS
from pipeengine.errors import InputError, PipeEngineError, exit_status
from pipeengine.exploration import OPTIMIZERS, Search, dumps, search


def _numbers(text: str) -> tuple[int, ...]:
    if not all(part.isdigit() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers of at least 1, with commas between")
    return tuple(map(int, text.split(",")))


def _words(text: str) -> tuple[str | None, ...]:
    return tuple(None if word == "none" else word for word in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


_DIMENSIONS = {
    "replicas": (_numbers, "pipelines side by side"),
    "stages": (_numbers, "stages of one pipeline"),
    "stages-per-worker": (_numbers, "default 1,2"),
    "microbatch-rows": (_numbers, "rows of a micro-batch; default those of 1,2,4,8,16 that divide the rows"),
    "schedule": (_names, "by name"),
    "recompute": (_names, "none, stages, blocks; default stages,blocks: as many as must"),
    "shard": (_words, "none, optimizer, parameters"),
    "near": (_names, "stages, replicas: which are numbered next to each other"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``pipeengine search``."""
    parser.add_argument("graph", metavar="MODEL", help="a Hugging Face config.json, package.module:factory, "
                        "path/to/file.py:factory, or a cost graph (JSON)")
    parser.add_argument("--devices", type=int, required=True, metavar="N", help="how many there are")
    parser.add_argument("--device", metavar="NAME", help=f"what they are: {', '.join(CARDS)}, or the file of a card "
                        "that pipeengine profile --device-card wrote")
    parser.add_argument("--memory", type=parse_memory, help="bytes per device, such as 80GB")
    parser.add_argument("--bandwidth", type=parse_rate, help="of a link between machines, such as 25GB/s")
    parser.add_argument("--inside", type=parse_rate, help="of a link inside a machine, such as 300GB/s")
    parser.add_argument("--node-size", type=int, metavar="N", help="devices of one machine (default: all in one)")
    parser.add_argument("--latency", type=parse_seconds, help="of a link, such as 5us")
    parser.add_argument("--rows", type=int, help="of a step, over all replicas (a config.json: 8 unless given)")
    parser.add_argument("--length", type=int, help="tokens in a row, for a config.json")
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="adamw")
    parser.add_argument("--master-weights", action="store_true",
                        help="the optimizer works on copies of 4 bytes of lower-precision weights")
    parser.add_argument("--costs", choices=("analytic", "measured"), default="analytic")
    for name, (kind, text) in _DIMENSIONS.items():
        parser.add_argument(f"--{name}", type=kind, metavar="LIST", help=f"{text} (a list with commas)")
    parser.add_argument("--time-limit", type=parse_seconds, help="a cap; the work is bounded by a count anyway")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("-o", "--output", metavar="PLAN", help="write the best plan with its configuration here")


def run(args: argparse.Namespace, is_graph_file: Callable[[str], bool],
        progress: Callable[[str], None]) -> tuple[int, str]:
    """Exit status and what to print; 3 when there is no answer."""
    try:
        answer = _searched(args, command.read_graph(args.graph) if is_graph_file(args.graph) else None, progress)
        if answer.best is not None and args.output:
            answer.best.save(args.output)
        text = dumps(answer) if args.format == "json" else str(answer)
        if answer.best is not None and args.output and args.format == "text":
            text += f"\nwrote {args.output}"
        return 0 if answer.best else 3, text
    except (PipeEngineError, OSError) as error:
        return exit_status(error), json.dumps({"error": str(error)}) if args.format == "json" else f"error: {error}"


def _searched(args: argparse.Namespace, graph: networkx.DiGraph | None, progress: Callable[[str], None]) -> Search:
    dimensions = {name.replace("-", "_"): value for name in _DIMENSIONS
             if (value := getattr(args, name.replace("-", "_"))) is not None}
    options = dict(num_devices=args.devices, memory=args.memory, device=args.device, bandwidth=args.bandwidth,
                   inside=args.inside, node_size=args.node_size, latency=args.latency, rows=args.rows,
                   optimizer=args.optimizer, master_weights=args.master_weights, time_limit=args.time_limit,
                   progress=progress, **dimensions)
    if graph is not None:
        return search(graph, **options)
    from pipeengine.cli.model_spec import load
    if args.rows is not None and args.rows < 1:
        raise InputError(f"--rows is {args.rows}; give a whole number of at least 1")
    rows = args.rows or 8
    asked = max(args.microbatch_rows or (1,)) if args.graph.endswith(".json") else rows
    most = max(asked, *(each for each in (1, 2, 4, 8, 16) if rows % each == 0))
    spec = load(args.graph, rows=most, length=args.length)
    if args.graph.endswith(".json"):
        options["rows"] = rows
    return search(spec.model, spec.example, loss_fn=spec.loss_fn, target=spec.target, costs=args.costs, **options)
