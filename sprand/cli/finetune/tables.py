"""Files of text: CSV, TSV and JSON row by row, and plain text; nothing is guessed, and what is wrong is said with its line."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import infer_compression

from .. import CliError, require

TABLES = (".tsv", ".csv", ".jsonl", ".ndjson", ".json")
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
HEAD = 100  # rows that tell which columns there are
LARGEST_CELL = 2**31 - 1
Row = dict[str, Any]


@dataclasses.dataclass
class Table:
    """Rows and their columns.

    Attributes:
        name: of the file, for what is said about it.
        columns: of the header, or of the first rows.
        rows: read as they are taken.
        delimited: whether it is CSV or TSV, which hold nothing but text.
    """

    name: str
    columns: list[str]
    rows: Iterable[Row]
    delimited: bool = False

    def peek(self) -> list[Row]:
        """The first rows, which stay to be read."""
        rows = iter(self.rows)
        head = list(itertools.islice(rows, HEAD))
        self.rows = itertools.chain(head, rows)
        return head


def suffix_of(path: Path) -> str:
    """The suffix in small letters that says what a file is, that of a compressed one included."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def is_table(path: Path) -> bool:
    """Whether a file is a table of text, by its suffix."""
    return suffix_of(path) in TABLES


def open_table(path: Path) -> Table:
    """The table in a TSV (no quoting), CSV (quoted), JSON or JSON Lines file.

    Raises:
        CliError: The file cannot be read as such; rows that come later may raise it as well.
    """
    prove_not_empty(path)
    suffix = suffix_of(path)
    if suffix in (".csv", ".tsv"):
        rows = _delimited(path, suffix == ".csv")
        table = Table(str(path), next(rows), rows, delimited=True)
    else:
        table = Table(str(path), [], _json_rows(path))
        table.columns = list(dict.fromkeys(name for row in table.peek() for name in row))
    if not table.peek():
        raise CliError(f"{path}: {'the header is there, but no rows follow' if table.delimited else 'there are no rows'}.")
    return table


def read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and rows of a TSV, CSV or JSON file, every value as text; what is null is left out.

    Raises:
        CliError: The file cannot be read as such.
    """
    table = open_table(path)
    return table.columns, [{name: text_of(value) for name, value in row.items() if value is not None} for row in table.rows]


def text_of(value: Any) -> str | None:
    """A value as text: JSON of what is none; None for null and for a number that is NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return value if isinstance(value, str) else json.dumps(value, default=str)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file that is not empty.

    Raises:
        CliError: There is no such file, or it is not readable, not UTF-8, or empty.
    """
    text = "".join(lines_of(path))
    if not text.strip():
        raise CliError(f"{path}: the file is empty; expected rows below a header, or text.")
    return text


def prove_not_empty(path: Path) -> None:
    """Read as far as the first line that is not blank.

    Raises:
        CliError: There is none, or the file cannot be read.
    """
    if not any(line.strip() for line in lines_of(path)):
        raise CliError(f"{path}: the file is empty; expected rows below a header, or text.")


def check_columns(path: Path | str, columns: Sequence[str], names: Mapping[str, str | None]) -> None:
    """Prove that a table has the columns of these names, each given by the option that names it.

    Raises:
        CliError: A column is not there.
    """
    for option, name in names.items():
        if name is not None and name not in columns:
            raise CliError(f"{path}: no column {name!r}, only {listed(columns)}. Name it with {option}.")


def listed(names: Sequence[str], most: int = 12) -> str:
    """Names in quotes, the first of them where they are many."""
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def lines_of(path: Path, newline: str | None = "") -> Iterator[str]:
    """The lines of a UTF-8 file, uncompressed by its suffix.

    Raises:
        CliError: There is no such file, or it is not readable or not UTF-8.
    """
    try:
        with _file(path, "rt", encoding="utf-8-sig", newline=newline) as file:
            for line in file:
                if "\0" in line:
                    raise CliError(f"{path}: this is a binary file; expected text, TSV, CSV, JSON, parquet or arrow.")
                yield line
    except CliError:
        raise
    except UnicodeDecodeError:
        raise CliError(f"{path}: not UTF-8 ({_undecodable(path)}). Convert it first, with iconv say.") from None
    except Exception as error:  # of the disk, and each compression has its own
        raise CliError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from None


def _file(path: Path, mode: str, **options: Any) -> Any:
    if path.suffix.lower() == ".zst":  # by Arrow, which says where such a file breaks off; zstandard reads what is there
        stream = require("pyarrow").input_stream(str(path), compression="zstd")
        return io.TextIOWrapper(stream, **options) if "t" in mode else stream
    return LocalFileSystem().open(str(path), mode, compression=infer_compression(path.name), **options)


def _undecodable(path: Path) -> str:
    """The first byte that is not UTF-8, and where it is."""
    start = 0
    with _file(path, "rb") as lines:
        for line in lines:
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"byte {start + error.start} is 0x{line[error.start]:02x}"
            start += len(line)
    return "its end is missing"


def _delimited(path: Path, quoted: bool) -> Iterator[Any]:
    """The columns, and then each row."""
    csv.field_size_limit(LARGEST_CELL)
    style = {"strict": True} if quoted else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(lines_of(path, newline="" if quoted else None), **style)
    try:
        columns = next(filter(None, reader))
        if len(set(columns)) != len(columns):
            raise CliError(f"{path}: two columns of the header have the same name: {listed(columns)}.")
        yield columns
        for values in reader:
            if values and len(values) != len(columns):
                expected = f"expected {len(columns)} columns as in the header, got {len(values)}"
                raise CliError(f"{path}, line {reader.line_num}: {expected}.")
            if values:
                yield dict(zip(columns, values, strict=True))
    except csv.Error as error:
        raise CliError(f"{path}, line {reader.line_num}: {error}.") from None


def _json_rows(path: Path) -> Iterator[Row]:
    """Objects, one a line, or those of a list that is the whole file."""
    lines = enumerate(lines_of(path), 1)
    first = next(pair for pair in lines if pair[1].strip())
    if first[1].lstrip().startswith("[") and suffix_of(path) == ".json":
        yield from _listed_rows(path, "".join((first[1], *(line for _, line in lines))))
        return
    for number, line in itertools.chain([first], lines):
        if line.strip():
            place = f"{path}, line {number}"
            yield _object(_parsed(line, place), place)


def _listed_rows(path: Path, text: str) -> Iterator[Row]:
    for number, fields in enumerate(_parsed(text, str(path)), 1):
        yield _object(fields, f"{path}, row {number}")


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise CliError(f"{place}: not JSON ({error.msg}); expected one object per line, or a list of objects.") from None
    except KeyError as error:
        raise CliError(f"{place}: the name {error} stands twice in one object.") from None


def _object(fields: Any, place: str) -> Row:
    if not isinstance(fields, dict):
        raise CliError(f"{place}: expected a JSON object, got {type(fields).__name__}.")
    return fields


def _once(pairs: list[tuple[str, Any]]) -> Row:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise KeyError(next(name for name in names if names.count(name) > 1))
    return fields
