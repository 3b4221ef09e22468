"""Sparse patches of checkpoint tensors: names, shapes, flat positions, and the values there with an adapter and without."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.file import AdapterFile
from ..selection import pattern
from .edits import Edits
from .shards import Checkpoint
from .tensor_edits import Edit, Overwrite


@dataclass(frozen=True, eq=False)
class TensorPatch:
    """What an adapter changes of one tensor of a checkpoint.

    Attributes:
        name, shape, dtype: of the tensor in the checkpoint.
        indices: `[n]`, flat, sorted, distinct, int32 (int64 from 2**31 entries); None where all of the tensor is given.
        values: `[n]`, what the tensor holds there with the adapter, in its dtype; no NaN.
        base: `[n]`, what it holds there in the checkpoint; no NaN.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    indices: Tensor | None
    values: Tensor
    base: Tensor


def patches_of(adapter: AdapterFile, checkpoint: Checkpoint, edits: Edits) -> Iterator[TensorPatch]:
    """What an adapter changes in a checkpoint, tensor by tensor; once all were given, its base is proven to be the adapter's.

    Raises:
        ValueError: The adapter was trained on another base, has tensors that the checkpoint does not have, or meets a NaN.
    """
    if edits.added:
        raise ValueError(
            f"{adapter.path} trained {', '.join(edits.added)}, which the base checkpoint does not have, and a patch can only "
            "change tensors that are there; use sprand merge"
        )
    for name, edit in edits.by_tensor.items():
        indices, values, base = _changed(checkpoint, edit)
        if torch.isnan(values).any() or torch.isnan(base).any():
            raise ValueError(
                f"{name} would hold values that are no numbers, and vLLM takes those for untouched entries; take the last good "
                "adapter"
            )
        yield TensorPatch(name, edit.stored.shape, edit.stored.dtype, indices, values, base)
    edits.prove()


def _changed(checkpoint: Checkpoint, edit: Edit | Overwrite) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of the entries that an edit changes, and their values after and before it."""
    numel = edit.stored.numel
    if isinstance(edit, Overwrite):
        positions = torch.arange(numel)
    else:
        positions = torch.cat([edit.trained.indices, edit.frozen.indices]).unique().long()
    values, base = (torch.empty(positions.shape, dtype=edit.stored.dtype) for _ in range(2))
    for part, first in checkpoint.chunks(edit.stored.name):
        low, high = torch.searchsorted(positions, torch.tensor([first, first + part.numel()])).tolist()
        here = positions[low:high] - first
        base[low:high] = part[here]
        edit.apply(part, first)
        values[low:high] = part[here]
    return positions.to(pattern.index_dtype(numel)), values, base
