"""What a training process sends to an inference copy: the positions once, then values with a number, each one tensor of bytes.

An index message is 16 bytes (a mark, the length of the text), a JSON text padded to 8 bytes, and the indices of all pieces. A
values message is 32 bytes (a mark, the digest of the positions, the version) and the values of all pieces. Pieces are ordered by
the size of their elements, the largest first, so that each begins where its dtype may.

A message of changes is 48 bytes (a mark, the digest, the version, how many entries changed and the bytes of their gaps), the gaps
between the positions of changed entries in the order of all values, padded to 8 bytes, and the new values of these entries.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..files import described
from ..selection import pattern
from . import gaps

INDICES, VALUES, CHANGES = b"sprandI1", b"sprandV1", b"sprandC1"
ALIGNMENT = 8  # of a message and what is in it, in bytes: that of its widest dtypes
INDEX_HEADER, VALUES_HEADER, CHANGES_HEADER = struct.Struct("<8sq"), struct.Struct("<8s16sq"), struct.Struct("<8s16sqqq")


@dataclass(frozen=True)
class Piece:
    """Where values of one tensor go.

    Attributes:
        name, shape: of the tensor.
        dtype: of its values, without `torch.`.
        nnz: how many entries.
        fingerprint: hashes of what the base holds there, by dtype; None for a tensor that is sent whole.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nnz: int
    fingerprint: dict[str, str] | None

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the values."""
        return getattr(torch, self.dtype)

    @property
    def nbytes(self) -> int:
        """How many bytes the values take."""
        return self.nnz * self.torch_dtype.itemsize

    @property
    def index_dtype(self) -> torch.dtype:
        """The dtype of its indices."""
        return pattern.index_dtype(math.prod(self.shape))


@dataclass(frozen=True, eq=False)
class Layout:
    """All pieces, in the order of their values, and the indices `[nnz]` of those that are not sent whole, on the CPU."""

    pieces: tuple[Piece, ...]
    indices: dict[str, Tensor]

    def digest(self) -> bytes:
        """16 bytes that name these positions."""
        text = json.dumps([asdict(piece) for piece in self.pieces])
        lists = [self.indices[piece.name] for piece in self.pieces if piece.name in self.indices]
        return bytes.fromhex(described.digest([text, *lists]))

    def encoded(self) -> Tensor:
        """The index message, uint8 on the CPU."""
        pieces = [asdict(piece) for piece in self.pieces]
        text = json.dumps({"digest": self.digest().hex(), "pieces": pieces}).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        head = INDEX_HEADER.pack(INDICES, len(text)) + text
        widest_first = sorted(self.indices.values(), key=lambda indices: -indices.itemsize)
        return torch.cat([_of_bytes(head), *map(_bytes_of, widest_first)])

    def values(self, digest: bytes, version: int, parts: Sequence[Tensor]) -> Tensor:
        """The values message, uint8 on the device of the first part; `parts` are `[nnz]` each, in the order of the pieces."""
        device = parts[0].device
        head = _of_bytes(VALUES_HEADER.pack(VALUES, digest, version))
        return torch.cat([head.to(device), *(_bytes_of(part.to(device)) for part in parts)])

    def changes(
        self, digest: bytes, version: int, parts: Sequence[Tensor], before: Sequence[Tensor | None]
    ) -> tuple[Tensor, int]:
        """The message of changed values, uint8 on the device of the first part, and how many there are.

        Args:
            digest, version: as for `values`.
            parts: `[nnz]` each, in the order of the pieces.
            before: what the receiver holds there; None where that is not known, and all are sent.
        """
        device = parts[0].device
        changed = [_changed(part, old).to(device) for part, old in zip(parts, before, strict=True)]
        positions = torch.cat(changed).nonzero().flatten()
        coded = gaps.coded(positions)
        coded = torch.cat([coded, coded.new_zeros(-coded.numel() % ALIGNMENT)])
        head = _of_bytes(CHANGES_HEADER.pack(CHANGES, digest, version, positions.numel(), coded.numel()))
        chosen = (_bytes_of(part.to(device)[own]) for part, own in zip(parts, changed, strict=True))
        return torch.cat([head.to(device), coded, *chosen]), positions.numel()

    @property
    def values_nbytes(self) -> int:
        """Bytes of a values message."""
        return VALUES_HEADER.size + sum(piece.nbytes for piece in self.pieces)


def as_bytes(message: Tensor | bytes | bytearray | memoryview) -> Tensor:
    """A message as a uint8 tensor `[bytes]` that begins where any dtype may.

    Raises:
        ValueError: The message is neither bytes nor such a tensor.
    """
    if isinstance(message, bytes | bytearray | memoryview):
        return _of_bytes(message)
    if not isinstance(message, Tensor):
        raise ValueError(f"receive: expected bytes, or a uint8 tensor [bytes], got {type(message).__name__}")
    if message.dtype != torch.uint8 or message.dim() != 1:
        raise ValueError(f"receive: expected bytes, or a uint8 tensor [bytes], got {list(message.shape)} of {message.dtype}")
    aligned = message.data_ptr() % ALIGNMENT == 0
    return message.contiguous() if aligned else message.clone()


def kind_of(message: Tensor) -> bytes:
    """The mark of a message: `INDICES`, `VALUES` or `CHANGES`.

    Raises:
        ValueError: The message is none of sprand's.
    """
    mark = bytes(_header(message, len(INDICES)))
    if mark not in (INDICES, VALUES, CHANGES):
        raise ValueError("receive: expected a message of sprand's DeltaSync, got other bytes")
    return mark


def decoded(message: Tensor) -> tuple[Layout, bytes]:
    """The layout of an index message and its digest, proven.

    Raises:
        ValueError: The message is truncated or damaged.
    """
    message = message.cpu()
    try:
        _, length = INDEX_HEADER.unpack(_header(message, INDEX_HEADER.size))
        begin = INDEX_HEADER.size + length
        about = json.loads(bytes(_header(message, begin))[INDEX_HEADER.size :])
        pieces = tuple(Piece(**(entry | {"shape": tuple(entry["shape"])})) for entry in about["pieces"])
        layout, end = _with_indices(pieces, message, begin)
        whole = end == message.numel() and layout.digest().hex() == about["digest"]
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError, struct.error) as error:
        raise ValueError(f"receive: the index message is truncated or damaged ({error}); send it again") from error
    if not whole:
        raise ValueError("receive: the index message is truncated or damaged; send it again")
    for piece in pieces:
        if piece.name in layout.indices:
            pattern.check_indices(piece.name, layout.indices[piece.name], math.prod(piece.shape))
    return layout, bytes.fromhex(about["digest"])


def _with_indices(pieces: tuple[Piece, ...], message: Tensor, begin: int) -> tuple[Layout, int]:
    """The layout of pieces whose indices begin at a byte of a message, and the byte at which they end."""
    sparse = [piece for piece in pieces if piece.fingerprint is not None]
    indices = {}
    for piece in sorted(sparse, key=lambda piece: -piece.index_dtype.itemsize):
        end = begin + piece.nnz * piece.index_dtype.itemsize
        indices[piece.name] = message[begin:end].view(piece.index_dtype)
        begin = end
    return Layout(pieces, indices), begin


def version_of(message: Tensor) -> tuple[bytes, int]:
    """The digest and the version of a message of values or changes.

    Raises:
        ValueError: The message is truncated.
    """
    if message.numel() < VALUES_HEADER.size:
        raise ValueError(f"receive: the values message is truncated: {message.numel()} bytes, less than its header")
    _, digest, version = VALUES_HEADER.unpack(_header(message, VALUES_HEADER.size))
    return digest, version


def values_of(message: Tensor, layout: Layout) -> dict[str, Tensor]:
    """The values of a message by name, as views of it.

    Raises:
        ValueError: The message has another length than the layout says.
    """
    if message.numel() != layout.values_nbytes:
        raise ValueError(
            f"receive: the values message has {message.numel():,} bytes, expected {layout.values_nbytes:,}: it is truncated or "
            "damaged; send it again"
        )
    values: dict[str, Tensor] = {}
    begin = VALUES_HEADER.size
    for piece in layout.pieces:
        values[piece.name] = message[begin : begin + piece.nbytes].view(piece.torch_dtype)
        begin += piece.nbytes
    return values


def changes_of(message: Tensor, layout: Layout) -> dict[str, tuple[Tensor, Tensor]]:
    """Which entries of each tensor changed `[n]`, in the order of its values, and their values `[n]`; by name.

    Raises:
        ValueError: The message is truncated or damaged.
    """
    damaged = ValueError(
        "receive: the message of changes is truncated or damaged; call values(whole=True), and send what it gives"
    )
    if message.numel() < CHANGES_HEADER.size:
        raise damaged
    *_, count, length = CHANGES_HEADER.unpack(_header(message, CHANGES_HEADER.size))
    begin = CHANGES_HEADER.size + length
    if min(length, count) < 0 or length % ALIGNMENT or begin > message.numel():
        raise damaged
    positions = gaps.positions_of(message[CHANGES_HEADER.size : begin])[:count]
    ends = torch.tensor(list(itertools.accumulate(piece.nnz for piece in layout.pieces)), device=positions.device)
    if positions.numel() != count or (count and positions[-1] >= ends[-1]):
        raise damaged
    limits = [0, *torch.searchsorted(positions, ends).tolist()]
    counts = [high - low for low, high in itertools.pairwise(limits)]
    nbytes = [own * piece.torch_dtype.itemsize for own, piece in zip(counts, layout.pieces, strict=True)]
    if begin + sum(nbytes) != message.numel():
        raise damaged
    found = {}
    for piece, low, own, size, end in zip(layout.pieces, limits, counts, nbytes, ends.tolist(), strict=False):
        values = message[begin : begin + size].view(piece.torch_dtype)
        found[piece.name] = positions[low : low + own] - (end - piece.nnz), values
        begin += size
    return found


def _changed(values: Tensor, before: Tensor | None) -> Tensor:
    """Which of the values `[nnz]` are other bits than before."""
    if before is None:
        return torch.ones_like(values, dtype=torch.bool)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize]
    return values.contiguous().view(integer) != before.to(values.device).contiguous().view(integer)


def _header(message: Tensor, count: int) -> memoryview:
    """The first bytes of a message, on the CPU."""
    return memoryview(message[:count].cpu().numpy())


def _of_bytes(content: bytes | bytearray | memoryview) -> Tensor:
    """A uint8 tensor `[bytes]` with memory of its own."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if len(content) else torch.empty(0, dtype=torch.uint8)


def _bytes_of(values: Tensor) -> Tensor:
    """The memory of a tensor, uint8."""
    return values.contiguous().view(torch.uint8)
