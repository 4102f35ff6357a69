"""``pipeengine``: plan, profile, simulate, report and look at checkpoints from the command line.

With ``--format json`` the answer is one JSON object on stdout, an error included. The exit status is 2 for wrong
usage and files that cannot be used, 3 when there is no answer. torch is imported only for commands that are given a
model.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

import networkx

import pipeengine
from partitioners.graph import to_json
from partitioners.reporting import command
from partitioners.tables import format_table
from partitioners.units import format_bytes, format_seconds, format_share, parse_flops, parse_rate
from pipeengine.cli import checkpoint as checkpoint_command
from pipeengine.cli import launch as launch_command
from pipeengine.cli import search as search_command
from pipeengine.cli import simulate as simulate_command
from pipeengine.cli.parsing import Parser, add_completion, finish, set_logging
from pipeengine.cli.terminal import show
from pipeengine.device_cards import DeviceCard
from pipeengine.errors import InputError, PipeEngineError, exit_status

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the command."""
    parser = _parser()
    args = parser.parse_args(arguments)
    told = set_logging(args)
    try:
        status, text = _COMMANDS[args.command](args)
        told.done()
        _print(text, is_for_people=getattr(args, "format", "text") == "text")
        return status
    except KeyboardInterrupt:
        return 130          # as a shell says of Ctrl-C
    finally:
        told.done()


def _parser() -> Parser:
    parser = Parser(prog="pipeengine", description="Cut models into balanced pipeline stages; look at runs.",
                    epilog="exit status: 0 done, 2 wrong usage or a file that cannot be used, 3 no answer (nothing "
                           "fits, nothing is whole), 130 Ctrl-C")
    parser.add_argument("--version", action="version", version=f"pipeengine {pipeengine.__version__}")
    add_completion(parser)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, (text, add) in _ARGUMENTS.items():
        own = commands.add_parser(name, help=text, description=text[:1].upper() + text[1:] + ".")
        add(own)
        finish(own, name)
    return parser


def _print(text: str, is_for_people: bool) -> None:
    try:
        show(text, is_for_people)
    except BrokenPipeError:     # such as `| head`; what is left in the buffer must not complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _answer(args: argparse.Namespace, make: Callable[[], str]) -> tuple[int, str]:
    try:
        return 0, make()
    except (PipeEngineError, OSError) as error:
        return exit_status(error), json.dumps({"error": str(error)}) if args.format == "json" else f"error: {error}"


def _progress(seconds: float = 2.0) -> Callable[[str], None]:
    """Tell on stderr how far things are, at most every ``seconds``."""
    last = [perf_counter()]

    def tell(line: str) -> None:
        if perf_counter() - last[0] > seconds:
            last[0] = perf_counter()
            logger.info(line)
        else:
            logger.debug(line)
    return tell


def _write(text: str, path: str | None) -> str:
    if path is None:
        return text
    Path(path).write_text(text + "\n")
    return f"wrote {path}"


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=8, help="rows in a batch, for a config.json")
    parser.add_argument("--length", type=int, help="tokens in a row, for a config.json")
    parser.add_argument("--device", help="where to measure (default: the accelerator, else the CPU)")
    parser.add_argument("--cache", metavar="FILE", help="keep measurements here, so that each is made once")


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    command.add_arguments(parser)
    parser.add_argument("-o", "--output", metavar="PLAN",
                        help="write the plan here, as JSON; with --format svg the picture (--save: the plan)")
    parser.add_argument("--costs", choices=("analytic", "measured"), default="analytic",
                        help="for a model: from FLOPs and bytes, or measured here")
    parser.add_argument("--flops", type=parse_flops, metavar="RATE",
                        help="a device's FLOP/s, such as 300T, for analytic costs")
    parser.add_argument(
        "--memory-bandwidth", type=parse_rate, metavar="RATE", help="its bytes per second, such as 2TB/s"
    )
    _model_arguments(parser)
    for action in parser._actions:
        if action.dest == "graph":
            action.metavar = "MODEL"
            action.help = (
                "a cost graph (JSON or a PipeDream profile), a Hugging Face config.json, package.module:factory or "
                "path/to/file.py:factory"
            )


