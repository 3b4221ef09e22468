"""What commands show: tables, by rich on a terminal where it is installed, else as plain text; and sizes in bytes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import TextIO

from ..adapters.summary import text_table

Rows = Sequence[Sequence[str]]
UNITS = {"GB": 10**9, "MB": 10**6, "KB": 10**3}


def size_text(count: int | None) -> str:
    """A number of bytes, as `12.3 MB`; `-` for none."""
    if not count:
        return "-"
    for unit, size in UNITS.items():
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def print_table(rows: Rows, left: int = 1, title: str = "", file: TextIO | None = None) -> None:
    """Print a table; where it is wider than the screen, the first column has lines of its own.

    Args:
        rows: of equal length, the first one the header; a cell that says FAILED is red on a terminal.
        left: how many columns are flush left; the others are flush right.
        title: a line above it.
        file: where to, standard output by default.
    """
    file = file or sys.stdout
    screen = shutil.get_terminal_size((sys.maxsize, 24)).columns  # of COLUMNS, or of the terminal; a file has no end
    text = text_table(rows, left)
    width = max(map(len, text.splitlines()))
    if width > screen:
        text = _stacked(rows, left)
    elif file.isatty() and width + len(rows[0]) + 3 <= screen:  # with rich's borders
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
    print(text, file=file)


def _stacked(rows: Rows, left: int) -> str:
    """A table whose first cells stand above the others of their rows."""
    others = text_table([row[1:] for row in rows], left - 1).splitlines()
    return "\n".join(f"{row[0]}\n  {line}".rstrip() for row, line in zip(rows, others, strict=True))
