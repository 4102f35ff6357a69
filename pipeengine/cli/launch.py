"""``pipeengine launch``: start a script on several workers, again when one of them is lost."""
from __future__ import annotations

import argparse

from pipeengine.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--workers", required=True, metavar="N | N:M",
                        help="processes on this machine; N:M goes on with fewer, down to N, when M cannot be kept up")
    parser.add_argument("--max-restarts", type=int, default=10, help="how often all workers are started again")
    parser.add_argument("--nodes", default="1", metavar="N | N:M", help="machines; each runs this command")
    parser.add_argument("--rendezvous", metavar="HOST:PORT", help="where several machines meet: on the first of them")
    parser.add_argument("--run-id", help="a name that the machines of one run share")
    parser.add_argument("--grace", type=int, default=120, metavar="SECONDS",
                        help="after Ctrl-C or SIGTERM, until workers that are still saving are killed")
    parser.add_argument("script", help="a Python file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")


def run(args: argparse.Namespace) -> tuple[int, str]:
    """The exit status, and what to print."""
    from pipeengine.launch import LaunchSettings, launch, parse_workers
    try:
        settings = LaunchSettings(parse_workers(args.workers), args.max_restarts, parse_workers(args.nodes),
                                  args.rendezvous, args.run_id, grace=args.grace)
        return launch(args.script, args.arguments, settings), ""
    except InputError as error:
        return 2, f"error: {error}"
