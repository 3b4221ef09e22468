"""`sprand predict`: what a model fine-tuned by `sprand finetune` says of new texts: a class, or how the text goes on."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import CliError
from .finetune import data
from .parser import add_json, option_of
from .tuned import Tuned, load_run

__all__ = ["Tuned", "load_run"]


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "predict",
        help="use what sprand finetune trained on new texts",
        description="Classes and their probabilities of new texts, or how a language model continues them. In Python: "
        "sprand.cli.predict.load_run(RUN).",
        examples="""
            sprand predict runs/mine new.txt           # a text a line; without a file, of standard input
            sprand predict runs/mine new.tsv --json    # every class's probability
        """,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder --out of sprand finetune")
    parser.add_argument(
        "file", nargs="?", default="-", metavar="FILE", help="TSV, CSV or JSONL, or a text a line (default: standard input)"
    )
    parser.add_argument("--text-column", default="text", metavar="NAME", help="default: text")
    parser.add_argument("--text2-column", metavar="NAME", help="for pairs of texts (default: text2, where there is one)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="default 32")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="of a continuation (default 64)")
    parser.add_argument("--device", default="auto", help="default auto: a GPU where there is one")
    add_json(parser, "print one JSON object, with every class's probability")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Print a line for each text: its class, the probability of that, and the text; or the text and its continuation.

    Raises:
        CliError: There is no such run, or no text.
    """
    for name in ("batch_size", "max_new_tokens"):
        if getattr(options, name) < 1:
            raise CliError(f"{option_of(name)}: expected at least 1, got {getattr(options, name)}.")
    texts = texts_of(options.file, options.text_column, options.text2_column)
    tuned = load_run(options.run, options.device)
    if tuned.labels:
        rows = _classified(tuned, texts, options.batch_size)
        lines = [f"{row['label']}\t{row['probabilities'][row['label']]:.4f}\t{row['text']}" for row in rows]
    else:
        rows = [{"text": text.text, "continuation": tuned.continuation(text.text, options.max_new_tokens)} for text in texts]
        lines = [f"{row['text']}{row['continuation']}" for row in rows]
    print(json.dumps({"rows": rows}, indent=2) if options.json else "\n".join(lines))
    return 0


def _classified(tuned: Tuned, texts: Sequence[data.Example], batch_size: int) -> list[dict[str, Any]]:
    """A row of JSON for each text: its likeliest class, and the probability of each."""
    rows = []
    for text, shares in zip(texts, tuned.probabilities(texts, batch_size).tolist(), strict=True):
        probabilities = dict(zip(tuned.labels, shares, strict=True))
        label = max(probabilities, key=probabilities.get)
        rows.append({"text": text.text, "label": label, "probabilities": probabilities})
    return rows


def texts_of(file: str, column: str = "text", second: str | None = None) -> list[data.Example]:
    """The texts of a table, of a file with a text a line, or of standard input.

    Raises:
        CliError: The file cannot be read, lacks a column, or holds no text.
    """
    path = Path(file)
    if file == "-" or path.suffix not in data.TABLES:
        content = sys.stdin.read() if file == "-" else data.read_text(path)
        texts = [data.Example(line) for line in content.splitlines() if line.strip()]
        if not texts:
            raise CliError("There is no text; give a file, or a text a line on standard input.")
        return texts
    columns, rows = data.read_table(path)
    second = second or ("text2" if "text2" in columns else None)
    data.check_columns(path, columns, {"--text-column": column, "--text2-column": second})
    return [data.Example(row.get(column, ""), row.get(second, "") if second else None) for row in rows]
