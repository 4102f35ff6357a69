"""What people see: plain text, or on a terminal with rich (the extra ``rich``) colours, and progress on one line."""
from __future__ import annotations

import importlib
import logging
import sys
from typing import Any, TextIO

# What is told apart by colour, as (style, regular expression): a table's heads and rules, then words and numbers.
_STYLES = {
    "head": ("bold", r"(?m)(?P<head>^ *[a-z][a-z ,]*(?: {2,}[a-z][a-z ,]*){2,}$)"),
    "rule": ("dim", r"(?m)(?P<rule>^ *-{2,}[ -]*$)"),
    "error": ("bold red", r"(?P<error>\Aerror:)"),
    "option": ("green", r"(?P<option>(?<!\S)--[a-z][a-z-]+)"),
    "number": ("cyan", r"(?P<number>(?<![\w.#-])\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"
                       r"(?: (?:[num]?s|[kMGT]?B|[kMG]|%)(?!\w))?(?![\w.]))"),
}


def rich_console(stream: TextIO) -> Any | None:
    """A console of rich that writes to ``stream`` and colours by ``_STYLES``; None where it is no terminal, or rich is
    not installed. NO_COLOR and TERM=dumb are honoured by rich."""
    if not stream.isatty():
        return None
    try:
        console, highlighter, theme = (importlib.import_module(f"rich.{name}")
                                       for name in ("console", "highlighter", "theme"))
    except ImportError:
        return None
    patterns = type("Patterns", (highlighter.RegexHighlighter,), {
        "base_style": "pipeengine.", "highlights": [expression for _, expression in _STYLES.values()]})
    styles = {f"pipeengine.{name}": style for name, (style, _) in _STYLES.items()}
    return console.Console(file=stream, highlighter=patterns(), theme=theme.Theme(styles), markup=False, emoji=False,
                           soft_wrap=True)


def show(text: str, is_for_people: bool) -> None:
    """Print an answer; in colours where ``is_for_people`` and the terminal can."""
    console = rich_console(sys.stdout) if is_for_people and text else None
    if console is None:
        print(text, end="\n" if text else "", flush=True)
    else:
        console.print(text)


class ToStderr(logging.Handler):
    """Log records as lines on what is stderr now. Where rich has a terminal, information is one line that moves, until
    ``done`` or something that is to stay."""

    def __init__(self) -> None:
        super().__init__()
        self._status: Any = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write, or replace what moves."""
        if record.levelno == logging.INFO and self._moves(record.getMessage()):
            return
        self.done()
        print(record.getMessage(), file=sys.stderr, flush=True)

    def _moves(self, line: str) -> bool:
        if self._status is None:
            console = rich_console(sys.stderr)
            if console is None:
                return False
            self._status = console.status("")
            self._status.start()
        self._status.update(line)
        return True

    def done(self) -> None:
        """Take away what moves, so that an answer can follow."""
        status, self._status = self._status, None
        if status is not None:
            status.stop()
