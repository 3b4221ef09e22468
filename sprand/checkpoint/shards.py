"""A checkpoint on disk as its headers tell it: which tensors it has and where their bytes lie. No weight is read for that."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.described import header_of, parse, read_json
from ..files.forms import OBJECT, SHAPE, TEXT, is_whole, optional, record, simple, table_of

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CHUNK = 1 << 21  # bytes read at a time: what stays in a core's cache between reading, patching and writing
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
_OFFSETS = simple("two offsets", lambda value: isinstance(value, list) and len(value) == 2 and all(map(is_whole, value)))
_TENSOR = record({"dtype": TEXT, "shape": SHAPE, "data_offsets": _OFFSETS})
_INDEX = record({"weight_map": table_of(TEXT)}, {"metadata": optional(OBJECT)})
TRAINABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint.

    Attributes:
        name: its name in the checkpoint.
        file: the file that holds it, relative to the folder.
        code: its dtype in the words of safetensors, `"BF16"`.
        shape: its shape.
        begin, end: where its bytes lie in the file.
    """

    name: str
    file: str
    code: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def dtype(self) -> torch.dtype | None:
        """Its dtype, or None where torch has none for it."""
        return DTYPES.get(self.code)

    @property
    def numel(self) -> int:
        """How many entries it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its header, and its tensors in the order of their bytes."""

    name: str
    path: Path
    header: dict[str, Any]
    data: int
    size: int
    tensors: tuple[Stored, ...]


@dataclass
class Checkpoint:
    """The safetensors files of one model.

    Attributes:
        folder: where they lie.
        shards: the files by name, in the order of the index.
        tensors: every tensor by name.
        index: the content of `model.safetensors.index.json`, or None where there is one file.
        config: the content of `config.json`, empty where there is none.
    """

    folder: Path
    shards: dict[str, Shard]
    tensors: dict[str, Stored]
    index: dict[str, Any] | None = None
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def tied(self) -> bool:
        """Whether its configuration says that input and output embedding are one weight."""
        inner = self.config.get("text_config")
        configs = (self.config, inner if isinstance(inner, dict) else {})
        said = [config["tie_word_embeddings"] for config in configs if "tie_word_embeddings" in config]
        return bool(said and said[0])

    def read(self, name: str) -> Tensor:
        """A tensor, flat, with its own memory."""
        stored = self.tensors[name]
        parts = [part.clone() for part, _ in self.chunks(name)]
        return torch.cat(parts) if parts else torch.empty(0, dtype=stored.dtype)

    def chunks(self, name: str) -> Iterator[tuple[Tensor, int]]:
        """The entries of a tensor, flat, in parts that each next one overwrites, with the position of the first.

        They are bytes where torch has no dtype for the tensor.
        """
        stored = self.tensors[name]
        dtype = stored.dtype or torch.uint8
        with open(self.folder / stored.file, "rb", buffering=0) as file:
            buffer = bytearray(min(CHUNK, stored.end - stored.begin))
            for begin, content in read_range(file.fileno(), buffer, stored.begin, stored.end):
                yield torch.frombuffer(content, dtype=dtype), (begin - stored.begin) // dtype.itemsize


