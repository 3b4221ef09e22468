"""What commands show: tables, by rich on a terminal where it is installed, else as plain text; and sizes in bytes."""

from __future__ import annotations

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
