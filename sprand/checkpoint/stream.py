"""Writes a safetensors file again with some tensors changed, a part at a time, and compares a file with what it should be."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .shards import CHUNK, CODES, Shard, Stored, read_range

FICLONE = 0x40049409  # of Linux: let a file share the blocks of another
PIECE = 1 << 20  # bytes of a write: for 2 MiB Linux seeks pages of that size, which it may first have to make
WRITE_OUT = 2  # of Linux's sync_file_range: begin, and do not wait
Progress = Callable[[int], None]
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)


@dataclass(frozen=True)
class Rewrite:
    """How a tensor changes while its file is written, part by part.

    Attributes:
        stored: the tensor.
        touches: whether any of `count` entries from `first` on change.
        apply: changes a part, flat, in place, whose first entry is `first`.
        finish: what to do when all parts are done, if anything.
    """

    stored: Stored
    touches: Callable[[int, int], bool]
    apply: Callable[[Tensor, int], None]
    finish: Callable[[], None] | None = None


@dataclass(frozen=True)
class RewrittenShard:
    """A safetensors file as it is to be: another one with tensors changed, and tensors added at its end.

    Attributes:
        shard: what is read.
        rewrites: how tensors change, by name.
        added: tensors that are put at the end.
        header: the whole header with its length, where it is neither the shard's own nor that with the added tensors in it.
    """

    shard: Shard
    rewrites: Mapping[str, Rewrite]
    added: Mapping[str, Tensor] = field(default_factory=dict)
    header: bytes | None = None

    def write(self, target: Path, progress: Progress) -> None:
        """Write the file; where the file system lets files share blocks, only the parts that change are written.

        Args:
            target: what is written; it need not exist.
            progress: called with the number of bytes that are done.

        Raises:
            OSError: The file cannot be written.
        """
        with (
            open(self.shard.path, "rb", buffering=0) as source,
            open(target, "wb", buffering=0) as out,
            ThreadPoolExecutor(1) as writer,
        ):
            reads, writes = source.fileno(), out.fileno()
            header = self._new_header()
            shared = header is None and _share(reads, writes)
            shift = 0
            if not shared:
                header = header or _own_header(reads, self.shard)
                shift = len(header) - self.shard.data
                write_all(writes, memoryview(header), 0)
            for begin, end, rewrite in self._spans():
                if rewrite is not None:
                    _write_changed(writer, reads, writes, rewrite, shift, shared, progress)
                elif shared:
                    progress(end - begin)
                else:
                    _copy(reads, writes, begin, end, shift, progress)
            at = max((stored.end for stored in self.shard.tensors), default=self.shard.data) + shift
            for values in self.added.values():
                at += write_all(writes, _bytes(values), at)

    def differs(self, target: Path, progress: Progress) -> str | None:
        """Prove that a file is what `write` would make.

        Returns:
            None, or what is different: `"size"`, `"header"`, or the name of a tensor.
        """
        with open(self.shard.path, "rb", buffering=0) as source, open(target, "rb", buffering=0) as other:
            reads, written = source.fileno(), other.fileno()
            header = self._new_header() or _own_header(reads, self.shard)
            shift = len(header) - self.shard.data
            if target.stat().st_size != self.shard.size + shift + sum(values.nbytes for values in self.added.values()):
                return "size"
            buffer = bytearray(max(CHUNK, len(header)))
            if header != _read(written, buffer, 0, len(header)):
                return "header"
            for begin, end, rewrite in self._spans():
                for at, content in _expected(reads, begin, end, rewrite):
                    if not _equal(content, _read(written, buffer, at + shift, len(content))):
                        return f"bytes {begin} to {end}" if rewrite is None else rewrite.stored.name
                    progress(len(content))
            at = self.shard.size + shift
            for name, values in self.added.items():
                content = _bytes(values)
                for start in range(0, len(content), CHUNK):
                    part = content[start : start + CHUNK]
                    if not _equal(part, _read(written, buffer, at + start, len(part))):
                        return name
                at += len(content)
        return None

    def _spans(self) -> Iterator[tuple[int, int, Rewrite | None]]:
        """The data of the shard in order: tensors that change, and the bytes between them."""
        begin = at = self.shard.data
        for stored in self.shard.tensors:
            if stored.name in self.rewrites:
                if begin < stored.begin:
                    yield begin, stored.begin, None
                yield stored.begin, stored.end, self.rewrites[stored.name]
                begin = stored.end
            at = stored.end
        if begin < at:
            yield begin, at, None

    def _new_header(self) -> bytes | None:
        """The header with its length; None where it is the shard's own."""
        if self.header is not None or not self.added:
            return self.header
        entries, at = dict(self.shard.header), self.shard.size - self.shard.data
        for name, values in self.added.items():
            offsets = [at, at + values.nbytes]
            entries[name] = {"dtype": CODES[values.dtype], "shape": list(values.shape), "data_offsets": offsets}
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


def _write_changed(
    writer: ThreadPoolExecutor, source: int, target: int, rewrite: Rewrite, shift: int, shared: bool, progress: Progress
) -> None:
    """Write a tensor that changes, each part while the next one is made; where blocks are shared, only what is touched."""
    under_way = None
    for at, content, touched in _changed(source, rewrite, buffers=2):
        if under_way is not None:
            under_way.result()
        under_way = writer.submit(_put, target, content, at + shift) if touched or not shared else None
        progress(len(content))
    if under_way is not None:
        under_way.result()


def _expected(source: int, begin: int, end: int, rewrite: Rewrite | None) -> Iterator[tuple[int, memoryview]]:
    """The bytes of a file from `begin` to `end` as they are to be, in parts, each with its position."""
    if rewrite is None:
        return read_range(source, bytearray(CHUNK), begin, end)
    return ((at, content) for at, content, _ in _changed(source, rewrite))


def _changed(handle: int, rewrite: Rewrite, buffers: int = 1) -> Iterator[tuple[int, memoryview, bool]]:
    """The bytes of a tensor after its change, in parts, and whether each was touched; memory is reused `buffers` parts later."""
    stored = rewrite.stored
    size = stored.dtype.itemsize
    memory = [bytearray(min(CHUNK, stored.end - stored.begin)) for _ in range(buffers)]
    for number, start in enumerate(range(stored.begin, stored.end, CHUNK)):
        at, content = next(read_range(handle, memory[number % buffers], start, min(start + CHUNK, stored.end)))
        first, count = (at - stored.begin) // size, len(content) // size
        touched = rewrite.touches(first, count)
        if touched:
            rewrite.apply(torch.frombuffer(content, dtype=stored.dtype), first)
        yield at, content, touched
    if rewrite.finish is not None:
        rewrite.finish()


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


def _own_header(handle: int, shard: Shard) -> bytes:
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