def _plan(args: argparse.Namespace) -> tuple[int, str]:
    def make() -> str:
        is_file, is_picture = _is_graph_file(args.graph), args.format == "svg"
        if not is_file and args.stages is None:
            raise InputError("say how many stages: --stages K")
        graph = command.read_graph(args.graph) if is_file else _profiled(args, args.costs)
        plan = command.plan_graph(graph, args)
        for path in filter(None, (args.save, None if is_picture else args.output)):
            plan.save(path)
        text = command.render(plan, graph, args.format)
        if args.format == "text" and args.replicas > 1:
            text += "\n" + command.replica_line(plan, args)
        return _write(text, args.output) if is_picture else _hints(args, graph, is_file) + text
    return _answer(args, make)


def _hints(args: argparse.Namespace, graph: networkx.DiGraph, is_file: bool) -> str:
    """What was not used as asked, or was not said, for people."""
    if args.format != "text":
        return ""
    rows, lines = graph.graph.get("made_with", {}).get("rows"), []
    if rows and args.microbatches and args.microbatches > rows:
        lines.append(f"{rows} micro-batches are used: {args.microbatches} were asked for and the batch has {rows} rows"
                     + ("" if is_file else " (--rows)"))
    if not is_file and args.costs == "analytic" and not (args.flops and args.memory_bandwidth):
        lines.append("the device is a guess, a slow one: --flops and --memory-bandwidth say what yours reaches")
    return "".join(f"{line}\n" for line in lines)


def _is_graph_file(name: str) -> bool:
    """Whether this is a cost graph rather than a model; what cannot be read is left to the one that says so best."""
    path = Path(name)
    if path.suffix != ".json":
        return ":" not in name or path.exists()
    try:
        return "model_type" not in json.loads(path.read_text())
    except (OSError, ValueError, UnicodeDecodeError):
        return True


def _profiled(args: argparse.Namespace, costs: str) -> networkx.DiGraph:
    from pipeengine.cli.model_spec import load
    from pipeengine.costs import DeviceDescription, profile
    made = load(args.graph, rows=args.rows, length=args.length)
    described = DeviceDescription()
    if costs == "analytic":
        described = DeviceDescription(getattr(args, "flops", None) or described.flops_per_second,
                                      getattr(args, "memory_bandwidth", None) or described.bytes_per_second)
    return profile(
        made.model,
        made.example,
        num_microbatches=args.microbatches or 1,
        loss_fn=made.loss_fn,
        target=made.target,
        costs=described if costs == "analytic" else costs,
        device=args.device,
        cache=args.cache,
        progress=_progress(),
    )


def _profile_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("graph", metavar="MODEL", nargs="?", help="a Hugging Face config.json, package.module:factory "
                        "or path/to/file.py:factory")
    parser.add_argument("--device-card", metavar="FILE", help="instead, or too: measure this machine's rates and write "
                        "them here; other commands read it with --device FILE")
    parser.add_argument("--microbatches", type=int, default=1, help="micro-batches that the batch is cut into")
    parser.add_argument("--depth", type=int, default=2, help="how deep into the module tree the table goes")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument(
        "-o", "--output", metavar="GRAPH", help="write the cost graph here; `pipeengine plan GRAPH` reads it"
    )
    _model_arguments(parser)


def _profile(args: argparse.Namespace) -> tuple[int, str]:
    def make() -> str:
        if args.graph is None and args.device_card is None:
            raise InputError("nothing to measure: name a MODEL, or --device-card FILE for this machine's rates")
        card = _device_card(args) if args.device_card else None
        if args.graph is None:
            return json.dumps(card.to_json()) if args.format == "json" else f"wrote {args.device_card}: {card.source}"
        graph = _profiled(args, "measured")
        data = to_json(graph)
        if args.output:
            Path(args.output).write_text(json.dumps(data) + "\n")
        if args.format == "json":
            return json.dumps({"modules": _by_module(graph, args.depth), "graph": data})
        return _table(_by_module(graph, args.depth))
    return _answer(args, make)


