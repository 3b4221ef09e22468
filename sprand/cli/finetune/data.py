"""Training data: reads TSV, CSV, JSONL and plain text, and says in a sentence what is wrong with a file."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from .. import CliError
from .settings import Settings

TABLES = (".tsv", ".csv", ".jsonl", ".json")
MOST_LABELS = 1000
Row = dict[str, str]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Example:
    """One row: a text to classify (or a pair), or a text to continue (text = prompt, text2 = completion)."""

    text: str
    text2: str | None = None
    label: str | None = None


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What a run trains and is measured on.

    Attributes:
        task: "classification" or "causal-lm".
        train, eval: the rows.
        labels: names of the classes in the order of their numbers; empty for a language model.
    """

    task: str
    train: list[Example]
    eval: list[Example]
    labels: tuple[str, ...] = ()


def load(settings: Settings) -> Dataset:
    """Read the files that the options name; without `--eval`, hold out a seeded share.

    Raises:
        CliError: A file is missing, empty, not UTF-8, malformed, lacks a column, or its labels do not fit.
    """
    task = settings.task if settings.task != "auto" else guess_task(settings)
    train = _read(settings.train, task, settings)
    if settings.eval is not None:
        held_out = _read(settings.eval, task, settings)
    else:
        train, held_out = _hold_out(train, settings)
    shuffled = random.Random(settings.seed)
    train, held_out = limited(train, settings.limit_train, shuffled), limited(held_out, settings.limit_eval, shuffled)
    labels = _labels(train, held_out, settings) if task == "classification" else ()
    return Dataset(task, train, held_out, labels)


def guess_task(settings: Settings) -> str:
    """The task a file is for: a label column means classification; plain text, or a prompt and completion, a language model."""
    path = settings.train
    if path.suffix not in TABLES:
        return "causal-lm"
    columns = read_table(path)[0]
    if settings.prompt_column or {"prompt", "completion"} <= set(columns):
        return "causal-lm"
    if (settings.label_column or "label") in columns:
        return "classification"
    if path.suffix in (".jsonl", ".json") and not settings.label_column:
        return "causal-lm"
    raise CliError(
        f"{path}: no column {settings.label_column or 'label'!r}, only {_listed(columns)}. Name it with --label-column."
    )


def limited(rows: list[T], count: int | None, source: random.Random) -> list[T]:
    """A random `count` of the rows; all where it is None or larger."""
    return rows if count is None or count >= len(rows) else source.sample(rows, count)


def read_table(path: Path) -> tuple[list[str], list[Row]]:
    """The columns and rows of a TSV (no quoting), CSV (quoted) or JSONL file.

    Args:
        path: the suffix decides the format.

    Returns:
        Names of the columns, and one dict per row.

    Raises:
        CliError: The file cannot be read as such.
    """
    text = read_text(path)
    if path.suffix in (".jsonl", ".json"):
        return _json_rows(path, text.split("\n"))
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    if path.suffix == ".csv":
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    else:
        reader = csv.reader(io.StringIO(text, newline=None), delimiter="\t", quoting=csv.QUOTE_NONE)
    rows: list[Row] = []
    try:
        columns = next(reader, [])
        if len(set(columns)) != len(columns):
            raise CliError(f"{path}: two columns of the header have the same name: {_listed(columns)}.")
        for values in reader:
            if not values:
                continue
            if len(values) != len(columns):
                raise CliError(
                    f"{path}, line {reader.line_num}: expected {len(columns)} columns as in the header, got {len(values)}."
                )
            rows.append(dict(zip(columns, values, strict=True)))
    except csv.Error as error:
        raise CliError(f"{path}, line {reader.line_num}: {error}.") from None
    if not rows:
        raise CliError(f"{path}: the header is there, but no rows follow.")
    return columns, rows


