"""The data of a run: the rows that `--train` and `--eval` name, held out where asked, and checked before anything is written."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from .. import CliError
from .labels import classes, counted, stratified
from .rows import Example, limited, stored_examples, take
from .settings import CLASSIFIERS, Settings
from .shapes import Shape, recognised
from .sources import Names, names_of, sources
from .tables import TABLES, check_columns, is_table, listed, read_table, read_text

__all__ = ["TABLES", "Dataset", "Example", "check_columns", "is_table", "limited", "load", "read_table", "read_text"]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What a run trains and is measured on.

    Attributes:
        task: "classification" or "causal-lm".
        train, eval: the rows.
        labels: names of the classes in the order of their numbers; empty for a language model.
        unused: columns of the training rows that are not read.
    """

    task: str
    train: Sequence[Example]
    eval: Sequence[Example]
    labels: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


def load(settings: Settings) -> Dataset:
    """Read the files that the options name; without `--eval`, hold out a seeded share.

    Raises:
        CliError: A file is missing, empty, not UTF-8, malformed, lacks a column, or its labels do not fit.
    """
    found = _Found.read(settings.train, "train", settings)
    if settings.eval is not None:
        others = _Found.read(settings.eval, "eval", settings)
        if found.task != others.task:
            raise CliError(f"{names_of(settings.eval)}: this is data for {others.task}, the training rows are for {found.task}.")
        train, held_out = found.rows, others.rows
    elif found.is_plain:
        parts = [_cut(example.text, settings) for example in found.rows]
        train, held_out = [part[0] for part in parts], [part[1] for part in parts]
    else:
        train, held_out = _hold_out(found, settings)
    shuffled = random.Random(settings.seed)
    train, held_out = limited(train, settings.limit_train, shuffled), limited(held_out, settings.limit_eval, shuffled)
    labels = tuple(classes(train, held_out, settings)) if found.task in ("classification", "multi-label") else ()
    return Dataset(found.task, train, held_out, labels, found.unused)


def labelled(given: Names, settings: Settings, task: str, labels: tuple[str, ...]) -> Dataset:
    """The rows to measure a trained model on, as the held-out ones of a data set without training rows.

    Args:
        given: a file, or what else `--eval` may name.
        settings: name the columns.
        task: of the model.
        labels: its classes.

    Raises:
        CliError: The rows cannot be used, are for another task, or have a label that the model does not know.
    """
    found = _Found.read(given, "eval", dataclasses.replace(settings, task=task))
    if found.task != task:
        raise CliError(f"{names_of(given)}: this is data for {found.task}, the model is for {task}.")
    unknown = sorted(counted(found.rows).keys() - {*labels}) if labels else []
    if unknown:
        raise CliError(f"{names_of(given)}: label {unknown[0]!r} is not among those of the model ({listed(labels)}).")
    return Dataset(task, found.rows, found.rows, labels, found.unused)


@dataclasses.dataclass
class _Found:
    """The rows of all files that an option names."""

    task: str
    rows: Sequence[Example]
    is_plain: bool
    unused: tuple[str, ...] = ()

    @classmethod
    def read(cls, given: Names, part: str, settings: Settings) -> _Found:
        """Read them.

        Raises:
            CliError: One cannot be used, or they are not of one kind.
        """
        found = sources(given, part)
        texts = [source for source in found if isinstance(source, Path)]
        if texts and len(texts) < len(found):
            raise CliError(f"{names_of(given)}: expected tables or plain text, got both ({texts[0]} is plain text).")
        if texts and settings.task in CLASSIFIERS:
            raise CliError(f"{texts[0]}: {settings.task} needs a table with text and label, got a file of plain text.")
        if texts:
            return cls("causal-lm", [Example(read_text(path), ends=False) for path in texts], True)
        shapes = [recognised(table, settings) for table in found]
        kinds = {type(shape): shape.table.name for shape in shapes}
        if len(kinds) > 1:
            raise CliError(f"expected files with rows of one shape, got two: {' and '.join(kinds.values())} differ in columns.")
        rows = stored_examples(itertools.chain.from_iterable(shape.examples() for shape in shapes))
        return cls(shapes[0].task, rows, False, tuple(_unused(shapes)))


def _unused(shapes: Sequence[Shape]) -> Iterator[str]:
    return (column for column in shapes[0].table.columns if column not in shapes[0].columns)


def _hold_out(found: _Found, settings: Settings) -> tuple[Sequence[Example], Sequence[Example]]:
    """A seeded random share of the rows, of each class where there are classes."""
    total = len(found.rows)
    count = max(1, round(total * settings.eval_share))
    if count >= total:
        raise CliError(f"{names_of(settings.train)}: {total} row is too few to hold out a part; give a file with --eval.")
    held_out: list[int] = []
    if found.task == "classification":
        held_out = stratified([example.label for example in found.rows], count, settings.seed)
    if not held_out:
        order = list(range(total))
        random.Random(settings.seed).shuffle(order)
        held_out = sorted(order[:count])
    kept = sorted(set(range(total)) - set(held_out))
    return take(found.rows, kept), take(found.rows, held_out)


def _cut(text: str, settings: Settings) -> tuple[Example, Example]:
    """The begin of a text, and its end, a share of the lines, since neighbouring lines would leak."""
    lines = text.splitlines(keepends=True)
    cut = len(lines) - max(1, round(len(lines) * settings.eval_share))
    begin, end = "".join(lines[:cut]), "".join(lines[cut:])
    if not begin.strip() or not end.strip():
        raise CliError(f"{names_of(settings.train)}: too short to hold out a part; give a file with --eval.")
    return Example(begin, ends=False), Example(end, ends=False)