def read_range(handle: int, buffer: bytearray, begin: int, end: int) -> Iterator[tuple[int, memoryview]]:
    """The bytes of a file from `begin` to `end`, as views of a buffer that each next one overwrites, with their positions.

    Raises:
        OSError: The file ends before.
    """
    view = memoryview(buffer)
    while begin < end:
        part = view[: min(len(view), end - begin)]
        done = 0
        while done < len(part):
            count = os.preadv(handle, [part[done:]], begin + done)
            if count == 0:
                raise OSError(f"a file became shorter while it was read: expected {end:,} bytes, got {begin + done:,}")
            done += count
        yield begin, part
        begin += done


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the headers of a checkpoint.

    Args:
        path: a folder with `model.safetensors`, or with `model.safetensors.index.json` and the files that it names; or one
            `.safetensors` file.

    Raises:
        FileNotFoundError: There is no checkpoint, or a file of the index is missing.
        ValueError: A file is damaged, or the index and the files do not agree.
    """
    given = Path(path)
    folder = given if given.is_dir() else given.parent
    index = None if given.is_file() or (folder / SINGLE).is_file() else _read_index(given, folder)
    if index is not None:
        names = list(dict.fromkeys(index["weight_map"].values()))
    else:
        names = [given.name if given.is_file() else SINGLE]
    shards = {name: _shard(folder, name) for name in names}
    tensors = {stored.name: stored for shard in shards.values() for stored in shard.tensors}
    if index is not None:
        _prove_index(folder, index["weight_map"], shards, tensors)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return Checkpoint(folder, shards, tensors, index, config)


def _read_index(given: Path, folder: Path) -> dict[str, Any]:
    """The index of a checkpoint of several files.

    Raises:
        FileNotFoundError: There is no index.
        ValueError: The index is damaged.
    """
    file = folder / INDEX
    if not file.is_file():
        others = sorted(other.name for other in folder.glob("*.safetensors")) if folder.is_dir() else []
        hint = f"; give one of its files by name ({', '.join(others[:3])})" if others else ""
        raise FileNotFoundError(f"no checkpoint at {given}: expected {SINGLE} or {INDEX} there{hint}")
    return read_json(file, _INDEX)


def _shard(folder: Path, name: str) -> Shard:
    if Path(name).name != name:
        raise ValueError(f"{folder / INDEX} is damaged: expected names of files beside it, got {name!r}")
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder / name} is missing, which {INDEX} names; download the checkpoint again")
    return read_header(folder / name)


def _prove_index(folder: Path, weight_map: Mapping[str, str], shards: Mapping[str, Shard], tensors: Mapping[str, Stored]) -> None:
    """Prove that the index and the files hold the same tensors, each of them once.

    Raises:
        ValueError: They do not agree.
    """
    wrong = [name for name, file in weight_map.items() if name not in tensors or tensors[name].file != file]
    if wrong or len(tensors) != sum(len(shard.tensors) for shard in shards.values()):
        what = wrong[0] if wrong else "which tensors there are"
        raise ValueError(f"{folder}: the index and the files do not agree on {what}")


def read_header(path: Path) -> Shard:
    """The header of one safetensors file, proven to describe the bytes that follow it.

    Raises:
        ValueError: The file is damaged, or of another kind.
    """
    size = path.stat().st_size
    try:
        text = header_of(path)
        header = parse(text)
        data = 8 + len(text)
        tensors = _stored(path.name, header, data)
        end = _prove_gapless(tensors, data)
        if end != size:
            raise ValueError(f"expected {end:,} bytes, got {size:,}")
    except ValueError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); take another copy of it") from error
    return Shard(path.name, path, header, data, size, tensors)


def _stored(file: str, header: Any, data: int) -> tuple[Stored, ...]:
    """The tensors of a header, in the order of their bytes, which begin at `data`."""
    OBJECT("the header", header)
    tensors = []
    for name, entry in header.items():
        if name == "__metadata__":
            table_of(TEXT)(name, entry)
            continue
        _TENSOR(name, entry)
        begin, end = entry["data_offsets"]
        tensors.append(Stored(name, file, entry["dtype"], tuple(entry["shape"]), data + begin, data + end))
    return tuple(sorted(tensors, key=lambda stored: (stored.begin, stored.end)))


def _prove_gapless(tensors: Iterable[Stored], data: int) -> int:
    """Prove that tensors follow each other from `data` on, and return where the last one ends."""
    at = data
    for stored in tensors:
        expected = at + stored.numel * stored.dtype.itemsize if stored.dtype is not None else stored.end
        if stored.begin != at or stored.end != expected or stored.end < at:
            raise ValueError(f"the bytes of {stored.name} do not follow")
        at = stored.end
    return at
