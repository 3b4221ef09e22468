"""The options that `sprand finetune` and `sprand select` share: the rows to read, and which entries of a model train."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ...selection.pattern import LAYOUTS, RANDOM_STRATEGIES
from ...selection.rules import DEFAULT_DENSITY, SCOPES
from ...selection.strategies import STRATEGIES
from .settings import DEFAULT_LENGTH, DTYPES, LONG_ROWS, POOLINGS, TASKS, Settings


def add_rows(group: argparse._ArgumentGroup, auto_task: str) -> None:
    """Add what the rows of a file are, and how a model takes them; `auto_task` says what the task is by default."""
    add = group.add_argument
    add("--task", choices=TASKS, help=f"auto: {auto_task}")
    add_columns(group)
    add("--max-length", type=int, metavar="N", help=f"tokens of a row (default: the model's positions, {DEFAULT_LENGTH} at most)")
    add("--long-rows", choices=LONG_ROWS, help=f"cut their end, or drop them (default {Settings.long_rows})")
    add("--pooling", choices=POOLINGS, help="of a text classifier; auto: mean for sentence embedding models")


def add_columns(group: argparse._ArgumentGroup) -> None:
    """Add what the columns of a file are, and how prompts are put."""
    add = group.add_argument
    add("--text-column", metavar="NAME", help="default: text")
    add("--text2-column", metavar="NAME", help="of a pair; default: text2 if there is one")
    add("--label-column", metavar="NAME", help="default: label")
    add("--prompt-column", metavar="NAME", help="no loss is taken of it; default: prompt")
    add("--completion-column", metavar="NAME", help="default: completion")
    add("--messages-column", metavar="NAME", help="of a conversation; default: messages or conversations")
    add("--chat", action="store_true", default=None, help="put prompts and completions through the model's chat template")


def add_start(group: argparse._ArgumentGroup, seeded: str) -> None:
    """Add what a model starts as: the seed, whose uses `seeded` names, the dtype and the device."""
    add = group.add_argument
    add("--seed", type=int, metavar="N", help=f"of {seeded} (default {Settings.seed})")
    add("--dtype", choices=DTYPES, help="of the pre-trained weights; auto (the default): as they are stored, float16 as float32")
    add("--device", metavar="NAME", help="default: a GPU if there is one")


def add_packing(group: argparse._ArgumentGroup) -> None:
    """Add how the frozen weights are packed."""
    by = "by bitsandbytes; the adapter merges into the checkpoint as it is stored"
    group.add_argument("--load-in-4bit", action="store_true", default=None, help=f"pack the base's linear weights to NF4, {by}")
    group.add_argument("--load-in-8bit", action="store_true", default=None, help="the same to int8")


def add_amount(group: argparse._ArgumentGroup) -> None:
    """Add how many entries train, and in which shape and modules."""
    add = group.add_argument
    add(
        "--density",
        type=_density,
        metavar="X",
        help=f"share of the targeted weights' entries that train (default {DEFAULT_DENSITY})",
    )
    add("--budget", metavar="N", help="instead: a count of entries, or a fraction of the model")
    add("--target-modules", type=names, metavar="A,B", help="names or suffixes of modules (default all-linear)")
    add("--target-parameters", type=names, metavar="A,B", help="further weights by name: fused experts, embeddings, biases")
    add(
        "--layout",
        choices=LAYOUTS,
        help="entries one by one (default), or whole columns",
    )
    add(
        "--sparta", action="store_true", default=None, help="the SpaRTA recipe: v and o projections, density over the whole model"
    )


def add_choice(group: argparse._ArgumentGroup) -> None:
    """Add how the entries are chosen."""
    add = group.add_argument
    of_data = [name for name, strategy in STRATEGIES.items() if strategy.wants_data]
    of_weights = [name for name, strategy in STRATEGIES.items() if not strategy.wants_data]
    own_options = [f"{option} ({name})" for name, strategy in STRATEGIES.items() for option in strategy.options]
    add(
        "--strategy",
        choices=(*RANDOM_STRATEGIES, *STRATEGIES),
        metavar="NAME",
        help=f"{', '.join(RANDOM_STRATEGIES)} draw entries (default random: stratified); the largest scores on training rows: "
        f"{', '.join(of_data)}; of the weights alone: {', '.join(of_weights)}",
    )
    add(
        "--strategy-option",
        type=_strategy_option,
        action="append",
        metavar="NAME=X",
        help=f"an option of the strategy: {', '.join(own_options)}",
    )
    add("--scope", choices=SCOPES, help="scores: the same share of each weight (default), or ranked over all")
    add(
        "--disjoint",
        type=names,
        metavar="A,B",
        help="folders of adapters whose entries are left out, so that this one can be combined with them, and taken out again, "
        "exactly",
    )
    add("--preserve-zeros", action="store_true", default=None, help="choose among entries that are not zero (a pruned model)")
    add(
        "--calibration-examples",
        type=int,
        metavar="N",
        help=f"rows that scores are computed on (default {Settings.calibration_examples})",
    )
    add(
        "--calibration-memory",
        metavar="BYTES",
        help="for summed gradients; less means more passes (default: half of what is free)",
    )


def add_measures(group: argparse._ArgumentGroup) -> None:
    """Add what is measured of a language model beside its loss."""
    add = group.add_argument
    add("--score", metavar="NAME", help="of generated text: exact, or a function as package.module:function")
    add("--answer-pattern", metavar="REGEX", help="exact: compare the last match in the text and in the reference")
    add("--score-rows", type=int, metavar="N", help=f"rows to generate for (default {Settings.score_rows})")
    add("--max-new-tokens", type=int, metavar="N", help=f"of a generated text (default {Settings.max_new_tokens})")
    add("--forgetting", type=Path, metavar="FILE", help="a text whose perplexity is measured as well")


def given(options: argparse.Namespace) -> dict[str, Any]:
    """The options that were given and are fields of `Settings`."""
    fields = {field.name for field in dataclasses.fields(Settings)}
    values = {name: value for name, value in vars(options).items() if name in fields and value is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def names(text: str) -> tuple[str, ...]:
    """The names in a text that lists them with commas between."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def named_number(text: str, example: str) -> tuple[str, float]:
    """A name and a number of a text `NAME=NUMBER`; the error shows the example."""
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER, for example {example}, got {text!r}") from None


def _density(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a fraction, got {text!r}; write 0.01 for 1 %") from None


def _strategy_option(text: str) -> tuple[str, float]:
    name, value = named_number(text, "rank=64")
    return name, int(value) if value == int(value) else value