def read_text(path: Path) -> str:
    """The text of a UTF-8 file that is not empty.

    Raises:
        CliError: There is no such file, or it is not readable, not UTF-8, or empty.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CliError(
            f"{path}: not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}). Convert it first, with iconv say."
        ) from None
    except OSError as error:
        raise CliError(f"{path}: cannot be read: {error.strerror}.") from None
    if "\0" in text:
        raise CliError(f"{path}: this is a binary file; expected text, TSV, CSV or JSONL.")
    if not text.strip():
        raise CliError(f"{path}: the file is empty; expected rows below a header, or text.")
    return text


def _json_rows(path: Path, lines: Sequence[str]) -> tuple[list[str], list[Row]]:
    columns: dict[str, None] = {}
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise CliError(f"{path}, line {number}: not JSON ({error.msg}); expected one object per line.") from None
        if not isinstance(fields, dict):
            raise CliError(f"{path}, line {number}: expected a JSON object, got {type(fields).__name__}.")
        rows.append({k: v if isinstance(v, str) else json.dumps(v) for k, v in fields.items() if v is not None})
        columns |= dict.fromkeys(fields)
    return list(columns), rows


def _read(path: Path, task: str, settings: Settings) -> list[Example]:
    if task == "causal-lm" and path.suffix not in TABLES:
        return [Example(read_text(path))]
    columns, rows = read_table(path)
    names = _columns(task, columns, settings)
    check_columns(path, columns, names)
    used = [name for name in names.values() if name]
    first, *others = used
    examples = []
    for number, row in enumerate(rows, 1):
        if not (row.get(first) or "").strip() or any(row.get(name) is None for name in others):
            raise CliError(f"{path}, row {number}: a column of {_listed(used)} is empty.")
        examples.append(Example(*(row.get(name) if name else None for name in names.values())))
    return examples


def _columns(task: str, columns: Sequence[str], settings: Settings) -> dict[str, str | None]:
    """The columns of a text, what goes with it, and its label, by the options that name them; None for one that is not used."""
    text = settings.text_column or "text"
    if task == "classification":
        second = settings.text2_column or ("text2" if "text2" in columns else None)
        return {"--text-column": text, "--text2-column": second, "--label-column": settings.label_column or "label"}
    has_prompt = settings.prompt_column or "prompt" in columns
    if settings.text_column or ("text" in columns and not has_prompt):
        return {"--text-column": text, "--text2-column": None, "--label-column": None}
    return {
        "--prompt-column": settings.prompt_column or "prompt",
        "--completion-column": settings.completion_column or "completion",
        "--label-column": None,
    }


def check_columns(path: Path, columns: Sequence[str], names: Mapping[str, str | None]) -> None:
    """Prove that a table has the columns of these names, each given by the option that names it.

    Raises:
        CliError: A column is not there.
    """
    for option, name in names.items():
        if name is not None and name not in columns:
            raise CliError(f"{path}: no column {name!r}, only {_listed(columns)}. Name it with {option}.")


def _hold_out(examples: list[Example], settings: Settings) -> tuple[list[Example], list[Example]]:
    """A seeded random share of the rows; of a plain text, its end, since neighbouring lines would leak."""
    if len(examples) == 1 and examples[0].label is None and examples[0].text2 is None:
        return _cut(examples[0].text, settings)
    order = list(range(len(examples)))
    random.Random(settings.seed).shuffle(order)
    count = max(1, round(len(order) * settings.eval_share))
    if count >= len(order):
        raise CliError(f"{settings.train}: {len(order)} row is too few to hold out a part; give a file with --eval.")
    held_out, kept = sorted(order[:count]), sorted(order[count:])
    return [examples[i] for i in kept], [examples[i] for i in held_out]


def _cut(text: str, settings: Settings) -> tuple[list[Example], list[Example]]:
    """The begin of a text, and its end, a share of the lines."""
    lines = text.splitlines(keepends=True)
    cut = len(lines) - max(1, round(len(lines) * settings.eval_share))
    begin, end = "".join(lines[:cut]), "".join(lines[cut:])
    if not begin.strip() or not end.strip():
        raise CliError(f"{settings.train}: too short to hold out a part; give a file with --eval.")
    return [Example(begin)], [Example(end)]


def _labels(train: list[Example], held_out: list[Example], settings: Settings) -> tuple[str, ...]:
    """The names of the classes, numbers in their order before other names.

    Raises:
        CliError: The column holds one label, far too many, or held-out rows have labels of their own.
    """
    names = sorted({str(example.label) for example in train}, key=_label_order)
    column = settings.label_column or "label"
    if len(names) < 2:
        raise CliError(f"{settings.train}: every row has the label {names[0]!r}; classification needs two at least.")
    all_differ = len(names) == len(train) and len(train) > 2
    if len(names) > MOST_LABELS or all_differ:
        raise CliError(f"{settings.train}: {len(names)} different labels in {len(train)} rows; is {column!r} the label column?")
    unknown = sorted({str(example.label) for example in held_out} - set(names))
    if unknown:
        where = settings.eval or settings.train
        raise CliError(f"{where}: label {unknown[0]!r} is not among those of the training rows ({_listed(names)}).")
    return tuple(names)


def _label_order(name: str) -> tuple[bool, int, str]:
    is_number = name.isdecimal()
    return not is_number, int(name) if is_number else 0, name


def _listed(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
