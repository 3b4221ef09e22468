"""Candidates: the largest entries of a weight's gradient outside of its pattern, found in backward without that gradient.

The first gradient after a `Candidates` is made is computed row chunk by row chunk (of `schedule.CHUNK_BYTES`); of each chunk
only the largest entries are kept. Later gradients are sampled at the positions found, as those of trained entries are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import ops, schedule
from ..kernels.topk import largest, order_keys


class Candidates:
    """Positions of one weight that may be grown, and the sum of their gradients.

    Args:
        active: `[nnz]`, flat, sorted: the positions that train, which are no candidates.
        count: how many to keep at most; gradients that are zero or not finite are not kept.
        dtype: of the sums.

    Attributes:
        positions: `[n]`, sorted, in the dtype of `active`; None until a gradient was seen.
        sums: `[n]`, their gradients added up, as of the last `settle`.
        fresh: `[n]`, the gradients since.
    """

    def __init__(self, active: Tensor, count: int, dtype: torch.dtype = torch.float32) -> None:
        self.active, self.count, self.dtype = active, count, dtype
        self.positions: Tensor | None = None
        self.sums: Tensor | None = None
        self.fresh: Tensor | None = None

    def add_linear(self, grad_output: Tensor, input: Tensor) -> None:
        """Take in the gradient `grad_output.T @ input` of a linear layer; `[T, out]` and `[T, in]`."""
        self._add(lambda: _linear_chunks(grad_output, input), lambda at: ops.sddmm(grad_output, input, at))

    def add_embedding(self, grad_output: Tensor, tokens: Tensor, vocabulary: int, padding_idx: int | None) -> None:
        """Take in the gradient of an embedding of so many tokens; `[T, features]` and `[T]`."""
        self._add(
            lambda: _embedding_chunks(grad_output, tokens, vocabulary, padding_idx, self.active.dtype),
            lambda at: ops.embedding_grad(grad_output, tokens, at, padding_idx),
        )

    def add_dense(self, grad: Tensor) -> None:
        """Take in a gradient that exists; contiguous, of the weight's shape."""
        self._add(lambda: _dense_chunks(grad), lambda at: ops.gather(grad, at))

    @torch.no_grad()
    def settle(self) -> None:
        """Add what was seen since the last call to the sums; with `torch.distributed`, what all ranks saw, in their order.

        The first positions are each rank's own: all of them are put together, and where a rank did not keep one its part
        counts as zero. From then on all ranks sum the same positions.
        """
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._settle_ranks()
        elif self.fresh is not None:
            self.sums = self.fresh if self.sums is None else self.sums + self.fresh
            self.fresh = None

    def largest(self, count: int) -> Tensor:
        """The `count` positions with the largest sums by magnitude, sorted; fewer where fewer are finite and not zero."""
        if self.sums is None:
            return self.active.new_empty(0)
        scores = magnitudes(self.sums)
        found = largest(order_keys(scores), min(count, scores.numel()))
        return self.positions[found[scores[found] > 0]]

    def _add(self, chunks: Callable[[], Iterator[tuple[int, Tensor]]], sample: Callable[[Tensor], Tensor]) -> None:
        if self.positions is None:
            self.positions, self.fresh = self._choose(chunks())
            return
        values = sample(self.positions).to(self.dtype)
        self.fresh = values if self.fresh is None else self.fresh + values

    def _choose(self, chunks: Iterator[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
        positions, values = self.active.new_empty(0), self.active.new_empty(0, dtype=self.dtype)
        for first, chunk in chunks:
            chunk = chunk.to(self.dtype)
            edges = torch.tensor([first, first + chunk.numel()], dtype=torch.int64, device=chunk.device)
            low, high = torch.searchsorted(self.active, edges.to(self.active.dtype)).tolist()
            scores = magnitudes(chunk)
            scores[self.active[low:high].long() - first] = 0
            found = largest(order_keys(scores), min(self.count, scores.numel()))
            found = found[scores[found] > 0]
            positions = torch.cat([positions, (found + first).to(positions.dtype)])
            values = torch.cat([values, chunk[found]])
            best = largest(order_keys(magnitudes(values)), min(self.count, values.numel()))
            positions, values = positions[best], values[best]
        return positions, values

    def _settle_ranks(self) -> None:
        if self.sums is not None:
            self.sums = sum(_gathered(torch.zeros_like(self.sums) if self.fresh is None else self.fresh), self.sums)
            self.fresh = None
            return
        at, values = self.active.new_full((self.count,), -1), self.active.new_zeros((self.count,), dtype=self.dtype)
        if self.positions is not None:
            at[: self.positions.numel()], values[: self.positions.numel()] = self.positions, self.fresh
        every = list(zip(_gathered(at), _gathered(values), strict=True))
        union = torch.unique(torch.cat([positions[positions >= 0] for positions, _ in every]))
        if not union.numel():
            self.positions = self.fresh = None
            return
        total = values.new_zeros(union.shape)
        for positions, part in every:
            total[torch.searchsorted(union, positions[positions >= 0])] += part[positions >= 0]
        best = largest(order_keys(magnitudes(total)), min(self.count, total.numel()))
        self.positions, self.sums, self.fresh = union[best], total[best], None


def magnitudes(values: Tensor) -> Tensor:
    """Absolute values, zero where a value is not finite."""
    return values.abs().nan_to_num_(nan=0.0, posinf=0.0)


def _gathered(value: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value.contiguous())
    return parts


def _linear_chunks(grad_output: Tensor, input: Tensor) -> Iterator[tuple[int, Tensor]]:
    cols = input.shape[1]
    height = schedule.chunk_rows(cols)
    for row in range(0, grad_output.shape[1], height):
        yield row * cols, ops.dense_rows(grad_output[:, row : row + height], input).flatten()


def _embedding_chunks(
    grad_output: Tensor, tokens: Tensor, vocabulary: int, padding_idx: int | None, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """Chunks of the rows of tokens that occur; a row without a token has no gradient."""
    features = grad_output.shape[1]
    height = schedule.chunk_rows(features)
    for part in (tokens.unique() // height).unique().tolist():
        first, end = part * height * features, min((part + 1) * height, vocabulary) * features
        positions = torch.arange(first, end, dtype=dtype, device=tokens.device)
        yield first, ops.embedding_grad(grad_output, tokens, positions, padding_idx)


def _dense_chunks(grad: Tensor) -> Iterator[tuple[int, Tensor]]:
    flat, size = grad.view(-1), schedule.CHUNK_BYTES // 4
    return ((first, flat[first : first + size]) for first in range(0, flat.numel(), size))
