"""Files of sprand: safetensors whose header carries a description as JSON, checked when read, replaced in one step."""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from .atomic import replacing
from .forms import OBJECT, TEXT, Form, record

CHECKSUM, HEADER_CHECKSUM, SEALED = "checksum", "header_checksum", "sealed"  # files of earlier versions have the first alone
LONGEST_HEADER = 100_000_000  # what the safetensors library accepts
LAST_SPREAD = 2  # objects in objects that a JSON file spreads over lines
MOST_TENSORS = 1 << 18  # of one file; the largest models have a third of that in all


def write(file: Path, key: str, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and their description in one atomic step.

    The file has `checksum`, of the tensors, `header_checksum`, of the description and the dtypes, and `sealed`, which says that
    there is such a one.

    Raises:
        OSError: the file cannot be written; one that was there is untouched.
    """
    sealed = {**description, CHECKSUM: checksum(tensors), SEALED: True}
    sealed[HEADER_CHECKSUM] = _header_checksum(sealed, tensors)
    save(file, tensors, {key: json.dumps(sealed, separators=(",", ":"))})


def save(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in one atomic step; its folder is made if it is not there.

    Raises:
        OSError: the file cannot be written; one that was there is untouched.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata=dict(metadata))
        except SafetensorError as error:
            raise OSError(f"{file} could not be written: {error}") from error


def write_json(file: Path, content: Any) -> None:
    """Write JSON in one atomic step; objects in objects are a line each.

    Raises:
        OSError: the file cannot be written; one that was there is untouched.
    """
    with replacing(file) as temporary:
        temporary.write_text(_in_lines(content) + "\n", encoding="utf-8")


def _in_lines(content: Any, depth: int = 0) -> str:
    if not isinstance(content, dict) or not content or depth == LAST_SPREAD:
        return json.dumps(content)
    outer = "  " * depth
    lines = [f"{outer}  {json.dumps(name)}: {_in_lines(value, depth + 1)}" for name, value in content.items()]
    return "\n".join(["{", ",\n".join(lines), f"{outer}}}"])


def read_json(file: Path, form: Form = OBJECT) -> dict[str, Any]:
    """The object of a JSON file, of a form.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds something else.
    """
    try:
        content = parse(file.read_text(encoding="utf-8"))
        form("its content", content)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    return content


def read(file: Path, key: str, what: str, form: Form | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and tensors of a file written by `write`, proven to be undamaged.

    Args:
        file: what to read.
        key: under which the header holds the description.
        what: what the file should be, for the messages.
        form: what the description must look like.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or something else.
    """
    metadata, tensors = contents(file, what)
    if key not in metadata:
        raise ValueError(f"{file} is no {what} of sprand: its header has no description")
    return proven(file, metadata[key], tensors, what, form), tensors


def contents(file: Path, what: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and tensors of a safetensors file, whoever wrote it.

    The file is read into memory, not mapped: what happens to it meanwhile, or afterwards, makes a damaged read at worst.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or something else.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no {what} at {file}: expected a file there")
    try:
        content = file.read_bytes()
        header = header_in(io.BytesIO(content), len(content))
        tensors = load(content)
        return json.loads(header).get("__metadata__") or {}, tensors
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError, LookupError) as error:
        raise ValueError(f"{file} is damaged or no safetensors file ({error}); take another copy of the {what}") from error


def proven(file: Path, text: str, tensors: Mapping[str, Tensor], what: str, form: Form | None = None) -> dict[str, Any]:
    """The description in a header, proven to be that of the tensors.

    Raises:
        ValueError: The description or a tensor is damaged, or the description has another form.
    """
    try:
        description = parse(text)
        record({CHECKSUM: TEXT}, {HEADER_CHECKSUM: TEXT})("its description", description)
        sealed = _header_checksum(description, tensors) if SEALED in description else None
        if description.get(HEADER_CHECKSUM) != sealed:
            raise ValueError("its header does not match its checksum")
        if description[CHECKSUM] != checksum(tensors):
            raise ValueError("its values do not match their checksum")
        if form is not None:
            form("its description", description)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}; take another copy of the {what}") from error
    return description


def label(path: Path) -> str:
    """A short name for an adapter's place: its folder's, with the one above where that is what `sprand finetune` calls it."""
    parts = path.resolve().parts
    return "/".join(parts[-2:]) if parts[-1] == "adapter" else parts[-1]


def header_of(file: Path) -> bytes:
    """The header of a safetensors file, as JSON that no parser has seen; bounds what one will make of it.

    Raises:
        ValueError: The file has no header, or one that names too many tensors.
    """
    with open(file, "rb") as content:
        return header_in(content, file.stat().st_size)


def header_in(content: BinaryIO, size: int) -> bytes:
    """As `header_of`, of an open file that has `size` bytes."""
    length = int.from_bytes(content.read(8), "little")
    if not 2 <= length <= min(size - 8, LONGEST_HEADER):
        raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
    text = content.read(length)
    count = text.count(b"data_offsets")
    if count > MOST_TENSORS:
        raise ValueError(f"it holds {count:,} tensors, more than {MOST_TENSORS:,}")
    return text


def parse(text: str | bytes) -> Any:
    """JSON from a file.

    Raises:
        ValueError: The text is no JSON, holds a number that is not finite, or is nested too deeply.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"expected JSON, got the number {constant}")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("expected JSON, got one that is nested too deeply") from None


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """One hash of names, shapes and values."""
    return digest(part for name in sorted(tensors) for part in (f"{name} {list(tensors[name].shape)}", tensors[name]))


def digest(parts: Iterable[str | Tensor]) -> str:
    """One hash of texts and of the bytes of tensors."""
    result = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, str):
            result.update(part.encode("utf-8", "surrogatepass"))
        elif part.numel():
            part = part.detach().cpu().contiguous()
            result.update((ctypes.c_char * part.nbytes).from_address(part.data_ptr()))
    return result.hexdigest()


def _header_checksum(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """One hash of all of a description but itself, and of the dtypes of the tensors."""
    rest = {name: value for name, value in description.items() if name != HEADER_CHECKSUM}
    dtypes = [f"{name} {tensors[name].dtype}" for name in sorted(tensors)]
    return digest([json.dumps(rest, sort_keys=True), *dtypes])
