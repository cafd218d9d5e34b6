"""Tables on stdout: with lines and colours on a terminal, as plain aligned text in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from apr_jax.converters.commands.terminal import has_colours
from apr_jax.converters.errors import printable


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[int] = ()) -> None:
    """Prints a table.

    Args:
      columns: Their names.
      rows: One value per column; control characters in them are escaped.
      right: Which columns hold numbers.
    """
    cells = [[printable(str(value)) for value in row] for row in rows]
    numbers = frozenset(right)
    if has_colours(sys.stdout):
        _print_rich(columns, cells, numbers)
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for row in [columns, *cells]:
        padded = [
            cell.rjust(width) if number in numbers else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(padded).rstrip())


def _print_rich(columns: Sequence[str], cells: Iterable[Sequence[str]], numbers: frozenset[int]) -> None:
    from rich import box, console, table, text

    shown = table.Table(box=box.SIMPLE)
    for number, column in enumerate(columns):
        shown.add_column(column, justify="right" if number in numbers else "left", overflow="fold")
    for row in cells:
        shown.add_row(*(text.Text(cell) for cell in row))
    console.Console().print(shown)