def _device_card(args: argparse.Namespace) -> DeviceCard:
    """Measure this machine, and write its card."""
    from pipeengine.costs import measure_device
    card = measure_device(args.device)
    Path(args.device_card).write_text(json.dumps(card.to_json(), indent=1) + "\n")
    return card


def _by_module(graph: networkx.DiGraph, depth: int) -> list[dict]:
    """Sums per module path, in order of execution."""
    found: dict[str, dict] = {}
    seen: set[tuple[str, str]] = set()
    for name, data in graph.nodes(data=True):
        path = ".".join(name.partition(":")[0].split("#")[0].split(".")[:depth]) or "(model)"
        row = found.setdefault(path, {"module": path, "forward": 0.0, "backward": 0.0, "parameter_bytes": 0,
                                      "activation_bytes": 0})
        row["forward"] += data.get("forward", 0.0)
        row["backward"] += data.get("backward", 0.0)
        row["activation_bytes"] += data.get("activation_bytes", 0)
        row["parameter_bytes"] += data.get("param_bytes", 0)
        for shared, size in data.get("shared", {}).items():
            row["parameter_bytes"] += 0 if (path, shared) in seen else size
            seen.add((path, shared))
    return list(found.values())


def _table(rows: list[dict]) -> str:
    total = sum(row["forward"] + row["backward"] for row in rows) or 1.0
    return format_table(("module", "forward", "backward", "share", "parameters", "activations"), [
        (row["module"], format_seconds(row["forward"]), format_seconds(row["backward"]),
         format_share((row["forward"] + row["backward"]) / total), format_bytes(row["parameter_bytes"]),
         format_bytes(row["activation_bytes"])) for row in rows])


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="the folder of a run, one that save_report() wrote, or its report.json")
    parser.add_argument("--watch", action="store_true", help="show how far the run is until it is done")
    parser.add_argument("--format", choices=("text", "json", "html", "chrome"), default="text")
    parser.add_argument("-o", "--output", metavar="FILE", help="write there instead of printing")


def _report(args: argparse.Namespace) -> tuple[int, str]:
    from pipeengine.report import RunReport, chrome_trace, report_html, report_text, watch

    def make() -> str:
        if args.watch:
            with contextlib.suppress(KeyboardInterrupt):
                watch(Path(args.run), _shown_over())
            return ""
        path = Path(args.run)
        report = RunReport.load(path / "report.json" if path.is_dir() else path)
        timelines = [timeline for timeline in (report.predicted, report.measured) if timeline is not None]
        forms = {"text": lambda: report_text(report), "json": report.to_json, "html": lambda: report_html(report),
                 "chrome": lambda: json.dumps(chrome_trace(*timelines))}
        return _write(forms[args.format](), args.output)
    return _answer(args, make)


def _shown_over() -> Callable[[str], None]:
    """Print texts over each other on a terminal, under each other elsewhere."""
    lines = [0]

    def show(text: str) -> None:
        back = f"\x1b[{lines[0]}F\x1b[J" if lines[0] and sys.stdout.isatty() else ""
        print(back + text, flush=True)
        lines[0] = text.count("\n") + 1
    return show


def _search(args: argparse.Namespace) -> tuple[int, str]:
    return search_command.run(args, _is_graph_file, _progress())


_ARGUMENTS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "plan": ("cut a model or a cost graph into stages", _plan_arguments),
    "profile": ("what every part of a model takes on this machine", _profile_arguments),
    "simulate": ("what a schedule would take", simulate_command.add_arguments),
    "search": ("the best way to use so many devices", search_command.add_arguments),
    "report": ("a finished run as a table, a page or a trace", _report_arguments),
    "checkpoint": ("what a run has saved, and whether it is whole", checkpoint_command.add_arguments),
    "launch": ("start a script on several workers, again if one of them is lost", launch_command.add_arguments),
}
_COMMANDS = {"plan": _plan, "profile": _profile, "search": _search, "simulate": simulate_command.run, "report": _report,
             "checkpoint": checkpoint_command.run, "launch": launch_command.run}
if __name__ == "__main__":
    raise SystemExit(main())
