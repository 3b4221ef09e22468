"""What `--train` and `--eval` name: files, globs, folders of the library `datasets`, and data sets on the Hub."""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .. import CliError, require
from ..files import reason_of
from .rows import temporary_folder
from .tables import TABLES, Row, Table, is_table, listed, open_table, suffix_of

T = TypeVar("T")
BUILDERS = {".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow"}
KNOWN = (*TABLES, *BUILDERS, ".txt")
SPLITS = {"train": ("train",), "eval": ("validation", "valid", "dev", "test")}
Names = str | Path | Sequence[str | Path]


def names_of(given: Names) -> str:
    """What an option names, to say something about it."""
    return ", ".join(map(str, given)) if isinstance(given, (tuple, list)) else str(given)


def sources(given: Names, part: str) -> list[Table | Path]:
    """The tables that an option names, and the files of plain text.

    Args:
        given: a name, or several.
        part: "train" or "eval": which split is taken of a folder or a data set that has several.

    Raises:
        CliError: There is no such thing, or it cannot be read.
    """
    names = given if isinstance(given, (tuple, list)) else [given]
    return [source for name in names for source in _named(str(name), part)]


def _named(name: str, part: str) -> list[Table | Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        return _of_folder(path, part)
    if path.exists() or not glob.has_magic(name):
        is_hub_name = not path.exists() and name.count("/") == 1 and name[0] not in "./~" and suffix_of(path) not in KNOWN
        return [_of_hub(name, part) if is_hub_name else _of_file(path)]
    found = sorted(glob.glob(str(path), recursive=True))
    if not found:
        raise CliError(f"{name}: no file has such a name.")
    return [source for other in found for source in _named(other, part)]


def _of_file(path: Path) -> Table | Path:
    if is_table(path):
        return open_table(path)
    if not path.exists() or suffix_of(path) not in BUILDERS:
        return path
    builder, cache = BUILDERS[suffix_of(path)], tempfile.mkdtemp(dir=temporary_folder())
    return _table(str(path), _loaded(str(path), builder, data_files=str(path), split="train", cache_dir=cache))


def _of_folder(path: Path, part: str) -> list[Table | Path]:
    """The rows that `datasets` saved there, or the files that it would find."""
    datasets, of_files = require("datasets"), require("datasets.data_files")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = datasets.load_from_disk(str(path))
        return [_table(str(path), _split(str(path), saved, part) if isinstance(saved, dict) else saved)]
    try:
        patterns = of_files.get_data_patterns(str(path))
        found = of_files.DataFilesDict.from_patterns(patterns, base_path=str(path))
    except FileNotFoundError:
        found = {}
    files = {split: [Path(file) for file in names if suffix_of(Path(file)) in KNOWN] for split, names in found.items()}
    splits = {split: names for split, names in files.items() if names}
    if not splits:
        raise CliError(f"{path}: cannot be read: Is a directory, and holds no file of data ({', '.join(KNOWN)}).")
    return [_of_file(file) for file in _split(str(path), splits, part)]


def _of_hub(name: str, part: str) -> Table:
    place, _, subset = name.partition(":")
    return _table(name, _split(name, _loaded(name, place, *([subset] if subset else [])), part))


def _loaded(name: str, *arguments: str, **options: Any) -> Any:
    """What `datasets.load_dataset` makes of its arguments.

    Raises:
        CliError: It cannot.
    """
    datasets = require("datasets")
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(*arguments, **options)
    except Exception as error:  # damaged, offline, unknown, private, gated, of several subsets: each has a class of its own
        what = "cannot be read" if options else "no file or folder, and it could not be fetched from the Hub"
        raise CliError(f"{name}: {what}: {reason_of(error.__cause__ or error)}.") from None


def _split(name: str, splits: Mapping[str, T], part: str) -> T:
    """The split for a part, or the only one."""
    wanted = [split for split in SPLITS[part] if split in splits]
    if not wanted and len(splits) > 1:
        raise CliError(f"{name}: expected a split {' or '.join(SPLITS[part])}, got {listed([*splits])}.")
    return splits[wanted[0]] if wanted else next(iter(splits.values()))


def _table(name: str, dataset: Any) -> Table:
    """The rows of a `datasets.Dataset`; numbers of classes become their names, and media are left out."""
    kept = dataset.select_columns([name for name, feature in dataset.features.items() if not hasattr(feature, "decode")])
    if not len(kept):
        raise CliError(f"{name}: there are no rows.")
    return Table(name, list(kept.column_names), _rows(kept))


def _rows(dataset: Any) -> Iterator[Row]:
    classes = {name: feature.names for name, feature in dataset.features.items() if hasattr(feature, "int2str")}
    for batch in dataset.iter(1000):
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            for name, names in classes.items():
                number = row[name]
                row[name] = None if number is None or number < 0 else names[number]
            yield row
