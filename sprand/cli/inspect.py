"""`sprand inspect`: what an adapter holds, as a table, JSON or a picture."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..adapters.file import WEIGHTS_FILE
from ..adapters.summary import shape_text
from ..checkpoint.inspect import Line, Report, inspect, plot
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
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter")
    parser.add_argument("--base", metavar="BASE", help="its base checkpoint: proves it, and counts changes that bfloat16 shows")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="how many of the largest changes to name (default 5)")
    parser.add_argument("--json", action="store_true", help="print it as JSON, with the stored description")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw density and size of the change by layer and kind")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Print what the adapter holds.

    Raises:
        CliError: There is no adapter, it is damaged, or it is of another base.
    """
    if options.top < 0:
        raise CliError(f"--top: expected a count, got {options.top}.")
    with failing_in_words():
        base = folder_of(options.base) if options.base else None
        report = inspect(folder_of(options.adapter), base, options.top)
        if options.plot is not None:
            plot(report, options.plot)
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
        return 0
    _print(report)
    if base is None:
        print("\nin bf16: the share of entries whose bfloat16 value changes; give --base BASE to count it")
    if report.changes:
        print("\nlargest changes")
        for change in report.changes:
            print(f"  {change.name}{list(change.position)}  {change.delta:+.4g}")
    if options.plot is not None:
        print(f"\nwritten: {options.plot}")
    return 0


def _print(report: Report) -> None:
    """Print what the adapter is, and a table of its parameters."""
    description = report.description
    file = report.path / WEIGHTS_FILE if report.path.is_dir() else report.path
    print(f"{report.path}: {report.nnz:,} trained entries of {len(report.lines)} parameters, density {report.density:.4%}")
    print(f"chosen: {report.chosen}; base: {description['base_model'] or 'not named'}; sprand {description['sprand_version']}")
    print(f"{file.stat().st_size:,} bytes, checksum {description['checksum']}\n")
    rows = [("parameter", "shape", "entries", "density", "rms delta", "largest", "zero", "in bf16")]
    rows += map(_row, report.lines)
    rows += [(name, shape_text(shape), "in full", "", "", "", "", "") for name, shape in report.saved.items()]
    visible = _share(report.visible)
    rows.append(("all", "", f"{report.nnz:,}", f"{report.density:.4%}", f"{report.rms:.3g}", "", "", visible))
    print_table(rows, left=2)


def _row(line: Line) -> tuple[str, ...]:
    return (
        line.name,
        shape_text(line.shape) or "scalar",
        f"{line.nnz:,}" + (f" + {line.values:,} frozen" if line.values else ""),
        f"{line.density:.4%}",
        f"{line.rms:.3g}",
        f"{line.largest:.3g}",
        f"{line.zero:.1%}",
        _share(line.visible),
    )


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
