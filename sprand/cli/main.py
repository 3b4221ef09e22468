"""The command line: its commands, the options of `sprand finetune`, `select` and `doctor`, and how errors are shown."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..selection.pattern import RANDOM_STRATEGIES
from ..selection.strategies import STRATEGIES
from ..version import __version__
from . import CliError, Stopped, combine, completion, diff, export, inspect, merge, plan, predict
from .parser import Parser

OTHERS = (predict, merge, combine, diff, inspect, plan, export)  # each with its options in a module of its own
EXIT_CODES = """exit codes:
  0    done
  1    the work failed: training diverged, a disk is full, a proof or self test does not hold
  2    wrong options or data
  130  stopped by Ctrl-C (143 by SIGTERM); the message says how to go on"""
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
        The exit code: 0, 1 where the work failed, 2 where options or data are wrong, 130 or 143 where a signal stopped it, and
        141 where nobody reads the output any more.
    """
    parser = build_parser(brief="--help-all" not in arguments)
    try:
        options = parser.parse(arguments)
        with _library_lines():
            code = options.command(options)
        sys.stdout.flush()
        return code
    except Stopped as stop:
        how = "Begin again" if stop.go_on is None else "Go on"
        print(f"sprand: {stop} {how} with:\n  {_again(arguments, stop.go_on or ())}", file=sys.stderr)
        return stop.exit_code
    except CliError as error:
        print(f"sprand: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"sprand: Stopped. Begin again with:\n  {_again(arguments)}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more when it flushes at exit
        return 141


def _again(arguments: Sequence[str], more: Sequence[str] = ()) -> str:
    """The command, as a shell reads it, with options added to it."""
    return shlex.join([_program(), *arguments, *(option for option in more if list(arguments[-1:]) != [option])])


def _program() -> str:
    """What a shell calls this program by: its name where that finds it, else the path that was called."""
    called = sys.argv[0]
    found = shutil.which("sprand")
    return called if Path(called).name == "sprand" and not (found and os.path.samefile(found, called)) else "sprand"


@contextmanager
def _library_lines() -> Iterator[None]:
    """Show what the library logs, the time and memory of a calibration say, on standard error; quieten what others say."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    logger, handler = logging.getLogger("sprand"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def build_parser(brief: bool = False) -> Parser:
    """The parser of the whole command line.

    Args:
        brief: its help leaves out the options that few need.
    """
    parser = Parser(
        prog="sprand",
        description="Fine-tune a model by training a small set of its own weights.",
        epilog=EXIT_CODES,
        examples="""
            sprand doctor                          # is all well here?
            sprand finetune --out runs/first       # a demo, in a minute or two on a CPU
            sprand COMMAND --help                  # of one command, with examples
        """,
    )
    parser.add_argument("--version", action="version", version=f"sprand {__version__}", help="show the version")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    doctor = commands.add_parser(
        "doctor",
        help="what is installed, which kernel serves what, and a self test",
        description="Show versions, the machine, and which kernel serves which operator, and test each of them; to be pasted "
        "into a bug report.",
        examples="""
            sprand doctor
            sprand doctor --json
        """,
    )
    doctor.add_argument("--json", action="store_true", help="print it as JSON")
    doctor.set_defaults(command=_doctor)
    finetune = commands.add_parser(
        "finetune",
        help="fine-tune a Hugging Face model on a file",
        description="Fine-tune a Hugging Face model by training a share of its weights, drawn at random or by score. Without "
        "--model and --train it runs a demo: a sentence model learns to tell docstrings apart.",
        epilog="The learning rate, where not given, is that of sprand.suggest_lr, by density, width and strategy. Ctrl-C writes "
        "a checkpoint and says how to go on.",
        examples="""
            sprand finetune --out runs/demo --compare lora,full
            sprand finetune --model gpt2 --train notes.txt --out runs/notes
            sprand finetune --model gpt2 --train notes.txt --out runs/notes --resume
        """,
        brief=(
            "--model", "--train", "--eval", "--density", "--strategy", "--lr", "--epochs", "--batch-size", "--resume",
            "--overwrite", "--compare", "--verify", "--json",
        ),
    )  # fmt: skip
    finetune.set_defaults(command=_finetune)
    _add_data(finetune.add_argument_group("model and data"))
    sparse = finetune.add_argument_group("what trains")
    _add_sparse(sparse)
    _add_selection(sparse)
    sparse.add_argument("--mask", type=Path, metavar="FILE", help="instead of all these: the entries that sprand select chose")
    _add_training(finetune.add_argument_group("training"))
    _add_output(finetune.add_argument_group("output and comparison"))
    select = commands.add_parser(
        "select",
        help="choose which entries of a model to train, into a file",
        description="Choose which entries of a Hugging Face model train: drawn at random, or the largest scores of a strategy.",
        epilog="The file is for sprand finetune --mask FILE, and sprand.apply(model, strategy=sprand.Mask.load(FILE)).",
        examples="""
            sprand select gpt2 --strategy magnitude --density 0.01 --out mask.safetensors
            sprand select gpt2 --strategy snip --data notes.txt --out mask.safetensors --plot mask.png
        """,
        brief=(
            "--data",
            "--plot",
            "--compare",
            "--json",
            "--density",
            "--budget",
            "--strategy",
            "--scope",
            "--task",
            "--batch-size",
        ),
    )
    select.set_defaults(command=_select)
    _add_selected(select)
    for command in OTHERS:
        command.add(commands)
    completion.add(commands, build_parser)
    if brief:
        for command in commands.choices.values():
            command.show_brief()
    return parser


def _add_data(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", metavar="MODEL", help="a Hugging Face model: a folder, or a name on the Hub")
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
    add("--density", type=_density, metavar="X", help="share of the targeted weights' entries that train (default 0.01)")
    add("--budget", metavar="N", help="instead: a count of entries, or a fraction of the model")
    add("--target-modules", type=_names, metavar="A,B", help="names or suffixes of modules (default all-linear)")
    add(
        "--layout",
        choices=("unstructured", "run2", "run4", "run8"),
        help="one by one (default), or in runs: 2 or 4 adjacent rows, or 8 adjacent columns",
    )
    add(
        "--sparta", action="store_true", default=None, help="the SpaRTA recipe: v and o projections, density over the whole model"
    )


def _add_selection(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--strategy",
        choices=(*RANDOM_STRATEGIES, *STRATEGIES),
        metavar="NAME",
        help=f"{', '.join(RANDOM_STRATEGIES)} draw entries (default random: stratified); the largest scores on training rows: "
        f"{', '.join(name for name, s in STRATEGIES.items() if s.wants_data)}; of the weights alone: "
        f"{', '.join(name for name, s in STRATEGIES.items() if not s.wants_data)}",
    )
    add(
        "--strategy-option",
        type=_option,
        action="append",
        metavar="NAME=X",
        help=f"an option of the strategy: {', '.join(f'{o} ({name})' for name, s in STRATEGIES.items() for o in s.options)}",
    )
    add("--scope", choices=("local", "global"), help="scores: the same share of each weight (default), or ranked over all")
    add(
        "--disjoint",
        type=_names,
        metavar="A,B",
        help="folders of adapters whose entries are left out, so that this one can be combined with them, and taken out again, "
        "exactly",
    )
    add("--preserve-zeros", action="store_true", default=None, help="choose among entries that are not zero (a pruned model)")
    add("--calibration-examples", type=int, metavar="N", help="rows that scores are computed on (default 1024)")
    add(
        "--calibration-memory",
        metavar="BYTES",
        help="for summed gradients; less means more passes (default: half of what is free)",
    )


def _add_selected(select: argparse.ArgumentParser) -> None:
    add = select.add_argument
    add("model", metavar="MODEL", help="a directory in the Hugging Face layout, or a name on the Hub")
    add("--out", type=Path, required=True, metavar="FILE", help="the mask, a safetensors file")
    add("--data", type=Path, metavar="FILE", help="rows to compute scores on: TSV (unquoted), CSV, JSONL, or plain text")
    add("--plot", type=Path, metavar="PNG", help="draw the density of each layer and kind of module")
    add("--compare", type=Path, metavar="MASK", help="draw the overlap with another mask as well (needs --plot)")
    add("--json", action="store_true", help="print the counts as JSON")
    _add_sparse(select.add_argument_group("how much"))
    _add_selection(select.add_argument_group("which"))
    data = select.add_argument_group("model and data").add_argument
    data("--task", choices=("auto", "classification", "causal-lm"), help="auto: by the data, or by what the model was made for")
    for name, what in (("text", "text"), ("text2", "text2 if there is one"), ("label", "label"), ("prompt", "prompt")):
        data(f"--{name}-column", metavar="NAME", help=f"default: {what}")
    data("--completion-column", metavar="NAME", help="default: completion")
    data("--max-length", type=int, metavar="N", help="tokens of a row (default 128)")
    data("--pooling", choices=("auto", "mean", "model"), help="of a text classifier, as in finetune")
    data("--batch-size", type=int, metavar="N", help="default 32")
    data("--seed", type=int, metavar="N", help="of a random draw, a new head, and the rows taken (default 0)")
    data("--dtype", choices=("float32", "bfloat16"), help="of the weights (default float32)")
    data("--device", metavar="NAME", help="default: a GPU if there is one")


def _add_training(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--lr", type=_lr, metavar="X", help="highest learning rate, or auto (the default)")
    add("--schedule", choices=("linear", "cosine", "constant"), help="after warm-up (default linear, to 0)")
    add("--warmup", type=float, metavar="X", help="steps, or below 1 the share of all (default 0.06)")
    add("--epochs", type=float, metavar="X", help="default 3")
    add("--max-steps", type=int, metavar="N", help="instead of epochs")
    add("--batch-size", type=int, metavar="N", help="default 32")
    add("--grad-accumulation", type=int, metavar="N", help="batches per step (default 1)")
    add("--weight-decay", type=float, metavar="X", help="pulls weights to their pre-trained values (default 0)")
    add("--max-grad-norm", type=float, metavar="X", help="default 1")
    add("--seed", type=int, metavar="N", help="of positions, data order, new head and dropout (default 0)")
    add("--dtype", choices=("float32", "bfloat16"), help="of the pre-trained weights (default float32)")
    add("--device", metavar="NAME", help="default: a GPU if there is one")
    add("--eval-every", type=int, metavar="N", help="steps (default: three times in all)")
    add("--checkpoint-every", type=int, metavar="N", help="steps (default: every epoch)")
    add("--keep", type=int, metavar="N", help="checkpoints that are kept, the newest (default 2)")
    add("--resume", nargs="?", const="newest", metavar="FILE", help="go on from a checkpoint, by default the newest in OUT")


def _add_output(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="adapter, checkpoints, metrics, curve and results go here")
    add("--overwrite", action="store_true", default=None, help="drop the run that is there")
    add("--compare", type=_names, metavar="A,B", help="run these beside it on the same data: lora, full, head")
    add(
        "--compare-lr",
        type=_rate,
        action="append",
        metavar="NAME=X",
        help="their learning rates (default lora 2e-3, full 3e-4, head 1e-2, for 384 wide)",
    )
    add("--json", action="store_true", help="print the content of results.json, and all else on standard error")
    add("--verify", action="store_true", default=None, help="reload, unmerge and merge at the end, and check that all is exact")


def _finetune(options: argparse.Namespace) -> int:
    from .finetune.settings import Settings

    given = _given(options, Settings)
    if "train" in given and "model" not in given:
        raise CliError("--train needs --model: a directory in the Hugging Face layout, or a name on the Hub.")
    if "train" not in given:
        given.pop("eval", None)
        given = DEMO | {"model": "", "train": Path()} | given
    settings = Settings(**given)
    from .finetune import run as finetune

    if settings.train == Path():
        from .finetune import demo

        finetune.prepare_folder(settings.out)
        settings = demo.settings(settings)
    finetune.run(settings, options.json)
    return 0


def _select(options: argparse.Namespace) -> int:
    from .finetune.settings import Settings

    given = _given(options, Settings)
    settings = Settings(**given | {"train": options.data or Path(), "eval": options.data, "out": options.out, "compare": ()})
    from . import select

    select.run(settings, options.out, options.plot, options.compare, options.json)
    return 0


def _given(options: argparse.Namespace, settings: type) -> dict[str, Any]:
    """The options that were given and are fields of the settings."""
    fields = {f.name for f in dataclasses.fields(settings)}
    given = {name: value for name, value in vars(options).items() if name in fields and value is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _doctor(options: argparse.Namespace) -> int:
    from . import doctor

    return doctor.run(options.json)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _density(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a fraction, got {text!r}; write 0.01 for 1 %") from None


def _lr(text: str) -> float | None:
    if text == "auto":
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or auto, got {text!r}") from None


def _rate(text: str) -> tuple[str, float]:
    return _named_number(text, "lora=1e-3")


def _option(text: str) -> tuple[str, float]:
    name, value = _named_number(text, "rank=64")
    return name, int(value) if value == int(value) else value


def _named_number(text: str, example: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER, for example {example}, got {text!r}") from None
