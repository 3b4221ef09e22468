"""What a row of data holds, and many rows in a temporary file of Arrow instead of in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .. import require

T = TypeVar("T")
LOCK = "in-use.lock"
BATCH = 1000  # rows that are read or tokenised at once
Message = dict[str, Any]
_numbers = itertools.count()


@dataclasses.dataclass(frozen=True)
class Example:
    """One row: a text to classify (or a pair), a text to learn, a prompt and its completion, or a conversation.

    Attributes:
        text, text2: the text and what goes with it, or prompt and completion.
        label: name of the class, or the number, as text.
        labels: names of the classes of a row that may have several.
        messages: the turns of a conversation, as chat templates take them; `weight` 0 means that a turn is not learned.
        tools: what the chat template is told of tools.
        ends: whether an end token follows a text that is learned; a file of plain text has none.
    """

    text: str = ""
    text2: str | None = None
    label: str | None = None
    labels: list[str] | None = None
    messages: list[Message] | None = None
    tools: list[Any] | None = None
    ends: bool = True


class Rows(Sequence[T]):
    """Rows of a data set of the library `datasets`, read when they are asked for; a slice of them is a list.

    Args:
        dataset: a `datasets.Dataset`.
        read: makes a row of its columns.
    """

    def __init__(self, dataset: Any, read: Callable[[dict[str, Any]], T] = dict) -> None:
        self.dataset, self._read = dataset, read

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return list(self._of_batch(self.dataset[index]))
        return self._read(self.dataset[index])

    def __iter__(self) -> Iterator[T]:
        for batch in self.dataset.iter(BATCH):
            yield from self._of_batch(batch)

    def _of_batch(self, batch: dict[str, list[Any]]) -> Iterator[T]:
        for values in zip(*batch.values(), strict=True):
            yield self._read(dict(zip(batch, values, strict=True)))

    def take(self, indices: Sequence[int]) -> Rows[T]:
        """The rows at these places, in their order."""
        return Rows(self.dataset.select(indices), self._read)


def stored(rows: Iterable[dict[str, Any]], columns: Any = None) -> Sequence[dict[str, Any]]:
    """Write rows into a file that goes with this process.

    Args:
        rows: a value for each column.
        columns: their types, `datasets.Features`; by default those of the first rows.
    """
    first = next(rows := iter(rows), None)
    if first is None:
        return []
    datasets = require("datasets")
    file = temporary_folder() / f"{next(_numbers)}.arrow"
    with require("datasets.arrow_writer").ArrowWriter(path=str(file), features=columns) as writer:
        writer.write(first)
        for row in rows:
            writer.write(row)
        writer.finalize()
    return Rows(datasets.Dataset.from_file(str(file)))


def stored_examples(examples: Iterable[Example]) -> Rows[Example]:
    """Write examples into such a file; conversations stand in it as JSON, so that no type is guessed."""
    datasets = require("datasets")
    columns = datasets.Features({field.name: datasets.Value("large_string") for field in dataclasses.fields(Example)})
    columns["ends"] = datasets.Value("bool")
    rows = stored(({name: _packed(getattr(example, name)) for name in columns} for example in examples), columns)
    return Rows(rows.dataset, _unpacked)


def temporary_folder() -> Path:
    """A folder that goes with this process; those of processes that were killed go first."""
    return Path(_folder()[0].name)


@functools.cache
def _folder() -> tuple[tempfile.TemporaryDirectory[str], Any]:
    """A new folder, and the lock in it, which the system opens when this process ends."""
    locks = require("filelock")
    for left in Path(tempfile.gettempdir()).glob(f"sprand-*/{LOCK}"):
        with contextlib.suppress(OSError, locks.Timeout), locks.FileLock(left, timeout=0):
            shutil.rmtree(left.parent, ignore_errors=True)
    folder = tempfile.TemporaryDirectory(prefix="sprand-")
    lock = locks.FileLock(Path(folder.name) / LOCK)
    lock.acquire()
    return folder, lock


def take(rows: Sequence[T], indices: Sequence[int]) -> Sequence[T]:
    """The rows at these places, in their order."""
    return rows.take(indices) if isinstance(rows, Rows) else [rows[i] for i in indices]


def limited(rows: Sequence[T], count: int | None, source: random.Random) -> Sequence[T]:
    """A random `count` of the rows; all where it is None or larger."""
    return rows if count is None or count >= len(rows) else take(rows, source.sample(range(len(rows)), count))


def batched(rows: Sequence[T]) -> Iterable[Sequence[T]]:
    """The rows in lists of `BATCH`; the last one may be shorter."""
    return (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))


def _packed(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list) else value


def _unpacked(row: dict[str, Any]) -> Example:
    lists = {name: json.loads(row[name]) for name in ("labels", "messages", "tools") if row[name] is not None}
    return Example(**row | lists)
