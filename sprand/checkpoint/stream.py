"""Writes a safetensors file again with some tensors changed, a part at a time, and compares a file with what it should be."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .shards import CHUNK, CODES, Shard, Stored, read_range

FICLONE = 0x40049409  # of Linux: let a file share the blocks of another
PIECE = 1 << 20  # bytes of a write: for 2 MiB Linux seeks pages of that size, which it may first have to make
WRITE_OUT = 2  # of Linux's sync_file_range: begin, and do not wait
Progress = Callable[[int], None]
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)


class Change(Protocol):
    """What happens to a tensor, part by part."""

    stored: Stored

    def touches(self, first: int, count: int) -> bool:
        """Whether any of `count` entries from `first` on change."""

    def __call__(self, part: Tensor, first: int) -> None:
        """Change a part, flat, in place."""

    def finish(self) -> None:
        """All parts are done."""


def write(
    shard: Shard,
    target: Path,
    changes: Mapping[str, Change],
    added: Mapping[str, Tensor],
    header: bytes | None,
    progress: Progress,
) -> None:
    """Write a shard to another file with tensors changed and tensors added.

    Where the file system lets files share blocks, only the parts that change are written.

    Args:
        shard: what is read.
        target: what is written; it need not exist.
        changes: by tensor name.
        added: tensors that are put at the end.
        header: the whole header with its length, where it is not the shard's own.
        progress: called with the number of bytes that are done.

    Raises:
        OSError: it cannot be written.
    """
    with (
        open(shard.path, "rb", buffering=0) as source,
        open(target, "wb", buffering=0) as out,
        ThreadPoolExecutor(1) as writer,
    ):
        shared = header is None and not added and _share(source.fileno(), out.fileno())
        shift = 0
        if not shared:
            header = header or _head(source.fileno(), shard)
            shift = len(header) - shard.data
            write_all(out.fileno(), memoryview(header), 0)
        for begin, end, change in spans(shard, changes):
            if change is None and not shared:
                _copy(source.fileno(), out.fileno(), begin, end, shift, progress)
            elif change is None:
                progress(end - begin)
            else:
                under_way = None
                for at, content, touched in _changed(source.fileno(), begin, end, change, buffers=2):
                    if under_way is not None:
                        under_way.result()
                    under_way = writer.submit(_put, out.fileno(), content, at + shift) if touched or not shared else None
                    progress(len(content))
                if under_way is not None:
                    under_way.result()
        at = max((stored.end for stored in shard.tensors), default=shard.data) + shift
        for values in added.values():
            at += write_all(out.fileno(), _bytes(values), at)


def differs(
    shard: Shard,
    target: Path,
    changes: Mapping[str, Change],
    added: Mapping[str, Tensor],
    header: bytes | None,
    progress: Progress,
) -> str | None:
    """Prove that a file is what `write` would make.

    Returns:
        None, or what is different: `"size"`, `"header"`, or the name of a tensor.
    """
    with open(shard.path, "rb", buffering=0) as source, open(target, "rb", buffering=0) as other:
        header = header or _head(source.fileno(), shard)
        shift = len(header) - shard.data
        expected = shard.size + shift + sum(values.nbytes for values in added.values())
        if target.stat().st_size != expected:
            return "size"
        buffer = bytearray(max(CHUNK, len(header)))
        if header != _read(other.fileno(), buffer, 0, len(header)):
            return "header"
        for begin, end, change in spans(shard, changes):
            parts = (
                ((at, part, True) for at, part in read_range(source.fileno(), bytearray(CHUNK), begin, end))
                if change is None
                else _changed(source.fileno(), begin, end, change)
            )
            for at, content, _ in parts:
                if not _equal(content, _read(other.fileno(), buffer, at + shift, len(content))):
                    return change.stored.name if change is not None else f"bytes {begin} to {end}"
                progress(len(content))
        at = shard.size + shift
        for name, values in added.items():
            content = _bytes(values)
            for start in range(0, len(content), CHUNK):
                part = content[start : start + CHUNK]
                if not _equal(part, _read(other.fileno(), buffer, at + start, len(part))):
                    return name
            at += len(content)
    return None


def spans(shard: Shard, changes: Mapping[str, Change]) -> Iterator[tuple[int, int, Change | None]]:
    """The data of a shard in order: tensors that change, and the bytes between them."""
    begin = at = shard.data
    for stored in shard.tensors:
        if stored.name in changes:
            if begin < stored.begin:
                yield begin, stored.begin, None
            yield stored.begin, stored.end, changes[stored.name]
            begin = stored.end
        at = stored.end
    if begin < at:
        yield begin, at, None


def header_with(shard: Shard, added: Mapping[str, Tensor]) -> bytes | None:
    """The header of a shard with tensors added at its end, its length included; None where there are none."""
    if not added:
        return None
    entries, at = dict(shard.header), shard.size - shard.data
    for name, values in added.items():
        entries[name] = {"dtype": CODES[values.dtype], "shape": list(values.shape), "data_offsets": [at, at + values.nbytes]}
        at += values.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_all(handle: int, content: memoryview, at: int) -> int:
    """Write all of `content` at a place of a file, and return how much it was."""
    done = 0
    while done < len(content):
        done += os.pwrite(handle, content[done : done + PIECE], at + done)
    return done


def _put(handle: int, content: memoryview, at: int) -> None:
    write_all(handle, content, at)
    _begin_writeback(handle, at, len(content))


def _begin_writeback(handle: int, at: int, count: int) -> None:
    """Let the disk begin with these bytes while the next ones are made, where the system has a call for it."""
    if _sync_file_range is not None:
        _sync_file_range(handle, ctypes.c_int64(at), ctypes.c_int64(count), WRITE_OUT)


def _changed(handle: int, begin: int, end: int, change: Change, buffers: int = 1) -> Iterator[tuple[int, memoryview, bool]]:
    """The bytes of a tensor after its change, in parts, and whether each was touched; memory is reused `buffers` parts later."""
    stored = change.stored
    size = stored.dtype.itemsize
    memory = [bytearray(min(CHUNK, end - begin)) for _ in range(buffers)]
    for number, start in enumerate(range(begin, end, CHUNK)):
        at, content = next(read_range(handle, memory[number % buffers], start, min(start + CHUNK, end)))
        first, count = (at - begin) // size, len(content) // size
        touched = change.touches(first, count)
        if touched:
            change(torch.frombuffer(content, dtype=stored.dtype), first)
        yield at, content, touched
    change.finish()


def _copy(source: int, target: int, begin: int, end: int, shift: int, progress: Progress) -> None:
    """Copy bytes inside of the kernel, or where it cannot, through memory."""
    while begin < end:
        try:
            count = os.copy_file_range(source, target, min(end - begin, 1 << 26), begin, begin + shift)
        except (OSError, AttributeError):
            break
        if count == 0:
            break
        _begin_writeback(target, begin + shift, count)
        begin += count
        progress(count)
    for at, content in read_range(source, bytearray(CHUNK), begin, end):
        _put(target, content, at + shift)
        progress(len(content))


def _share(source: int, target: int) -> bool:
    """Let the target share all blocks of the source, where the file system can."""
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError:
        return False
    return True


def _head(handle: int, shard: Shard) -> bytes:
    return bytes(_read(handle, bytearray(shard.data), 0, shard.data))


def _read(handle: int, buffer: bytearray, begin: int, count: int) -> memoryview:
    view = memoryview(buffer)[:count]
    for _ in read_range(handle, buffer, begin, begin + count):
        break
    return view


def _equal(one: memoryview, two: memoryview) -> bool:
    left, right = (torch.frombuffer(part, dtype=torch.uint8) if len(part) else torch.empty(0) for part in (one, two))
    return torch.equal(left, right)


def _bytes(values: Tensor) -> memoryview:
    """The memory of a contiguous tensor, which must live on."""
    if not values.numel():
        return memoryview(bytearray())
    return memoryview((ctypes.c_char * values.nbytes).from_address(values.data_ptr())).cast("B")
