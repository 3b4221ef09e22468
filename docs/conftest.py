"""Runs what the pages show: the blocks of a page in their order, in one namespace and one folder of its own (pytest docs).

A ```python block is executed; with `title="train.py"` it is written to that file instead. A ```bash block is run line by line.
Set-up that a reader need not see stands in `<!--- invisible-code-block: python` comments. A block that needs a package that is
missing is skipped by `<!--- skip: next if(...), reason="..." -->`, with its reason.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from sybil import Document, Example, Region, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

from sprand.cli.main import run as sprand_command

ROOT = Path(__file__).resolve().parent.parent
KNOWN = re.compile(r'\s*```(python( title="[^"]+")?|bash|console|text|yaml|bibtex|)$')
TITLED = RawFencedCodeBlockLexer(re.compile(r'python title="(?P<title>[^"]+)"$\n', re.MULTILINE))

sys.path.insert(0, str(ROOT / "tests"))  # tiny_models, for the hidden blocks


def enter(namespace: dict[str, Any]) -> None:
    """A folder for the page, the same seeds for every page, and what its conditions ask."""
    random.seed(0)
    torch.manual_seed(0)
    namespace |= {"_before": os.getcwd(), "_folder": tempfile.mkdtemp(), "missing": lambda name: find_spec(name) is None}
    os.chdir(namespace["_folder"])


def leave(namespace: dict[str, Any]) -> None:
    """Drop the page's folder."""
    os.chdir(namespace["_before"])
    shutil.rmtree(namespace["_folder"], ignore_errors=True)


def titled_files(document: Document) -> Iterator[Region]:
    """Blocks with a file name, which are written instead of run. A block of an unknown kind is refused: it would not be run."""
    for line in document.text.splitlines():
        if line.lstrip().startswith("```") and not KNOWN.match(line):
            raise ValueError(f"{document.path}: a block begins with {line.strip()!r}; expected one that matches {KNOWN.pattern}")
    for region in TITLED(document):
        yield Region(region.start, region.end, (region.lexemes["title"], str(region.lexemes["source"])), write_file)


def write_file(example: Example) -> None:
    """Write the block to the file of its title, in the page's folder."""
    name, source = example.parsed
    Path(name).write_text(source)


def run_line(line: str, environment: dict[str, str], again: bool = True) -> int:
    """The line's exit code. A `torchrun` that Gloo aborted while Python was ending is run once more.

    torch keeps the Gloo threads of an FSDP2 model after destroy_process_group, also without sprand; one that frees a tensor while
    the interpreter ends aborts the process, with this one sentence (https://github.com/pytorch/pytorch/pull/179291).
    """
    command = ["bash", "-euo", "pipefail", "-c", line]
    done = subprocess.run(command, env=environment, timeout=300, check=False, capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="\n")
    aborted = done.returncode and "terminate called without an active exception" in done.stderr
    if again and aborted and line.startswith("torchrun"):
        print(f"once more: {line}")
        return run_line(line, environment, again=False)
    return done.returncode


def run_shell(example: Example) -> str | None:
    """Run the block line by line: `sprand` in this process, which has imported everything already, all else by bash."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for line in str(example.parsed).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        code = sprand_command(words[1:]) if words[:1] == ["sprand"] else run_line(line, environment)
        if code:
            return f"exit code {code}: {line}"
    return None


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), CodeBlockParser("bash", run_shell), titled_files, SkipParser()],
    patterns=["*.md"],
    excludes=["recipes/*.md"],
    setup=enter,
    teardown=leave,
).pytest()
