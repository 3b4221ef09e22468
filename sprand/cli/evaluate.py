"""`sprand evaluate`: the measures of `sprand finetune`, of what it trained, on a labelled file."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from . import CliError
from .finetune import data, measures, tasks
from .finetune import options as shared
from .parser import add_json
from .table import print_table
from .tuned import Tuned, load_run


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "evaluate",
        help="score what sprand finetune trained on a labelled file",
        description="Measure a tuned model on a file with labels, completions or conversations, by the columns, the template, "
        "the lengths and the scores of its run: what finetune measures on held-out rows.",
        examples="""
            sprand evaluate runs/mine test.csv
            sprand evaluate runs/mine test.csv --base --json
            sprand evaluate runs/mine test.jsonl --score exact
        """,
    )
    parser.add_argument("run", metavar="RUN", help="the folder --out of sprand finetune, or a model")
    parser.add_argument("file", metavar="FILE", help="what finetune --eval takes")
    parser.add_argument("--base", action="store_true", help="measure the model without the adapter beside it")
    shared.add_columns(parser)
    shared.add_measures(parser)
    parser.add_argument("--batch-size", type=int, metavar="N", help="default: the run's")
    parser.add_argument("--device", default="auto", help="default auto: a GPU where there is one")
    add_json(parser, "print the numbers, and what is shown beside them, as one JSON object")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Measure, and print the numbers.

    Raises:
        CliError: There is no such run, or the rows cannot be used.
    """
    tuned = load_run(options.run, options.device)
    if options.base and not tuned.has_base:
        raise CliError(f"--base: {options.run} is a model without an adapter; expected the folder of a run.")
    asked = {"forgetting": None, "class_weights": None, "limit_train": None, "limit_eval": None, "max_length": tuned.max_length}
    settings = dataclasses.replace(tuned.settings, **asked | shared.given(options))
    measures.check(settings, tuned.task)
    task = tasks.make(data.labelled(options.file, settings, tuned.task, tuned.labels), tuned.tokenizer, settings)
    found = {}
    if options.base:
        with tuned.base():
            found["base"] = measures.measure(tuned.model, task, settings, tuned.device)
    found["tuned"] = measures.measure(tuned.model, task, settings, tuned.device)
    if options.json:
        parts = {name: {"numbers": part.numbers, "shown": part.shown()} for name, part in found.items()}
        print(json.dumps({"run": options.run, "file": options.file, "rows": len(task.eval), **parts}, indent=2))
    else:
        _print(tuned, task, found)
    return 0


def _print(tuned: Tuned, task: Any, found: dict[str, measures.Measures]) -> None:
    for line in task.said:
        if " training " not in line:  # the same rows stand there once more
            print(line)
    last = found["tuned"]
    rows = [(name, *(f"{part.numbers[name]:.4g}" for part in found.values())) for name in last.numbers]
    print_table([("", *found), *rows], title=f"{len(task.eval):,} rows")
    if 0 < len(last.classes) <= measures.SHOWN_CLASSES:
        print_table(measures.confusion_rows(last.classes, last.confusion), title=measures.CONFUSION)
    for number, sample in enumerate(last.samples[: measures.SHOWN_SAMPLES], 1):
        print(f"sample {number}")
        said = {"prompt": sample.prompt, "reference": sample.reference}
        said |= {name: part.samples[number - 1].generated for name, part in found.items()}
        print("\n".join(measures.sample_lines(said)))
