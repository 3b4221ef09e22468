"""`sprand combine`: several adapters as one, or one of them taken out again, without loading a model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..adapters.combining import METHODS
from ..checkpoint.combine import Combined, combine, remove
from ..checkpoint.shards import open_checkpoint
from . import CliError
from .files import bar, failing_in_words, folder_of, print_json
from .parser import add_json, add_out, option_of


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "combine",
        help="make one adapter of several, or take one out again",
        description="Write one adapter whose entries are the union of those of several: their weighted sum or mean, by the vote "
        "of TIES (arXiv 2306.01708), or thinned at random by DARE (arXiv 2311.03099): the bits of sprand.combine(model, ...). "
        "The base is read to prove that each adapter was trained on it.",
        epilog="--remove A is exact: of a sum of adapters that were trained on disjoint entries (sprand finetune --disjoint) it "
        "leaves the bits of the others. Out of a merged checkpoint an adapter is taken by sprand merge --revert with all that "
        "were merged, and merging the others into the base again.",
        examples="""
            sprand combine first second --base base -o both
            sprand combine first second --base base -o both --method ties --density 0.5
            sprand combine both --base base --remove second -o first-again
        """,
    )
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="folders of adapters")
    parser.add_argument("--base", required=True, metavar="BASE", help="their checkpoint: a folder, a file, or a name on the Hub")
    add_out(parser, "DIR", "folder of the new adapter")
    parser.add_argument("--method", choices=METHODS, help="default sum")
    parser.add_argument("--weights", type=_numbers, metavar="X,Y,...", help="one factor for each adapter (default 1)")
    parser.add_argument("--density", type=float, metavar="X", help="ties, dare: share of each adapter's entries that is kept")
    parser.add_argument("--seed", type=int, help="dare: of the draw (default 0)")
    parser.add_argument(
        "--drop-heads", action="store_true", help="leave out modules trained in full: each task keeps its own head"
    )
    parser.add_argument("--remove", metavar="ADAPTER", help="take this one out of the one combined ADAPTER given")
    add_json(parser)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Combine or remove, and say what was written.

    Raises:
        CliError: There is no such checkpoint or adapter, they do not fit, or the result cannot be written.
    """
    weights = options.weights or [1.0] * len(options.adapters)
    _check(options, weights)
    with failing_in_words():
        base, adapters = folder_of(options.base), [folder_of(text) for text in options.adapters]
        size = sum(shard.size for shard in open_checkpoint(base).shards.values())
        with bar("read", size) as progress:
            if options.remove:
                written = remove(adapters[0], folder_of(options.remove), base, options.out, progress=progress)
            else:
                written = combine(
                    list(zip(adapters, weights, strict=True)), base, options.out, method=options.method or "sum",
                    density=options.density, seed=options.seed or 0, drop_heads=options.drop_heads, progress=progress,
                )  # fmt: skip
    if options.json:
        print_json(written)
    else:
        _print(written)
    return 0


def _check(options: argparse.Namespace, weights: Sequence[float]) -> None:
    """Refuse options that would do nothing, and weights that are not as many as the adapters.

    Raises:
        CliError: The options do not go together.
    """
    count = len(options.adapters)
    if len(weights) != count:
        raise CliError(f"--weights: expected one for each of {count} adapters, got {len(weights)}.")
    if options.seed is not None and options.method != "dare":
        raise CliError("--seed: only --method dare draws at random; leave it out.")
    given = [name for name in ("method", "weights", "density", "drop_heads") if getattr(options, name)]
    if options.remove and (given or count != 1):
        wrong = f"leave out {option_of(given[0])}" if given else f"got {count}"
        raise CliError(f"--remove: expected one combined adapter and no other option of combining; {wrong}.")


def _print(written: Combined) -> None:
    for source in written.sources:
        others = f"{source['shared']:,} of its entries in others as well"
        shared = others if source["shared"] else "no entry in common with others"
        print(f"{source['weight']:g} x {source['name']}: {shared}")
    if written.left_out:
        print(f"left out: {', '.join(written.left_out)}")
    print(f"{written.entries:,} entries written: {written.folder}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers and commas, for example 1,0.5,1, got {text!r}") from None
