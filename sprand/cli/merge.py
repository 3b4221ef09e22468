"""`sprand merge`: adapters into a checkpoint folder, or out of it again, without loading a model."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ..checkpoint import merge, revert
from ..checkpoint.shards import open_checkpoint
from . import CliError, Stopped, WorkFailed
from .files import adapter_and_weight, bar, failing_in_words, folder_of, print_json
from .parser import add_json, add_out


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "merge",
        help="write a checkpoint with adapters merged into it, without loading the model",
        description="Copy a checkpoint folder (safetensors files, configuration, tokenizer) and set the trained entries on the "
        "way: the same bits as sprand.load, sprand.merge and save_pretrained. Several adapters, or a weight, give the sum of "
        "their changes, as sprand.switch(model, {name: weight}) does.",
        epilog="A merge that was stopped goes on when the same command is given again. OUT is written under a hidden name "
        "beside it, and is there whole or not at all. --revert needs sprand_revert.dat, which merge keeps in OUT (the base "
        "values of the changed entries): a merged value and its change do not determine the value before.",
        examples="""
            sprand merge base adapter merged --verify
            sprand merge base first:0.5 second:0.5 both      # the weighted sum of their changes
            sprand merge --revert merged adapter base-again  # bit for bit
        """,
        usage="sprand merge [options] BASE ADAPTER[:WEIGHT] ... OUT",
    )
    parser.add_argument("base", metavar="BASE", help="checkpoint folder, a .safetensors file, or a name on the Hub")
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER[:WEIGHT]", help="folders of adapters; after them OUT")
    add_out(parser, "OUT", "the folder to make, where it is not the last word", required=False)
    parser.add_argument("--verify", action="store_true", help="read both again, and prove every byte")
    parser.add_argument("--revert", action="store_true", help="BASE is a merged checkpoint: write what it was merged from to OUT")
    add_json(parser)
    parser.add_argument("--no-base-values", action="store_true", help="do not keep sprand_revert.dat (2 or 4 bytes per entry)")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Merge or revert, and say what was written.

    Raises:
        CliError: There is no such checkpoint or adapter, or they do not fit.
        WorkFailed: OUT cannot be written, or is not what it should be.
        Stopped: Ctrl-C stopped the work; the same command goes on.
    """
    if options.revert and options.no_base_values:
        raise CliError("--no-base-values is for merging; leave it out with --revert.")
    if options.out is None:
        *options.adapters, last = options.adapters
        options.out = Path(last)
        if not options.adapters:
            raise CliError(f"Expected BASE ADAPTER OUT, got no OUT after {last}; give the folder to make.")
    with failing_in_words():
        base, adapters = folder_of(options.base), [adapter_and_weight(text) for text in options.adapters]
        size = sum(shard.size for shard in open_checkpoint(base).shards.values())
        started = time.perf_counter()
        written = _write(base, adapters, options, size)
        seconds = time.perf_counter() - started
        if options.verify:
            _verify(base, adapters, options, size)
    if options.json:
        print_json(written, seconds=round(seconds, 3), reverted=options.revert, verified=options.verify)
    else:
        _print(written, options, seconds)
    return 0


def _write(base: Path, adapters: list[tuple[Path, float]], options: argparse.Namespace, size: int) -> merge.Merged:
    try:
        with bar("revert" if options.revert else "merge", size) as progress:
            if options.revert:
                return revert.revert(base, adapters, options.out, progress=progress)
            keep = not options.no_base_values
            return merge.merge(base, adapters, options.out, revertible=keep, progress=progress)
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        raise WorkFailed(
            f"{options.out} is not written: {error}. What was written so far is beside it; run the same again."
        ) from error
    except KeyboardInterrupt:
        raise Stopped(f"Stopped; {options.out} is not there yet. What is done so far is kept beside it.", go_on=()) from None


def _print(written: merge.Merged, options: argparse.Namespace, seconds: float) -> None:
    done = "put back" if options.revert else "set"
    print(f"{written.entries:,} entries of {written.tensors} tensors {done} in {seconds:.1f} s")
    if written.added:
        print(f"{'taken out' if options.revert else 'added'}: {', '.join(written.added)}")
    if written.config:
        print(f"{'put back' if options.revert else 'set'} in config.json: {', '.join(written.config)}")
    if written.unsaid:
        print(written.unsaid)
    if written.left_out:
        print(f"left out, weights in another form: {', '.join(written.left_out)}")
    if options.verify:
        print("verified: every byte read again is the base's, or the entry that the adapters give")
    print(f"written: {options.out}")


def _verify(base: Path, adapters: list[tuple[Path, float]], options: argparse.Namespace, size: int) -> None:
    before, after = (options.out, base) if options.revert else (base, options.out)
    try:
        with bar("verify", size) as progress:
            merge.verify(before, adapters, after, progress=progress)
    except ValueError as error:
        raise WorkFailed(f"--verify: {error}.") from error
    except KeyboardInterrupt:
        raise Stopped(f"Stopped: {options.out} is written whole, but not proven. Use it, or remove it.") from None
