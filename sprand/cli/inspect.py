"""`sprand inspect`: what an adapter holds, as a table, JSON or a picture."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..adapters.file import WEIGHTS_FILE
from ..checkpoint import inspect as report
from . import CliError
from .files import failing_in_words, folder_of
from .table import print_table


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "inspect",
        help="what an adapter holds",
        description="Entries, density and size of the change of each parameter of an adapter, its largest changes, and how its "
        "entries were chosen.",
        examples="""
            sprand inspect adapter
            sprand inspect adapter --base base --plot adapter.png
        """,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="a folder written by sprand.save")
    parser.add_argument("--base", metavar="BASE", help="its base checkpoint: proves it, and counts changes that bfloat16 shows")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="how many of the largest changes to name (default 5)")
    parser.add_argument("--json", action="store_true", help="print it as JSON, with the stored description")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw density and size of the change by layer and kind")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Print what the adapter holds.

    Raises:
        CliError: there is no adapter, it is damaged, or it is of another base.
    """
    if options.top < 0:
        raise CliError(f"--top: expected a count, got {options.top}.")
    with failing_in_words():
        base = folder_of(options.base) if options.base else None
        found = report.inspect(folder_of(options.adapter), base, options.top)
        if options.plot is not None:
            report.plot(found, options.plot)
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
        return 0
    description = found.description
    print(f"{found.path}: {found.nnz:,} trained entries of {len(found.lines)} parameters, density {found.density:.4%}")
    print(f"chosen: {found.chosen}; base: {description['base_model'] or 'not named'}; sprand {description['sprand_version']}")
    file = found.path / WEIGHTS_FILE if found.path.is_dir() else found.path
    print(f"{file.stat().st_size:,} bytes, checksum {description['checksum']}\n")
    rows = [("parameter", "shape", "entries", "density", "rms delta", "largest", "zero", "in bf16")]
    for line in found.lines:
        rows.append(
            (
                line.name, "x".join(map(str, line.shape)) or "scalar", _count(line), f"{line.density:.4%}", f"{line.rms:.3g}",
                f"{line.largest:.3g}", f"{line.zero:.1%}", "-" if line.visible is None else f"{line.visible:.1%}",
            )
        )  # fmt: skip
    rows += [(name, "x".join(map(str, shape)), "in full", "", "", "", "", "") for name, shape in found.saved.items()]
    visible = "-" if found.visible is None else f"{found.visible:.1%}"
    rows.append(("all", "", f"{found.nnz:,}", f"{found.density:.4%}", f"{found.rms:.3g}", "", "", visible))
    print_table(rows, left=2)
    if base is None:
        print("\nin bf16: the share of entries whose bfloat16 value changes; give --base BASE to count it")
    if found.changes:
        print("\nlargest changes")
        for change in found.changes:
            print(f"  {change.name}{list(change.position)}  {change.delta:+.4g}")
    if options.plot is not None:
        print(f"\nwritten: {options.plot}")
    return 0


def _count(line: report.Line) -> str:
    return f"{line.nnz:,}" + (f" + {line.values:,} values" if line.values else "")
