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
from typing import Any

import torch
from torch import Tensor

from ..files import described
from ..selection import pattern

INDICES, VALUES = b"sprandI1", b"sprandV1"
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
        """The dtype itself."""
        return getattr(torch, self.dtype)

    @property
    def nbytes(self) -> int:
        """Of its values."""
        return self.nnz * self.torch_dtype.itemsize


@dataclass(frozen=True, eq=False)
class Layout:
    """All pieces, in the order of their values, and the indices `[nnz]` of those that are not sent whole, on the CPU."""

    pieces: tuple[Piece, ...]
    indices: dict[str, Tensor]

    def digest(self) -> bytes:
        """16 bytes that name these positions."""
        text = json.dumps([asdict(piece) for piece in self.pieces])
        return bytes.fromhex(described.digest([text, *(self.indices[p.name] for p in self.pieces if p.name in self.indices)]))

    def encoded(self) -> Tensor:
        """The index message, uint8 on the CPU."""
        text = json.dumps({"digest": self.digest().hex(), "pieces": [asdict(piece) for piece in self.pieces]}).encode()
        text += b" " * (-len(text) % 8)
        head = torch.frombuffer(bytearray(INDEX_HEADER.pack(INDICES, len(text)) + text), dtype=torch.uint8)
        lists = sorted(self.indices.values(), key=lambda indices: -indices.itemsize)
        return torch.cat([head, *(indices.contiguous().view(torch.uint8) for indices in lists)])

    def values(self, digest: bytes, version: int, parts: Sequence[Tensor]) -> Tensor:
        """The values message, uint8 on the device of the first part; `parts` are `[nnz]` each, in the order of the pieces."""
        device = parts[0].device
        head = torch.frombuffer(bytearray(VALUES_HEADER.pack(VALUES, digest, version)), dtype=torch.uint8).to(device)
        return torch.cat([head, *(part.to(device).contiguous().view(torch.uint8) for part in parts)])

    @property
    def values_nbytes(self) -> int:
        """Bytes of a values message."""
        return VALUES_HEADER.size + sum(piece.nbytes for piece in self.pieces)


def as_bytes(message: Tensor | bytes | bytearray | memoryview) -> Tensor:
    """A message as a uint8 tensor `[bytes]` with memory of its own start.

    Raises:
        ValueError: it is neither bytes nor such a tensor.
    """
    if isinstance(message, bytes | bytearray | memoryview):
        return torch.frombuffer(bytearray(message), dtype=torch.uint8) if len(message) else torch.empty(0, dtype=torch.uint8)
    if not isinstance(message, Tensor) or message.dtype != torch.uint8 or message.dim() != 1:
        what = f"{list(message.shape)} of {message.dtype}" if isinstance(message, Tensor) else type(message).__name__
        raise ValueError(f"receive: expected bytes, or a uint8 tensor [bytes], got {what}")
    return message.contiguous() if message.data_ptr() % 8 == 0 else message.clone()


def kind_of(message: Tensor) -> bytes:
    """`INDICES` or `VALUES`.

    Raises:
        ValueError: it is no message of sprand.
    """
    mark = message[:8].cpu().numpy().tobytes()
    if mark not in (INDICES, VALUES):
        raise ValueError("receive: expected a message of sprand's DeltaSync, got other bytes")
    return mark


def decoded(message: Tensor) -> tuple[Layout, bytes]:
    """The layout of an index message and its digest, proven.

    Raises:
        ValueError: it is truncated or damaged.
    """
    message = message.cpu()
    try:
        _, length = INDEX_HEADER.unpack(message[: INDEX_HEADER.size].numpy().tobytes())
        begin = INDEX_HEADER.size + length
        about = json.loads(message[INDEX_HEADER.size : begin].numpy().tobytes())
        pieces = tuple(Piece(**(entry | {"shape": tuple(entry["shape"])})) for entry in about["pieces"])
        sparse = [piece for piece in pieces if piece.fingerprint is not None]
        indices = {}
        for piece in sorted(sparse, key=lambda piece: -_index_dtype(piece).itemsize):
            end = begin + piece.nnz * _index_dtype(piece).itemsize
            indices[piece.name] = message[begin:end].view(_index_dtype(piece))
            begin = end
        layout = Layout(pieces, indices)
        whole = begin == message.numel() and layout.digest().hex() == about["digest"]
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError, struct.error) as error:
        raise ValueError(f"receive: the index message is truncated or damaged ({error}); send it again") from error
    if not whole:
        raise ValueError("receive: the index message is truncated or damaged; send it again")
    for name, own in indices.items():
        pattern.check_indices(name, own, math.prod(next(piece.shape for piece in sparse if piece.name == name)))
    return layout, bytes.fromhex(about["digest"])


def version_of(message: Tensor) -> tuple[bytes, int]:
    """The digest and the version of a values message.

    Raises:
        ValueError: it is truncated.
    """
    if message.numel() < VALUES_HEADER.size:
        raise ValueError(f"receive: the values message is truncated: {message.numel()} bytes, less than its header")
    _, digest, version = VALUES_HEADER.unpack(message[: VALUES_HEADER.size].cpu().numpy().tobytes())
    return digest, version


def values_of(message: Tensor, layout: Layout) -> dict[str, Tensor]:
    """The values of a message by name, as views of it.

    Raises:
        ValueError: its length is not that of the layout.
    """
    if message.numel() != layout.values_nbytes:
        raise ValueError(
            f"receive: the values message has {message.numel():,} bytes, expected {layout.values_nbytes:,}: it is truncated or "
            "damaged; send it again"
        )
    found: dict[str, Any] = {}
    begin = VALUES_HEADER.size
    for piece in layout.pieces:
        found[piece.name] = message[begin : begin + piece.nbytes].view(piece.torch_dtype)
        begin += piece.nbytes
    return found


def _index_dtype(piece: Piece) -> torch.dtype:
    return pattern.index_dtype(math.prod(piece.shape))
