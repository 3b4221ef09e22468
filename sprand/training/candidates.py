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
        if _is_distributed():
            self._settle_ranks()
        elif self.fresh is not None:
            self.sums = self.fresh if self.sums is None else self.sums + self.fresh
            self.fresh = None

    def largest(self, count: int) -> Tensor:
        """The `count` positions with the largest sums by magnitude, sorted; fewer where fewer are finite and not zero."""
        if self.sums is None:
            return self.active.new_empty(0)
        return self.positions[_best(magnitudes(self.sums), count)]

    def _add(self, chunks: Callable[[], Iterator[tuple[int, Tensor]]], sample: Callable[[Tensor], Tensor]) -> None:
        if self.positions is None:
            self.positions, self.fresh = self._choose(chunks())
            return
        values = sample(self.positions).to(self.dtype)
        self.fresh = values if self.fresh is None else self.fresh + values

    def _choose(self, chunks: Iterator[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
        """The positions of the largest gradients among those that do not train, ascending, and these gradients."""
        positions, values = self.active.new_empty(0), self.active.new_empty(0, dtype=self.dtype)
        for first, chunk in chunks:
            chunk = chunk.to(self.dtype)
            scores = magnitudes(chunk)
            scores[self._active_in(first, chunk.numel())] = 0
            best = _best(scores, self.count)
            positions = torch.cat([positions, (best + first).to(positions.dtype)])
            values = torch.cat([values, chunk[best]])
            kept = _best(magnitudes(values), self.count)
            positions, values = positions[kept], values[kept]
        return positions, values

    def _active_in(self, first: int, size: int) -> Tensor:
        """Where entries train already in a chunk of so many positions, the first of which is `first`; int64."""
        edges = torch.tensor([first, first + size], dtype=torch.int64, device=self.active.device)
        low, high = torch.searchsorted(self.active, edges.to(self.active.dtype)).tolist()
        return self.active[low:high].long() - first

    def _settle_ranks(self) -> None:
        if self.sums is not None:
            fresh = torch.zeros_like(self.sums) if self.fresh is None else self.fresh
            self.sums, self.fresh = sum(_gathered(fresh), self.sums), None
            return
        ranks = self._chosen_by_ranks()
        union = torch.unique(torch.cat([positions for positions, _ in ranks]))
        if not union.numel():
            self.positions = self.fresh = None
            return
        total = self.active.new_zeros(union.shape, dtype=self.dtype)
        for positions, values in ranks:
            total[torch.searchsorted(union, positions)] += values
        kept = _best(magnitudes(total), self.count, zeros=True)
        self.positions, self.sums, self.fresh = union[kept], total[kept], None

    def _chosen_by_ranks(self) -> list[tuple[Tensor, Tensor]]:
        """The positions that each rank has chosen, and their gradients there; a rank without a gradient has none."""
        positions = self.active.new_full((self.count,), -1)
        values = self.active.new_zeros((self.count,), dtype=self.dtype)
        if self.positions is not None:
            number = self.positions.numel()
            positions[:number] = self.positions
            values[:number] = self.fresh
        ranks = zip(_gathered(positions), _gathered(values), strict=True)
        return [(places[places >= 0], part[places >= 0]) for places, part in ranks]


class ColumnCandidates(Candidates):
    """Columns of one linear layer's weight that may be grown, and the sums of their scores.

    The score of a column is the sum over tokens of the squared input times the squared length of the gradient at the output, as
    that of the strategy `"token_fisher"`. It is seen inside of `torch.compile` as well.

    Args:
        active: `[c]`, ascending: the columns that train.
        count: how many columns the weight has.

    Attributes:
        scores: `[count]`, float64, a leaf, to whose gradient backward adds.
        positions: `[n]`, ascending: the columns that do not train.
        sums: `[n]`, their scores, as of the last `settle`; None until one was positive.
    """

    def __init__(self, active: Tensor, count: int) -> None:
        super().__init__(active, count, torch.float64)
        self.scores = torch.zeros(count, dtype=self.dtype, device=active.device, requires_grad=True)
        free = torch.ones(count, dtype=torch.bool, device=active.device).index_fill_(0, active.long(), False)
        self.positions = free.nonzero().flatten().to(active)

    @torch.no_grad()
    def settle(self) -> None:
        """Add what was seen since the last call to the sums; with `torch.distributed`, what all ranks saw, in their order."""
        fresh, self.scores.grad = self.scores.grad, None
        fresh = torch.zeros_like(self.scores) if fresh is None else fresh
        if _is_distributed():
            fresh = sum(_gathered(fresh))
        if self.sums is not None or fresh.any():
            self.sums = fresh[self.positions] + (0 if self.sums is None else self.sums)


def magnitudes(values: Tensor) -> Tensor:
    """Absolute values, zero where a value is not finite."""
    return values.abs().nan_to_num_(nan=0.0, posinf=0.0)


def _best(scores: Tensor, count: int, zeros: bool = False) -> Tensor:
    """The places of the `count` largest scores, ascending; those of zero are left out unless `zeros`."""
    places = largest(order_keys(scores), min(count, scores.numel()))
    return places if zeros else places[scores[places] > 0]


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _gathered(value: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value.contiguous())
    return parts


def _linear_chunks(grad_output: Tensor, input: Tensor) -> Iterator[tuple[int, Tensor]]:
    cols = input.shape[1]
    height = schedule.chunk_rows(cols)
    for row in range(0, grad_output.shape[1], height):
        yield row * cols, ops.linear_grad(grad_output[:, row : row + height], input).flatten()


def _embedding_chunks(
    grad_output: Tensor, tokens: Tensor, vocabulary: int, padding_idx: int | None, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """Chunks of the rows of tokens that occur; a row without a token has no gradient."""
    features = grad_output.shape[1]
    height = schedule.chunk_rows(features)
    occurring = (tokens.unique() // height).unique()
    for number in occurring.tolist():
        row = number * height
        end = min(row + height, vocabulary)
        positions = torch.arange(row * features, end * features, dtype=dtype, device=tokens.device)
        yield row * features, ops.embedding_grad(grad_output, tokens, positions, padding_idx)


def _dense_chunks(grad: Tensor) -> Iterator[tuple[int, Tensor]]:
    flat, size = grad.view(-1), schedule.CHUNK_BYTES // 4
    return ((first, flat[first : first + size]) for first in range(0, flat.numel(), size))
