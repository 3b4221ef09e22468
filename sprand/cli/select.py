"""`sprand select`: the entries that a strategy chooses, into a file that `sprand finetune --mask` trains."""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

from torch import nn

import sprand

from ..adapters.plots import densities
from ..selection.pattern import RANDOM_STRATEGIES
from ..selection.strategies import STRATEGIES
from . import CliError, require
from .files import failing_in_words, prepare_folder
from .finetune import data, models, tasks
from .finetune import options as shared
from .finetune.settings import Settings
from .parser import add_json, add_out


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "select",
        help="choose which entries of a model to train, into a file",
        description="Choose which entries of a Hugging Face model train: drawn at random, or the largest scores of a strategy.",
        epilog="The file is for sprand finetune --mask FILE, and sprand.apply(model, strategy=sprand.Mask.load(FILE)).",
        examples="""
            sprand select gpt2 --strategy magnitude --density 0.01 --out mask.safetensors
            sprand select gpt2 --strategy snip --data notes.txt --out mask.safetensors --plot mask.png
        """,
        brief=(
            "--data", "--plot", "--compare", "--json", "--density", "--budget", "--strategy", "--scope", "--task", "--batch-size",
        ),
    )  # fmt: skip
    parser.set_defaults(command=run)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a directory in the Hugging Face layout, or a name on the Hub")
    add_out(parser, "FILE", "the mask, a safetensors file")
    add("--data", action="append", metavar="FILE", help="rows to compute scores on, as of finetune --train")
    add("--plot", type=Path, metavar="PNG", help="draw the density of each layer and kind of module")
    add("--compare", type=Path, metavar="MASK", help="draw the overlap with another mask as well (needs --plot)")
    add_json(parser, "print the counts as JSON")
    shared.add_amount(parser.add_argument_group("how much"))
    shared.add_choice(parser.add_argument_group("which"))
    start = parser.add_argument_group("model and data")
    shared.add_rows(start, auto_task="by the data, or by what the model was made for")
    start.add_argument("--batch-size", type=int, metavar="N", help=f"default {Settings.batch_size}")
    shared.add_start(start, seeded="a random draw, a new head, and the rows taken")


def run(options: argparse.Namespace) -> int:
    """Choose, write the mask, and say what was chosen.

    Raises:
        CliError: Options or data are wrong, or a file cannot be written.
    """
    from .finetune import methods

    rows = tuple(options.data) if options.data else None
    given = shared.given(options) | {"train": rows, "eval": rows, "compare": ()}
    settings = Settings(**given)
    require("transformers")
    _check(settings, options)
    other = _read(options.compare) if options.compare is not None else None
    for folder in {path.parent for path in (options.out, options.plot) if path is not None}:
        prepare_folder(folder)
    model, task = _loaded(settings)
    started = time.perf_counter()
    with failing_in_words():
        mask = methods.selected(model, settings, task)
    seconds = time.perf_counter() - started
    mask.save(options.out)
    if options.plot is not None:
        sprand.plot_selection(mask, options.plot, other=other)
    if options.json:
        _print_json(mask, options.out, seconds)
    else:
        _print(mask, seconds)
        print(f"written: {options.out}" + (f", {options.plot}" if options.plot else ""))
    return 0


def _check(settings: Settings, options: argparse.Namespace) -> None:
    """Refuse an overlap that nobody would see, and scores of rows that are not given.

    Raises:
        CliError: The options do not go together.
    """
    if options.compare is not None and options.plot is None:
        raise CliError("--compare draws the overlap of two masks: give --plot FILE.png as well.")
    of_data = settings.strategy in STRATEGIES and STRATEGIES[settings.strategy].wants_data
    if of_data and settings.train is None:
        of_weights = (name for name, strategy in STRATEGIES.items() if not strategy.wants_data)
        free = ", ".join((*RANDOM_STRATEGIES, *of_weights))
        raise CliError(f"--strategy {settings.strategy} needs rows to compute scores on: give --data FILE ({free} do not).")


def _loaded(settings: Settings) -> tuple[nn.Module, tasks.Task | None]:
    """The model on its device, and the task that its rows are for, where some are given."""
    device = models.pick_device(settings.device)
    dataset = data.load(settings) if settings.train is not None else None
    if dataset is not None:
        kind, classes = dataset.task, len(dataset.labels)
    else:
        kind, classes = settings.task if settings.task != "auto" else models.task_of(settings.model), 2
    model, tokenizer = models.load(settings.model, kind, classes, settings.dtype, settings.pooling, settings.seed)
    return model.to(device), tasks.make(dataset, tokenizer, settings) if dataset is not None else None


def _read(path: Path) -> sprand.Mask:
    try:
        return sprand.Mask.load(path)
    except (OSError, ValueError) as error:
        raise CliError(f"--compare: {error}.") from None


def _print_json(mask: sprand.Mask, out: Path, seconds: float) -> None:
    counts = {name: {"nnz": indices.numel(), "shape": list(mask.shapes[name])} for name, indices in mask.items()}
    content = {
        "out": str(out),
        "selection": mask.selection,
        "nnz": mask.nnz,
        "seconds": round(seconds, 3),
        "targets": counts,
    }
    print(json.dumps(content, indent=2))


def _print(mask: sprand.Mask, seconds: float) -> None:
    total = sum(math.prod(shape) for shape in mask.shapes.values())
    print(f"chose {mask.nnz:,} of {total:,} entries of {len(mask)} weights in {seconds:.1f} s")
    by_density = sorted((density, name) for name, density in densities(mask).items())
    (least, sparsest), (most, densest) = by_density[0], by_density[-1]
    print(f"density {least:.4%} ({sparsest}) to {most:.4%} ({densest})")
