"""What commands share: places by path or Hub name, folders to write to, adapters with weights, a progress bar, errors, JSON."""

from __future__ import annotations

import errno
import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from . import CliError, WorkFailed, require

T = TypeVar("T")
FAULTS_OF_A_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


@contextmanager
def failing_in_words() -> Iterator[None]:
    """Turn what files and their content can do wrong into the command's own error; a full or broken disk is no wrong usage."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, ValueError, ModuleNotFoundError) as error:
        kind = WorkFailed if isinstance(error, OSError) and error.errno in FAULTS_OF_A_DISK else CliError
        raise kind(f"{' '.join(str(error).split()).removesuffix('.')}.") from error


def reason_of(error: Exception) -> str:
    """What another package says is wrong, in one line, to end a sentence with."""
    return textwrap.shorten(str(error), 300, placeholder=" ...").removesuffix(".")


def print_json(said: Any, **more: Any) -> None:
    """Print a result, a dataclass with a `folder`, as one JSON object.

    Args:
        said: the folder is called `out` in what is printed.
        more: further members.
    """
    content = asdict(said)
    print(json.dumps({"out": str(content.pop("folder")), **content, **more}, indent=2))


def folder_of(name: str, patterns: tuple[str, ...] | None = None) -> Path:
    """A path that exists, or the folder where a model of the Hub lies after it was fetched.

    Args:
        name: a path, or `owner/name`.
        patterns: which files of the Hub are wanted; all of them by default.

    Raises:
        CliError: The name is neither.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    return Path(from_hub(name, lambda hub: hub.snapshot_download(name, allow_patterns=patterns)))


def from_hub(name: str, fetch: Callable[[Any], T]) -> T:
    """What `fetch` gets of a model on the Hub, by its client.

    Raises:
        CliError: The name is none of the Hub's, or nothing could be fetched.
    """
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        hint = "" if "/" in name else " A model on the Hub is named owner/name."
        raise CliError(f"No file or folder {name}.{hint}")
    try:
        hub = require("huggingface_hub")
        require("huggingface_hub.utils")  # the package has it as an attribute only after that
        if not sys.stderr.isatty():
            hub.utils.disable_progress_bars()
        return fetch(hub)
    except Exception as error:  # not installed, offline, unknown, private, gated: the Hub's client has a class for each
        raise CliError(f"No file or folder {name}, and it could not be fetched from the Hub: {reason_of(error)}.") from None


def adapter_and_weight(text: str) -> tuple[Path, float]:
    """The folder and the weight of a text `PATH:WEIGHT`, or of a path, whose weight is 1."""
    path, colon, number = text.rpartition(":")
    if colon and not Path(text).exists():
        try:
            return folder_of(path), float(number)
        except ValueError:
            pass
    return folder_of(text), 1.0


def prepare_folder(out: Path) -> None:
    """Make an output folder and prove that files can be written there.

    Raises:
        CliError: They cannot be written.
    """
    probe = out / ".sprand-probe"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise CliError(f"--out {out}: cannot be written: {error.strerror}.") from None


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows bytes as they are done, in a terminal and where rich is installed; the function it gives counts them."""
    try:
        rich = require("rich.progress") if sys.stderr.isatty() else None
    except CliError:
        rich = None
    if rich is None:
        yield lambda count: None
        return
    console = require("rich.console").Console(stderr=True)
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.DownloadColumn(),
        rich.TransferSpeedColumn(),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task(what, total=total)
        yield lambda count: shown.advance(task, count)
