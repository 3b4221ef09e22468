"""`sprand predict`: what a model fine-tuned by `sprand finetune` says of new texts: a class, or how the text goes on."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sprand

from ..adapters.file import FOLDER_OF_RUN
from . import CliError
from .files import failing_in_words
from .finetune import data, models, tasks
from .parser import add_json, option_of


@dataclasses.dataclass
class Tuned:
    """A model with the adapter of a run in it, ready to use.

    Attributes:
        model: in eval mode; `sprand.merge(model)` makes it a plain one.
        tokenizer: its tokenizer.
        labels: names of the classes in the order of their numbers; empty for a language model.
        max_length: tokens of a text; what is longer is cut off, as in training.
    """

    model: nn.Module
    tokenizer: Any
    labels: tuple[str, ...]
    max_length: int

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def probabilities(self, texts: Sequence[data.Example], batch_size: int = 32) -> Tensor:
        """Of each text, or pair of texts, the probability of each class, float32 `[texts, classes]`, on the CPU."""
        rows = [dataclasses.replace(text, label=self.labels[0]) for text in texts]
        dataset = data.Dataset("classification", [], rows, self.labels)
        task = tasks.Classification(dataset, self.tokenizer, self.max_length)
        parts = []
        for start in range(0, len(rows), batch_size):
            batch = task.collate(task.eval[start : start + batch_size])
            logits = tasks.logits_of(self.model, {name: value.to(self.device) for name, value in batch.items()})
            parts.append(logits.float().softmax(-1).cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def continuation(self, text: str, tokens: int = 64) -> str:
        """How a text goes on, by the likeliest token each time, until the model ends it or after so many tokens."""
        prompt = self.tokenizer(text, return_tensors="pt", truncation=True, max_length=self.max_length).to(self.device)
        tokens_of_both = self.model.generate(
            input_ids=prompt["input_ids"],
            attention_mask=prompt["attention_mask"],
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        new = tokens_of_both[0, prompt["input_ids"].shape[1] :]
        return self.tokenizer.decode(new, skip_special_tokens=True)


def load_run(folder: Path, device: str = "auto") -> Tuned:
    """The base model of a run with the adapter that it wrote.

    Args:
        folder: `--out` of `sprand finetune`, or the folder `adapter` in it.
        device: "auto", or as torch has it.

    Raises:
        CliError: There is no run, it has not ended, or its base is not there or another one.
    """
    if folder.resolve().name == FOLDER_OF_RUN and not (folder / "task.json").is_file():
        folder = folder.resolve().parent
    file = folder / "task.json"
    if not file.is_file():
        raise CliError(f"{folder}: no task.json; expected the folder --out of a run of sprand finetune that has ended.")
    with failing_in_words():
        made = json.loads(file.read_text())
        labels = tuple(made["labels"])
        model, tokenizer = models.load(made["model"], made["task"], len(labels), made["dtype"], made["pooling"], made["seed"])
        sprand.load(model, folder / FOLDER_OF_RUN)
    return Tuned(model.to(models.pick_device(device)).eval(), tokenizer, labels, made["max_length"])


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
