"""`sprand export`: an adapter in the form of another program."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..checkpoint.export import FORMS, export
from .files import failing_in_words, folder_of


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command and its options."""
    forms = "; ".join(f"{name}: {known.help}" for name, known in FORMS.items())
    parser = commands.add_parser("export", help="an adapter in the form of another program", description=f"Forms: {forms}.")
    parser.add_argument("adapter", metavar="ADAPTER", help="a folder written by sprand.save")
    parser.add_argument("--to", required=True, choices=FORMS, help="the form")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="folder of what is written")
    parser.add_argument("--base", metavar="BASE", help="base checkpoint: a folder, a .safetensors file, or a name on the Hub")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Write it, and say where.

    Raises:
        CliError: there is no adapter, the base is missing or another one, or the form cannot hold the adapter.
    """
    with failing_in_words():
        base = folder_of(options.base) if options.base else None
        for file in export(folder_of(options.adapter), options.to, options.out, base):
            print(f"written: {file} ({file.stat().st_size:,} bytes)")
    return 0
