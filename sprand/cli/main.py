"""The command line: `sprand finetune` and `sprand doctor`, their options, and how errors are shown."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from ..version import __version__
from . import CliError

DEMO = {
    "epochs": 1.0,
    "batch_size": 16,
    "max_length": 32,
    "limit_train": 1600,
    "limit_eval": 400,
    "compare": (),
    "overwrite": True,
}


def run(arguments: Sequence[str]) -> int:
    """Run one command.

    Args:
        arguments: without the program's name.

    Returns:
        The exit code: 0, 1 where training failed, 2 where options or data are wrong.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        return options.command(options)
    except CliError as error:
        print(f"sprand: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("sprand: stopped.", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="sprand", description="Fine-tune a model by training a small, random set of its own weights."
    )
    parser.add_argument("--version", action="version", version=f"sprand {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="what is installed, which kernel serves what, and a self test")
    doctor.add_argument("--json", action="store_true", help="print it as JSON")
    doctor.set_defaults(command=_doctor)
    finetune = commands.add_parser(
        "finetune",
        help="fine-tune a Hugging Face model on a file",
        description="Fine-tune a Hugging Face model by training a random share of its weights. "
        "Without --model and --train it runs a demo: all-MiniLM-L6-v2 learns which package of Python's standard library a "
        "docstring comes from.",
        epilog="The learning rate, where not given, rises as the density falls: 5e-3 at 1 %, 1e-2 at 0.1 %, 3e-3 at 3 %, "
        "1e-4 at 100 % for a model 384 wide, times 384/width for others (6 at most).",
    )
    finetune.set_defaults(command=_finetune)
    _add_data(finetune.add_argument_group("model and data"))
    _add_sparse(finetune.add_argument_group("what trains"))
    _add_training(finetune.add_argument_group("training"))
    _add_output(finetune.add_argument_group("output and comparison"))
    return parser


def _add_data(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", metavar="DIR_OR_HUB_ID", help="a Hugging Face model")
    add("--train", type=Path, metavar="FILE", help="TSV (unquoted), CSV, JSONL, or plain text")
    add("--eval", type=Path, metavar="FILE", help="held-out data; without it, a share of the training file")
    add("--eval-share", type=float, metavar="X", help="that share (default 0.1)")
    add("--task", choices=("auto", "classification", "causal-lm"), help="auto: a label column means classification")
    add("--text-column", metavar="NAME", help="default: text")
    add("--text2-column", metavar="NAME", help="of a pair; default: text2 if there is one")
    add("--label-column", metavar="NAME", help="default: label")
    add("--prompt-column", metavar="NAME", help="no loss is taken of it; default: prompt")
    add("--completion-column", metavar="NAME", help="default: completion")
    add("--limit-train", type=int, metavar="N", help="use N random training rows")
    add("--limit-eval", type=int, metavar="N", help="use N random held-out rows")
    add("--max-length", type=int, metavar="N", help="tokens of a row (default 128)")
    add("--pooling", choices=("auto", "mean", "model"), help="of a text classifier; auto: mean for sentence embedding models")


def _add_sparse(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--density", type=float, metavar="X", help="share of the targeted weights' entries that train (default 0.01)")
    add("--budget", metavar="N", help="instead: a count of entries, or a fraction of the model")
    add("--target-modules", type=_names, metavar="A,B", help="names or suffixes of modules (default all-linear)")
    add("--strategy", choices=("random", "uniform"), help="how positions are drawn (default random: stratified)")
    add(
        "--layout",
        choices=("unstructured", "run2", "run4", "run8"),
        help="one by one (default), or in runs: 2 or 4 adjacent rows, or 8 adjacent columns",
    )
    add(
        "--sparta", action="store_true", default=None, help="the SpaRTA recipe: v and o projections, density over the whole model"
    )


def _add_training(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--lr", type=float, help="highest learning rate (default: by density and width, see below)")
    add("--schedule", choices=("linear", "cosine", "constant"), help="after warm-up (default linear, to 0)")
    add("--warmup", type=float, metavar="X", help="steps, or below 1 the share of all (default 0.06)")
    add("--epochs", type=float, metavar="X", help="default 3")
    add("--max-steps", type=int, metavar="N", help="instead of epochs")
    add("--batch-size", type=int, metavar="N", help="default 32")
    add("--grad-accumulation", type=int, metavar="N", help="batches per step (default 1)")
    add("--weight-decay", type=float, metavar="X", help="pulls weights to their pre-trained values (default 0)")
    add("--max-grad-norm", type=float, metavar="X", help="default 1")
    add("--seed", type=int, help="of positions, data order, new head and dropout (default 0)")
    add("--dtype", choices=("float32", "bfloat16"), help="of the pre-trained weights (default float32)")
    add("--device", metavar="NAME", help="default: a GPU if there is one")
    add("--eval-every", type=int, metavar="N", help="steps (default: three times in all)")
    add("--checkpoint-every", type=int, metavar="N", help="steps (default: every epoch)")
    add("--resume", nargs="?", const="newest", metavar="FILE", help="go on from a checkpoint, by default the newest in OUT")


def _add_output(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="adapter, checkpoints, metrics, curve and results go here")
    add("--overwrite", action="store_true", default=None, help="drop the checkpoints of an unfinished run there")
    add("--compare", type=_names, metavar="A,B", help="run these beside it on the same data: lora, full, head")
    add(
        "--compare-lr",
        type=_rate,
        action="append",
        metavar="NAME=X",
        help="their learning rates (default lora 2e-3, full 3e-4, head 1e-2, for 384 wide)",
    )
    add("--verify", action="store_true", default=None, help="reload, unmerge and merge at the end, and check that all is exact")


def _finetune(options: argparse.Namespace) -> int:
    from .settings import Settings

    fields = {f.name for f in dataclasses.fields(Settings)}
    given = {name: value for name, value in vars(options).items() if name in fields and value is not None}
    if "compare_lr" in given:
        given["compare_lr"] = tuple(given["compare_lr"])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    if "train" in given and "model" not in given:
        raise CliError("--train needs --model: a directory in the Hugging Face layout, or a name on the Hub.")
    if "train" not in given:
        given.pop("eval", None)
        given = DEMO | {"model": "", "train": Path()} | given
    settings = Settings(**given)
    from . import finetune

    if settings.train == Path():
        from . import demo

        finetune.prepare_folder(settings.out)
        settings = demo.settings(settings)
    finetune.run(settings)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from . import doctor

    return doctor.run(options.json)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _rate(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER, for example lora=1e-3, got {text!r}") from None
