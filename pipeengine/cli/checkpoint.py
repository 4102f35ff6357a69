"""``pipeengine checkpoint list|verify|show FOLDER``: what a run has saved, whether it is whole, and what is in it."""
from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from partitioners.tables import format_table
from partitioners.units import format_bytes
from pipeengine.errors import InputError, PipeEngineError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("what", choices=("list", "verify", "show"), help="list the checkpoints, read and compare every "
                        "byte of them, or show what the newest whole one holds")
    parser.add_argument("folder", help="a folder of checkpoints, or one of them")
    parser.add_argument("--format", choices=("text", "json"), default="text")


def run(args: argparse.Namespace) -> tuple[int, str]:
    """Exit status and answer; the status is 3 where nothing is whole."""
    from pipeengine.checkpoint import look_at
    try:
        rows = look_at(Path(args.folder), thorough=args.what != "list", first_whole=args.what == "show")
        if not rows:
            raise InputError(f"{args.folder} holds no checkpoints; give the folder that Checkpoints was given, or one "
                             "of its step folders")
        whole = [row for row in rows if row["problem"] is None]
        status = 0 if len(whole) == len(rows) or args.what == "list" and whole or args.what == "show" and whole else 3
        if args.what == "show":
            rows = whole or rows
        if args.format == "json":
            return status, json.dumps({"checkpoints": rows})
        return status, "\n".join(map(_details if args.what == "show" and whole else _line, rows))
    except (PipeEngineError, OSError) as error:
        return 2, json.dumps({"error": str(error)}) if args.format == "json" else f"error: {error}"


def _line(row: dict[str, Any]) -> str:
    if row["problem"] is not None:
        return f"{row['name']}  not whole: {row['problem']}"
    facts = row["facts"]
    word = "whole" if row["verified"] else "complete"
    return (f"{row['name']}  {word}, {format_bytes(row['bytes'])}, {facts['time']}, {facts['workers']} workers, "
            f"{facts['model']['class']}")


def _details(row: dict[str, Any]) -> str:
    facts = row["facts"]
    lines = [_line(row),
             f"  {facts['model']['parameters']:,} parameters, {facts['plan']['stages']} stages, schedule "
             f"{facts['plan']['schedule']}",
             "  parts: " + (", ".join(f"{name} ({kind})" for name, kind in facts["parts"].items()) or "none"),
             "  written by " + ", ".join(f"{name} {number}" for name, number in facts["versions"].items())]
    files = [(name, format_bytes(entry["bytes"]), "" if entry["tensors"] is None else f"{entry['tensors']:,} tensors")
             for name, entry in row["files"].items()]
    return "\n".join([*lines, format_table((), files, indent="  ")])
