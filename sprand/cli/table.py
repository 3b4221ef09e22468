"""A table: by rich on a terminal where it is installed, else as plain text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

Rows = Sequence[Sequence[str]]


def text_table(rows: Rows, left: int = 1) -> str:
    """Rows of equal length, the first `left` columns flush left and the others flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def print_table(rows: Rows, left: int = 1, title: str = "", file: TextIO | None = None) -> None:
    """Print a table.

    Args:
        rows: of equal length, the first one the header; a cell that says FAILED is red on a terminal.
        left: how many columns are flush left; the others are flush right.
        title: a line above it.
        file: where to, standard output by default.
    """
    file = file or sys.stdout
    if file.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
            from rich.text import Text
        except ImportError:
            pass
        else:
            table = Table(title=title or None, title_justify="left")
            for i, name in enumerate(rows[0]):
                table.add_column(name, justify="left" if i < left else "right", overflow="fold")
            for row in rows[1:]:
                table.add_row(*(Text(cell, style="red" if "FAILED" in cell else "") for cell in row))
            Console(file=file).print(table)
            return
    if title:
        print(title, file=file)
    print(text_table(rows, left), file=file)
