"""`sprand diff`: what one checkpoint changes in another, as an adapter."""

from __future__ import annotations

import argparse

from ..adapters.file import WEIGHTS_FILE
from ..checkpoint.diff import Difference, diff
from ..checkpoint.shards import open_checkpoint
from .files import bar, failing_in_words, folder_of, print_json
from .parser import add_json, add_out


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "diff",
        help="the exact difference of two checkpoints, as an adapter",
        description="Write what TUNED changes in BASE as an adapter, a tensor at a time, without loading a model. Merged into "
        "BASE, it gives TUNED again, bit for bit (without --density).",
        examples="""
            sprand diff base tuned -o adapter
            sprand diff base tuned -o adapter --density 0.01 --json
        """,
    )
    parser.add_argument("base", metavar="BASE", help="checkpoint folder, a .safetensors file, or a name on the Hub")
    parser.add_argument("tuned", metavar="TUNED", help="the checkpoint that was trained from it, in the same dtype")
    add_out(parser, "ADAPTER", "the adapter's folder")
    parser.add_argument("--density", type=float, metavar="X", help="keep the largest changes: this share of each tensor at most")
    add_json(parser, "print the counts as JSON")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Write the difference, and say how large it is.

    Raises:
        CliError: There is no such checkpoint, they do not fit or are equal, or the adapter cannot be written.
    """
    with failing_in_words():
        base, tuned = folder_of(options.base), folder_of(options.tuned)
        checkpoint = open_checkpoint(base)
        with bar("diff", sum(shard.size for shard in checkpoint.shards.values())) as progress:
            difference = diff(base, tuned, options.out, density=options.density, progress=progress)
    total = sum(stored.numel for stored in checkpoint.tensors.values())
    size = (options.out / WEIGHTS_FILE).stat().st_size
    if options.json:
        print_json(difference, entries=total, bytes=size)
    else:
        _print(difference, total, size)
    return 0


def _print(difference: Difference, total: int, size: int) -> None:
    share = difference.changed / max(1, total)
    print(f"{difference.changed:,} of {total:,} entries differ ({share:.4%}), in {difference.tensors} tensors")
    as_values = f"{difference.values:,} of them as frozen values, where no delta rounds to the same bits"
    print(f"{difference.kept:,} kept, {as_values if difference.values else 'all as deltas'}; {size:,} bytes")
    if difference.added:
        print(f"kept whole, not in BASE: {', '.join(difference.added)}")
    if difference.missing:
        print(f"not in TUNED, left as they are: {', '.join(difference.missing)}")
    print(f"written: {difference.folder}")
