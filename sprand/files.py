"""Files of sprand: safetensors whose header carries a description as JSON, checked when read, replaced in one step."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write(file: Path, key: str, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and their description, with a checksum, in one atomic step.

    Raises:
        OSError: the file cannot be written; one that was there is untouched.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        save_file(dict(tensors), temporary, metadata={key: json.dumps(description)})


def read(file: Path, key: str, what: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and tensors of a file written by `write`, proven to be undamaged.

    Args:
        file: it exists.
        key: under which the header holds the description.
        what: what the file should be, for the messages.

    Raises:
        ValueError: the file is damaged, or something else.
    """
    try:
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged or no safetensors file ({error}); take another copy of the {what}") from error
    if key not in metadata:
        raise ValueError(f"{file} is no {what} of sprand: its header has no description")
    try:
        description = json.loads(metadata[key])
        stored = description["checksum"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: its description cannot be read; take another copy of the {what}") from error
    if stored != checksum(tensors):
        raise ValueError(f"{file} is damaged: its values do not match their checksum; take another copy of the {what}")
    return description, tensors


def label(path: Path) -> str:
    """A short name for an adapter's place: its folder's, with the one above where that is what `sprand finetune` calls it."""
    parts = path.resolve().parts
    return "/".join(parts[-2:]) if parts[-1] == "adapter" else parts[-1]


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """One hash of names, shapes and values."""
    return digest(part for name in sorted(tensors) for part in (f"{name} {list(tensors[name].shape)}", tensors[name]))


def digest(parts: Iterable[str | Tensor]) -> str:
    """One hash of texts and of the bytes of tensors."""
    result = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, str):
            result.update(part.encode())
        elif part.numel():
            part = part.detach().cpu().contiguous()
            result.update((ctypes.c_char * part.nbytes).from_address(part.data_ptr()))
    return result.hexdigest()


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary file beside `file` that takes its place when the block ends well, and is gone when it does not."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
