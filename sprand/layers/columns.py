"""Whole columns: entries of a weight that are all entries of some of its columns, or of some of its rows.

The columns of a linear layer's weight `[out, in]` belong to its input features, as the rows of Hugging Face's `Conv1D` do. Where
whole ones train, backward needs no other input feature, so that the layer keeps only those. This is known from the indices alone:
nothing of it is in a state dict or a file. Convolutions and embeddings keep what PyTorch keeps for them, and make no use of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Whole(NamedTuple):
    """The columns and the rows of a matrix that the chosen entries are all entries of.

    Attributes:
        columns: int64, sorted; None where the entries are no whole columns.
        rows: int64, sorted; None where they are no whole rows.
    """

    columns: Tensor | None = None
    rows: Tensor | None = None

    def inputs(self, transposed: bool) -> Tensor | None:
        """The input features of a linear layer whose weight is `[out, in]`, or `[in, out]` if transposed."""
        return self.rows if transposed else self.columns


NOTHING_WHOLE = Whole()


def whole_in(shape: Sequence[int], indices: Tensor) -> Whole:
    """What the entries of a weight make up.

    Args:
        shape: of the whole weight; only a matrix has columns and rows.
        indices: `[nnz]`, flat, sorted, on any device; on the meta device nothing is known.
    """
    if len(shape) != 2 or indices.is_meta or indices.numel() == 0:
        return NOTHING_WHOLE
    return Whole(_columns_of(indices, *shape), _rows_of(indices, *shape))


def _columns_of(indices: Tensor, rows: int, columns: int) -> Tensor | None:
    if indices.numel() % rows:
        return None
    found = indices.view(rows, -1)
    first = found[0].long()
    starts = torch.arange(rows, device=indices.device) * columns
    if bool((first >= columns).any()) or not torch.equal(found[-1], first + starts[-1]):  # so it is nearly always
        return None
    return first if torch.equal(found.long(), starts[:, None] + first) else None


def _rows_of(indices: Tensor, rows: int, columns: int) -> Tensor | None:
    if indices.numel() % columns:
        return None
    found = indices.view(-1, columns)
    starts = found[:, 0].long()
    if not torch.equal(found[:, -1], starts + (columns - 1)) or bool((starts % columns).any()):
        return None
    inside = torch.arange(columns, device=indices.device)
    return starts // columns if torch.equal(found.long(), starts[:, None] + inside) else None
