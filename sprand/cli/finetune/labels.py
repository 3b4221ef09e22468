"""Classes: which there are, how many rows each has, and a held-out part that has its share of each."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence

from .. import CliError, require
from .rows import Example
from .settings import Settings
from .sources import names_of
from .tables import listed

MOST_LABELS = 1000
MOST_LISTED = 12


def classes(train: Sequence[Example], held_out: Sequence[Example], settings: Settings) -> dict[str, int]:
    """How many training rows each class has, in the order of the classes: numbers in theirs, before other names.

    Raises:
        CliError: The column holds one label, far too many, or held-out rows have labels of their own.
    """
    where, column = names_of(settings.train), settings.label_column or "label"
    counts, is_several = counted(train), train[0].labels is not None
    names = sorted(counts, key=_order)
    if not names:
        raise CliError(f"{where}: no row has a label in the column {column!r}.")
    if len(names) < 2 and not is_several:
        raise CliError(f"{where}: every row has the label {names[0]!r}; classification needs two at least.")
    all_differ = len(names) == len(train) and len(train) > 2
    if len(names) > MOST_LABELS or (all_differ and not is_several):
        raise CliError(
            f"{where}: {len(names)} different labels in {len(train)} rows; is {column!r} the label column? "
            "Numbers are learned with --task regression."
        )
    unknown = sorted(counted(held_out).keys() - counts.keys())
    if unknown:
        where = names_of(settings.eval or settings.train)
        raise CliError(f"{where}: label {unknown[0]!r} is not among those of the training rows ({listed(names)}).")
    return {name: counts[name] for name in names}


def counted(examples: Iterable[Example]) -> collections.Counter[str]:
    """How many examples have each label."""
    return collections.Counter(
        label for example in examples for label in ([example.label] if example.labels is None else example.labels)
    )


def counts_in_words(counts: dict[str, int]) -> str:
    """The classes and their training rows, the first of them where they are many."""
    first = [f"{name} {count:,}" for name, count in list(counts.items())[:MOST_LISTED]]
    more = f" and {len(counts) - MOST_LISTED} more" if len(counts) > MOST_LISTED else ""
    return f"{len(counts)} classes, with their training rows: {', '.join(first)}{more}"


def stratified(labels: Sequence[str | None], count: int, seed: int) -> list[int]:
    """Which rows to hold out, at random, so that each class has its share; a class of one row is not held out.

    Args:
        labels: of all rows.
        count: how many rows to hold out.
        seed: of the choice.

    Returns:
        Their places in order; none where there are too few rows for a share of each class.
    """
    rows_of = collections.Counter(labels)
    several = [i for i, label in enumerate(labels) if rows_of[label] > 1]
    split = require("sklearn.model_selection").train_test_split
    kinds = [labels[i] for i in several]
    try:
        return sorted(split(several, test_size=count, stratify=kinds, random_state=seed % 2**32)[1])
    except ValueError:
        return []


def _order(name: str) -> tuple[bool, int, str]:
    is_number = name.isdecimal()
    return not is_number, int(name) if is_number else 0, name
