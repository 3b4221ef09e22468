"""`sprand predict`: what a model fine-tuned by `sprand finetune` says of new texts: a class, or a completion."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files.atomic import replacing
from . import CliError
from .files import failing_in_words
from .finetune import asking
from .finetune import options as shared
from .finetune.tables import text_of
from .parser import add_json, option_of
from .tuned import Tuned, load_run

__all__ = ["Tuned", "load_run"]

WRITTEN = {".csv": {}, ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}, ".jsonl": None}
MOST_NEW_TOKENS = 64
Row = dict[str, Any]


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "predict",
        help="use what sprand finetune trained on new texts",
        description="The class of new texts with each class's probability, or what a language model says to them. Columns, "
        "template and lengths are those of the run. In Python: sprand.cli.predict.load_run(RUN).",
        examples="""
            sprand predict runs/mine new.txt              # a text a line
            sprand predict runs/mine new.csv -o said.csv  # keeps rows and columns
            sprand predict runs/mine new.jsonl --json
        """,
    )
    parser.add_argument("run", metavar="RUN", help="the folder --out of sprand finetune, or a model")
    parser.add_argument(
        "file", nargs="?", default="-", metavar="FILE", help="a table, or a text a line (default: standard input)"
    )
    parser.add_argument("-o", "--out", dest="written", type=Path, metavar="OUT", help=f"a file to write: {', '.join(WRITTEN)}")
    shared.add_columns(parser)
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="default 32")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help=f"of a completion (default {MOST_NEW_TOKENS})")
    parser.add_argument("--device", default="auto", help="default auto: a GPU where there is one")
    add_json(parser, "print one JSON object, with every class's probability")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Print or write what the model says of each row.

    Raises:
        CliError: There is no such run, or a row cannot be used.
    """
    for name in ("batch_size", "max_new_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise CliError(f"{option_of(name)}: expected at least 1, got {value}.")
    if options.written and options.written.suffix not in WRITTEN:
        raise CliError(f"--out {options.written}: expected a file {', '.join(WRITTEN)}.")
    questions = asking.read(options.file)
    tuned = load_run(options.run, options.device)
    tuned.settings = dataclasses.replace(tuned.settings, **shared.given(options))
    if options.written and options.written.suffix == ".tsv" and tuned.task == "causal-lm":
        raise CliError(f"--out {options.written}: completions have line breaks, which TSV cannot hold; write .csv or .jsonl.")
    if tuned.task != "causal-lm":
        rows, lines = _classified(tuned, questions, options)
    else:
        rows, lines = _completed(tuned, questions, options)
    if options.written:
        write(options.written, questions, rows)
    if options.json:
        print(json.dumps({"out": str(options.written), "rows": len(rows)} if options.written else {"rows": rows}, indent=2))
    elif options.written:
        print(f"written: {options.written}, {len(rows):,} rows")
    else:
        print("\n".join(lines))
    return 0


def write(path: Path, questions: asking.Questions, said: Sequence[Row]) -> None:
    """Write each row with what is said of it; a name that the row has already is written as `predicted_` and the name.

    Raises:
        CliError: The file cannot be written, or cannot hold a value.
    """
    style, columns = WRITTEN[path.suffix], set(questions.columns)
    new = [{(f"predicted_{name}" if name in columns else name): value for name, value in _cells(row, style)} for row in said]
    rows = [row | more for row, more in zip(questions.rows, new, strict=True)]
    number = 0
    with failing_in_words(), replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        if style is None:
            file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
            return
        writer = csv.DictWriter(file, [*questions.columns, *new[0]], restval="", lineterminator="\n", **style)
        try:
            writer.writeheader()
            for row in rows:
                number += 1
                writer.writerow({name: text_of(value) for name, value in row.items()})
        except csv.Error:
            raise CliError(
                f"--out {path}: row {number} holds a tab or a line break, which TSV cannot; write .csv or .jsonl."
            ) from None


def _cells(said: Row, style: Row | None) -> list[tuple[str, Any]]:
    """What is added to a row: as it is in JSON, a column for each probability in a table."""
    cells = {name: value for name, value in said.items() if name in ("label", "completion", "probabilities")}
    shares = {} if style is None else cells.pop("probabilities", {})
    return [*cells.items(), *((f"probability_{name}", round(share, 6)) for name, share in shares.items())]


def _classified(tuned: Tuned, questions: asking.Questions, options: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """For each row its class, or classes, and the probability of each, or its number, and a line that says so."""
    texts = asking.texts(questions, tuned.settings, tuned.kind)
    rows, lines = [], []
    for text, shares in zip(texts, tuned.probabilities(texts, options.batch_size).tolist(), strict=True):
        if tuned.task == "regression":
            rows.append({"text": text.text, "label": shares[0]})
            lines.append(f"{shares[0]:.4f}\t{text.text}")
            continue
        probabilities = dict(zip(tuned.labels, shares, strict=True))
        label = max(probabilities, key=probabilities.get)
        said = f"{label}\t{probabilities[label]:.4f}"
        if tuned.task == "multi-label":
            label = [name for name, share in probabilities.items() if share > 0.5]
            said = ", ".join(label)
        rows.append({"text": text.text, "label": label, "probabilities": probabilities})
        lines.append(f"{said}\t{text.text}")
    return rows, lines


def _completed(tuned: Tuned, questions: asking.Questions, options: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """For each row what the model says, and the line that shows it: behind the text that it goes on from."""
    examples = asking.examples(questions, tuned.settings, tuned.kind)
    said = tuned.completions(examples, options.max_new_tokens or MOST_NEW_TOKENS, options.batch_size)
    asked = [example.messages[-2]["content"] if example.messages else example.text for example in examples]
    goes_on = not examples[0].messages and not tuned.settings.chat
    rows = [{"text": text, "completion": answer} for text, answer in zip(asked, said, strict=True)]
    return rows, [f"{row['text']}{row['completion']}" if goes_on else row["completion"] for row in rows]
