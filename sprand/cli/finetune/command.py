"""The command `sprand finetune`: its options, and the run or the demo that they ask for."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import CliError, ranks, require
from ..options_file import add_config
from ..parser import add_json, add_out
from . import options as shared
from .settings import CLASS_WEIGHTS, COMPARABLE, PEER_RATES, SCHEDULES, WIDE, Resume, Settings

PACKAGES = ("rich", "matplotlib", "transformers", "accelerate", "datasets", "peft", "trl", "sklearn")


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "finetune",
        help="fine-tune a Hugging Face model on a file",
        description="Fine-tune a Hugging Face model by training a share of its weights, drawn at random or by score. Without "
        "--model and --train it runs a demo: a small language model learns to write calls.",
        epilog="Without --lr, sprand.suggest_lr gives the rate. Ctrl-C writes a checkpoint and says how to go on.",
        examples="""
            sprand finetune --out runs/demo
            sprand finetune --model gpt2 --train notes.txt --out runs/notes
            sprand finetune --model gpt2 --train notes.txt --out runs/notes --resume
        """,
        brief=(
            "--model", "--train", "--eval", "--density", "--strategy", "--lr", "--epochs", "--batch-size", "--resume",
            "--overwrite", "--compare", "--verify", "--json",
        ),
    )  # fmt: skip
    parser.set_defaults(command=run)
    _add_data(parser.add_argument_group("model and data"))
    sparse = parser.add_argument_group("what trains")
    shared.add_amount(sparse)
    shared.add_choice(sparse)
    sparse.add_argument(
        "--start", type=Path, metavar="ADAPTER", help="instead of all these: go on training an adapter, or a run's"
    )
    sparse.add_argument("--mask", type=Path, metavar="FILE", help="instead of all these: the entries that sprand select chose")
    _add_training(parser.add_argument_group("training"))
    shared.add_measures(parser.add_argument_group("measures, on held-out rows"))
    _add_output(parser.add_argument_group("output and comparison"))


def run(options: argparse.Namespace) -> int:
    """Fine-tune on the files that are given; without any, run the demo.

    Raises:
        CliError: Options or data are wrong; see `pipeline.finetune` for what else may go wrong.
    """
    for package in PACKAGES:
        require(package)
    from . import demo, pipeline

    given = shared.given(options)
    if "model" not in given and "train" in given:
        raise CliError("--train needs --model: a directory in the Hugging Face layout, a GGUF file, or a name on the Hub.")
    with ranks.one_voice():
        if "train" in given:
            pipeline.finetune(Settings(**given), options.json)
        else:
            demo.run(given, options.json)
    return 0


def _add_data(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", metavar="MODEL", help="a Hugging Face model: a folder, or a name on the Hub; or a GGUF file")
    add(
        "--train",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="CSV, TSV, JSON, parquet, arrow, text; a folder; a name on the Hub",
    )
    add("--eval", nargs="+", action="extend", metavar="FILE", help="held-out data; without it, a share of the training rows")
    add("--eval-share", type=float, metavar="X", help=f"that share (default {Settings.eval_share})")
    add("--limit-train", type=int, metavar="N", help="use N random training rows")
    add("--limit-eval", type=int, metavar="N", help="use N random held-out rows")
    shared.add_rows(group, auto_task="a label column means classification")


def _add_training(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--lr", type=_rate, metavar="X", help="highest learning rate, or auto (the default)")
    add("--schedule", choices=SCHEDULES, help=f"after warm-up (default {Settings.schedule}, to 0)")
    add("--warmup", type=float, metavar="X", help=f"steps, or below 1 the share of all (default {Settings.warmup})")
    add("--epochs", type=float, metavar="X", help=f"default {Settings.epochs:g}")
    add("--max-steps", type=int, metavar="N", help="instead of epochs")
    add("--batch-size", type=int, metavar="N", help=f"default {Settings.batch_size}")
    add("--grad-accumulation", type=int, metavar="N", help=f"batches per step (default {Settings.grad_accumulation})")
    add(
        "--weight-decay",
        type=float,
        metavar="X",
        help=f"pulls weights to their pre-trained values (default {Settings.weight_decay:g})",
    )
    add("--class-weights", choices=CLASS_WEIGHTS, help="balanced: in the loss, each class counts as much as the others")
    add("--max-grad-norm", type=float, metavar="X", help=f"default {Settings.max_grad_norm:g}")
    shared.add_start(group, seeded="positions, data order, new head and dropout")
    shared.add_packing(group)
    add("--eval-every", type=int, metavar="N", help="steps (default: three times in all)")
    add("--checkpoint-every", type=int, metavar="N", help="steps (default: every epoch)")
    add("--keep", type=int, metavar="N", help=f"checkpoints that are kept, the newest (default {Settings.keep})")
    add("--best", action="store_true", default=None, help="end with the checkpoint that is best on the held-out rows")
    add("--patience", type=int, metavar="N", help="stop early after N evaluations without a better one; means --best")
    add("--packing", action="store_true", default=None, help="fill each row of a language model's batch with several texts")
    add("--gradient-checkpointing", action="store_true", default=None, help="less memory, more time")
    add("--report-to", type=shared.names, metavar="A,B", help="wandb, tensorboard, trackio, ...: what transformers knows")
    add(
        "--trainer",
        type=_trainer_option,
        action="append",
        metavar="NAME=X",
        help="any further option of transformers' TrainingArguments or, for a language model, TRL's SFTConfig",
    )
    add(
        "--resume",
        type=Path,
        nargs="?",
        const=Resume.NEWEST,
        metavar="PATH",
        help="go on from a checkpoint (default: the newest), also to more steps",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    peers = ", ".join(COMPARABLE)
    rates = ", ".join(f"{name} {PEER_RATES[name]:g}" for name in COMPARABLE)
    add_config(group)
    add_out(group, "DIR", "adapter, checkpoints, metrics, curve and results go here")
    add("--push-to-hub", metavar="OWNER/NAME", help="put the adapter on the Hub as well")
    add("--overwrite", action="store_true", default=None, help="drop the run that is there")
    add("--compare", type=shared.names, metavar="A,B", help=f"run these beside it on the same data: {peers}")
    add(
        "--compare-lr",
        type=_peer_rate,
        action="append",
        metavar="NAME=X",
        help=f"their learning rates (default {rates}, for models up to {WIDE} wide)",
    )
    add_json(group, "print the content of results.json, and all else on standard error")
    add(
        "--verify",
        action="store_true",
        default=None,
        help="reload, unmerge and merge (by sprand merge too), and check that all is exact",
    )


def _rate(text: str) -> float | None:
    if text == "auto":
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or auto, got {text!r}") from None


def _trainer_option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, for example neftune_noise_alpha=5, got {text!r}")
    return name.strip("-").replace("-", "_"), value


def _peer_rate(text: str) -> tuple[str, float]:
    return shared.named_number(text, "lora=1e-3")
