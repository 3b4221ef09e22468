"""Where an adapter that a pool is given lies: a path, or the cache of the Hugging Face Hub after it was fetched."""

from __future__ import annotations

import os
from pathlib import Path

from ..adapters.file import CONFIG_FILE, WEIGHTS_FILE


def located(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder or file of an adapter on this machine; `owner/name` is fetched from the Hub where no such path exists.

    Raises:
        FileNotFoundError: There is no such path, and nothing could be fetched.
        ValueError: A revision is given for a path.
    """
    here = Path(path)
    if here.exists() or not _is_hub_name(path):
        if revision is not None:
            raise ValueError(f"revision: expected one for a name on the Hub alone, got {revision!r} for the path {path}")
        return here
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(os.fspath(path), revision=revision, allow_patterns=[WEIGHTS_FILE, CONFIG_FILE]))
    except Exception as error:  # not installed, offline, unknown, private, gated: the Hub's client has a class for each
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"no adapter at {path}: no such folder, and it could not be fetched from the Hub ({reason})"
        ) from error


def _is_hub_name(path: str | os.PathLike[str]) -> bool:
    name = os.fspath(path)
    return name.count("/") == 1 and name[0] not in "./~" and not name.endswith(("/", ".safetensors"))
