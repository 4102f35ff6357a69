"""Tables for a terminal."""
from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import groupby

_GAP = "  "


def format_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,),
                 groups: Sequence[str] = (), indent: str = "") -> str:
    """Lines of columns two blanks apart: those numbered in ``left`` begin below each other, the others end so.

    ``heads`` stand above the rows, none where they are empty; ``groups`` above the heads, one name per column, where
    neighbours of one name share it. A row without cells is a rule. Numbers belong right, names left.
    """
    lines = [*([heads] if heads else []), *(row for row in rows if row)]
    if not lines:
        return ""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, first, end in column_groups(groups):
        widths[end - 1] += max(0, len(name) - _width(widths[first:end]))
    rule = ["-" * width for width in widths]
    texts = [[text.ljust(width) if column in left else text.rjust(width)
              for column, (text, width) in enumerate(zip(row or rule, widths))]
             for row in ([heads] if heads else []) + list(rows)]
    if any(groups):
        texts.insert(0, [name.center(_width(widths[first:end])) for name, first, end in column_groups(groups)])
    return "\n".join(indent + _GAP.join(cells).rstrip() for cells in texts)


def column_groups(groups: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Neighbouring columns of one group: its name, its first column, and one past its last. Those of "" stand alone."""
    first = 0
    for _, alike in groupby(enumerate(groups), key=lambda each: each[1] or each[0]):
        name, count = groups[first], len(list(alike))
        yield name, first, first + count
        first += count


def _width(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)
