"""What a training process sends to an inference copy: the positions once, then values with a number, each one tensor of bytes.

An index message is 16 bytes (a mark, the length of the text), a JSON text padded to 8 bytes, and the indices of all pieces. A
values message is 32 bytes (a mark, the digest of the positions, the version) and the values of all pieces. Pieces are ordered by
the size of their elements, the largest first, so that each begins where its dtype may.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..files import described
from ..selection import pattern

INDICES, VALUES = b"sprandI1", b"sprandV1"
ALIGNMENT = 8  # of a message and what is in it, in bytes: that of its widest dtypes
INDEX_HEADER, VALUES_HEADER = struct.Struct("<8sq"), struct.Struct("<8s16sq")


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
    """The mark of a message: `INDICES` or `VALUES`.

    Raises:
        ValueError: The message is none of sprand's.
    """
    mark = bytes(_header(message, len(INDICES)))
    if mark not in (INDICES, VALUES):
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
    """The digest and the version of a values message.

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


def _header(message: Tensor, count: int) -> memoryview:
    """The first bytes of a message, on the CPU."""
    return memoryview(message[:count].cpu().numpy())


def _of_bytes(content: bytes | bytearray | memoryview) -> Tensor:
    """A uint8 tensor `[bytes]` with memory of its own."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if len(content) else torch.empty(0, dtype=torch.uint8)


def _bytes_of(values: Tensor) -> Tensor:
    """The memory of a tensor, uint8."""
    return values.contiguous().view(torch.uint8)
