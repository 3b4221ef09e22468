"""`sprand inspect`: what an adapter or a mask holds, as a table, JSON or a picture."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from ..adapters.file import WEIGHTS_FILE
from ..adapters.plots import densities, plot_selection
from ..adapters.summary import shape_text
from ..checkpoint.inspect import Line, Report, inspect, plot
from ..selection.mask import Mask, chosen_by, is_mask
from . import CliError
from .files import failing_in_words, folder_of
from .parser import add_json
from .table import print_table

TOP = 5  # of the largest changes


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "inspect",
        help="what an adapter or a mask holds",
        description="Entries, density and size of the change of each parameter of an adapter, its largest changes, and how its "
        "entries were chosen; of a mask the entries alone.",
        examples="""
            sprand inspect adapter
            sprand inspect adapter --base base --plot adapter.png
            sprand inspect mask.safetensors
        """,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of an adapter or of a run, or the file of a mask")
    parser.add_argument("--base", metavar="BASE", help="its base checkpoint: proves it, and counts changes that bfloat16 shows")
    parser.add_argument("--top", type=int, metavar="N", help=f"how many of the largest changes to name (default {TOP})")
    add_json(parser, "print it as JSON, with the stored description")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw density and size of the change by layer and kind")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Print what the adapter or the mask holds.

    Raises:
        CliError: There is neither, it is damaged, or it is of another base.
    """
    if options.top is not None and options.top < 0:
        raise CliError(f"--top: expected a count, got {options.top}.")
    with failing_in_words():
        base, path = folder_of(options.base) if options.base else None, folder_of(options.adapter)
        if is_mask(path):
            _inspect_mask(path, options)
        else:
            _inspect_adapter(path, base, options)
    if options.plot is not None and not options.json:
        print(f"\nwritten: {options.plot}")
    return 0


def _inspect_adapter(path: Path, base: Path | None, options: argparse.Namespace) -> None:
    report = inspect(path, base, TOP if options.top is None else options.top)
    if options.plot is not None:
        plot(report, options.plot)
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
        return
    _print(report)
    if base is None:
        print("\nin bf16: share of entries that bfloat16 shows; give --base BASE to count it")
    if report.changes:
        print("\nlargest changes")
        for change in report.changes:
            print(f"  {change.name}{list(change.position)}  {change.delta:+.4g}")


def _inspect_mask(path: Path, options: argparse.Namespace) -> None:
    """Print which entries a mask chooses.

    Raises:
        CliError: An option asks for values, which a mask does not have.
    """
    for name in ("base", "top"):
        if getattr(options, name) is not None:
            raise CliError(f"--{name}: {path} is a mask, which has entries and no values; leave it out.")
    mask = Mask.load(path)
    chosen = chosen_by(mask.selection) if mask.selection else "at random or by hand, not recorded"
    density = mask.nnz / max(1, sum(map(math.prod, mask.shapes.values())))
    if options.plot is not None:
        plot_selection(mask, options.plot)
    if options.json:
        targets = [
            {"name": name, "shape": mask.shapes[name], "nnz": mask[name].numel(), "density": share}
            for name, share in densities(mask).items()
        ]
        content = {"path": str(path), "chosen": chosen, "nnz": mask.nnz, "density": density, "targets": targets}
        print(json.dumps(content | {"selection": mask.selection}, indent=2))
        return
    print(f"{path}: a mask of {mask.nnz:,} entries of {len(mask)} parameters, density {density:.4%}")
    print(f"chosen: {chosen}\n")
    rows = [("parameter", "shape", "entries", "density")]
    for name, share in densities(mask).items():
        rows.append((name, shape_text(mask.shapes[name]), f"{mask[name].numel():,}", f"{share:.4%}"))
    print_table(rows, left=2)


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
