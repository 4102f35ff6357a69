"""How the command reads its words: defaults and examples in every help, verbosity, completion for a shell."""
from __future__ import annotations

import argparse
import importlib
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from pipeengine.cli.terminal import ToStderr

EXAMPLES = {
    "plan": ("graph.json --stages 4 --bandwidth 16GB/s", "model.py:make --stages 2 --costs measured -o plan.json",
             "config.json --stages 16 --flops 400T --memory-bandwidth 2TB/s --rows 64 --length 4096"),
    "profile": ("model.py:make", "model.py:make --depth 3 -o graph.json", "--device-card here.json"),
    "search": ("config.json --devices 64 --memory 80GB --device h100 --rows 512 --length 4096",
               "model.py:make --devices 4 --memory 16GB", "graph.json --devices 8 --memory 24GB -o best.json"),
    "simulate": ("--schedule 1f1b --workers 4 --microbatches 8", "--schedule all --workers 4 --microbatches 8",
                 "--schedule zb-h1 --plan plan.json --format svg -o timeline.svg"),
    "report": ("runs/gpt", "runs/gpt --watch", "runs/gpt --format chrome -o trace.json"),
    "checkpoint": ("list runs/gpt/checkpoints", "verify runs/gpt/checkpoints", "show runs/gpt/checkpoints/step-000100"),
    "launch": ("--workers 4 train.py", "--workers 2:4 --max-restarts 100 train.py --steps 10000",
               "--workers 8 --nodes 2 --rendezvous first:29500 train.py"),
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in the format that was asked for."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"formatter_class": _Formatter, **kwargs})

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        if wants_json(sys.argv[1:]):
            print(json.dumps({"error": message}))
            raise SystemExit(2)
        super().error(message)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Tells the default of every option that has one, unless its help does."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.help or ""
        if not action.option_strings or action.default in (None, False, argparse.SUPPRESS) or "default" in told:
            return action.help
        return f"{told} (default: %(default)s)".strip()


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether the answer is to be JSON."""
    return "--format=json" in arguments or ("--format", "json") in zip(arguments, arguments[1:])


def finish(parser: argparse.ArgumentParser, name: str) -> None:
    """What all commands have: verbosity, and examples under the options."""
    parser.epilog = "examples:\n" + "\n".join(f"  pipeengine {name} {words}" for words in EXAMPLES[name])
    group = parser.add_mutually_exclusive_group()
    group.add_argument("-v", "--verbose", action="store_true", help="tell on stderr all that is done")
    group.add_argument("-q", "--quiet", action="store_true", help="tell on stderr only what is wrong")
    for action in parser._actions:          # without a word of help argparse would not ask for the default either
        if not action.help and action.option_strings and action.default not in (None, False):
            action.help = "default: %(default)s"


def add_completion(parser: argparse.ArgumentParser) -> None:
    """``--print-completion SHELL``; where shtab is not installed (the extra ``completion``) it says so."""
    name, does = "--print-completion", "print what makes a shell complete this command"
    try:
        shtab = importlib.import_module("shtab")
    except ImportError:
        parser.add_argument(name, action=_NeedsShtab, metavar="SHELL", help=does)
    else:
        shtab.add_argument_to(parser, [name], help=does)


class _NeedsShtab(argparse.Action):
    """Ends the command with what to install."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        parser.error("--print-completion needs shtab: pip install 'pipeengine[completion]'")


def set_logging(args: argparse.Namespace) -> ToStderr:
    """What the package logs goes to stderr, as lines without decoration; returns where it goes."""
    logger = logging.getLogger("pipeengine")
    logger.setLevel(logging.DEBUG if args.verbose else logging.WARNING if args.quiet else logging.INFO)
    known = next((handler for handler in logger.handlers if isinstance(handler, ToStderr)), None)
    if known is not None:
        return known
    logger.addHandler(handler := ToStderr())
    logger.propagate = False
    return handler
