"""Patterns: which entries of a weight train. Random draws from a seed, and indices or masks given by the user."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from ..kernels import host, ops
from ..kernels.checks import check_draw
from ..kernels.limits import ceil_div
from ..layers.sites import Site
from ..layers.units import Units, index_dtype

RANDOM_STRATEGIES = ("random", "uniform")
GIVEN = "given"  # how a strategy of explicit masks or indices is named in JSON
COLUMNS = "columns"  # of units, see `axis_of`
LAYOUTS = ("unstructured", COLUMNS)
LONGEST_ROW = 2**32 - 1  # of a matrix that a stratified draw is made in; it has no more rows either
PATTERN_VERSION = 1  # changes with csrc/pattern_math.h: an adapter that stores a seed names the version it was drawn with


def axis_of(layout: str, site: Site) -> int | None:
    """The dimension of a weight along which a layout chooses columns; None where it chooses entries."""
    return site.column_axis if layout == COLUMNS else None


def draw(
    strategy: str,
    name: str,
    shape: Sequence[int],
    nnz: int,
    seed: int,
    device: torch.device | str = "cpu",
    axis: int | None = None,
) -> Tensor:
    """Draw `nnz` positions of a weight at random: the same ones on every device, rank and version of torch.

    `"random"` is stratified: every entry is drawn with the same probability, rows differ by at most one entry, and one
    entry falls into each of a row's equal strata. A weight with 2**32 rows or columns, or more, is drawn as one vector, cut into
    equal rows. `"uniform"` is a simple random sample without replacement. Of columns the same holds for the columns, as one
    vector.

    Args:
        strategy: `"random"` or `"uniform"`.
        name: name of the parameter; other names give independent draws.
        shape: shape of the weight.
        nnz: number of entries, whole columns.
        seed: any int.
        device: where the indices are made.
        axis: the dimension along which columns are drawn; None draws entries.

    Returns:
        `[nnz]`, flat, sorted, distinct, int32 (int64 from 2**31 entries).

    Raises:
        ValueError: The strategy is unknown, or there are more entries than the weight has, or a part of a column.
    """
    if strategy not in RANDOM_STRATEGIES:
        raise ValueError(f"expected a random strategy, one of {', '.join(RANDOM_STRATEGIES)}, got {strategy!r}")
    if axis is not None:
        units, key = Units.of(shape, axis), draw_key(f"{strategy} {COLUMNS}", name, shape, seed)
        return units.entries(_drawn(strategy, 1, units.count, _units_in(name, units, nnz), key, device))
    rows = shape[0] if len(shape) > 1 else 1
    return _drawn(strategy, rows, math.prod(shape) // max(rows, 1), nnz, draw_key(strategy, name, shape, seed), device)


def _drawn(strategy: str, rows: int, cols: int, count: int, key: int, device: torch.device | str) -> Tensor:
    """`[count]` positions of a matrix, ascending."""
    positions = torch.empty(count, dtype=index_dtype(rows * cols), device=device)
    if strategy == "random" and max(rows, cols) <= LONGEST_ROW:
        ops.stratified_indices_(positions, rows, cols, key)
        return positions
    fill = ops.uniform_indices_ if strategy == "uniform" else stratified_vector_
    fill(positions, rows * cols, key)
    return positions if positions.is_meta else positions.sort().values


def _units_in(name: str, units: Units, nnz: int) -> int:
    """How many units so many entries are."""
    if nnz % units.size:
        raise ValueError(f"{name}: expected whole columns of {units.size} entries, got {nnz} entries")
    return nnz // units.size


def stratified_vector_(positions: Tensor, numel: int, key: int) -> None:
    """Fill `positions` with a stratified draw, in no order, from a vector longer than `LONGEST_ROW`.

    The vector is cut into the fewest equal rows. The few positions behind the last whole row are drawn only where all others
    are; a turn of the vector by a random distance gives every position the same probability.
    """
    check_draw("draw", positions, numel)
    rows = ceil_div(numel, LONGEST_ROW)
    cols = numel // rows
    whole = rows * cols
    drawn, rest = positions[:whole], positions[whole:]
    ops.stratified_indices_(drawn, rows, cols, key)
    rest.copy_(torch.arange(whole, whole + rest.numel(), device=rest.device))
    turn = torch.empty(1, dtype=torch.int64, device=positions.device)
    ops.uniform_indices_(turn, numel, key)
    positions.add_(turn).remainder_(numel)


def draw_free(
    strategy: str,
    name: str,
    shape: Sequence[int],
    nnz: int,
    seed: int,
    avoided: Tensor,
    axis: int | None = None,
) -> Tensor:
    """`draw`, of the positions (the columns) that hold none of some entries, as if the others were not there.

    The free positions, in their order, are drawn from as a vector: every one with the same probability.

    Args:
        strategy, name, shape, nnz, seed, axis: as in `draw`.
        avoided: `[n]`, flat, ascending, unique, on the device where the indices are made.

    Returns:
        `[nnz]`, flat, sorted, distinct, int32 (int64 from 2**31 entries).

    Raises:
        ValueError: An argument is as `draw` refuses it, or fewer positions are free.
    """
    units = Units.of(shape, axis)
    held, count = units.holding(avoided), _units_in(name, units, nnz)
    free = units.count - held.numel()
    check_free(name, nnz, free * units.size)
    ranks = draw(strategy, name, (free,), count, seed, avoided.device).long()
    before = held - torch.arange(held.numel(), device=held.device)  # free positions before each one to leave out
    return units.entries(ranks + torch.searchsorted(before, ranks, right=True))


def check_free(name: str, nnz: int, free: int) -> None:
    """Prove that entries fit among those that are not to be left out.

    Raises:
        ValueError: More entries are asked for than are free.
    """
    if nnz > free:
        raise ValueError(
            f"disjoint: {nnz:,} entries of {name} were asked for, but {free:,} are free; lower the density or budget, target "
            "more modules, or leave out fewer"
        )


def draw_key(strategy: str, name: str, shape: Sequence[int], seed: int) -> int:
    """The 64 bits, as a signed int, that name one draw."""
    text = f"sprand {PATTERN_VERSION} {strategy} {seed} {name} {tuple(shape)}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def from_user(name: str, value: Tensor, shape: Sequence[int]) -> Tensor:
    """Indices from a boolean mask of the weight's shape, or from flat indices in any order.

    Args:
        name: name of the parameter, for the messages.
        value: a mask, bool, `shape`; or distinct flat indices, an integer type, one dimension.
        shape: shape of the weight.

    Returns:
        `[nnz]`, flat, sorted, int32 or int64.

    Raises:
        ValueError: A shape or type is wrong, an index is out of range, or one appears twice.
    """
    numel = math.prod(shape)
    if not isinstance(value, Tensor):
        value = torch.as_tensor(value)
    if value.dtype == torch.bool:
        if tuple(value.shape) != tuple(shape):
            raise ValueError(f"{name}: expected a mask of shape {list(shape)}, got {list(value.shape)}")
    elif value.dim() != 1 or value.is_floating_point() or value.is_complex():
        raise ValueError(
            f"{name}: expected a bool mask {list(shape)} or flat integer indices, got {list(value.shape)} of {value.dtype}"
        )
    indices = _positions(value)
    check_indices(name, indices, numel)
    return indices.to(index_dtype(numel))


def from_columns(name: str, chosen: Tensor | None, shape: Sequence[int], axis: int) -> Tensor:
    """Indices from the numbers of whole columns of a weight, or of whole rows.

    Args:
        name: name of the parameter, for the messages.
        chosen: `[c]`, int32 or int64, ascending.
        shape: shape of the weight, of two dimensions or more.
        axis: the dimension that counts them: 1 for columns, channels and features, 0 for rows.

    Returns:
        `[nnz]`, flat, sorted, int32 (int64 from 2**31 entries).

    Raises:
        ValueError: There are no such numbers, one is out of range, or one appears twice.
    """
    called = ("rows", "columns")[axis]
    integers = chosen is not None and chosen.dtype in (torch.int32, torch.int64) and chosen.dim() == 1
    if len(shape) < 2 or not integers:
        raise ValueError(f"{name}: expected numbers of {called}, integers in one dimension, of a weight of two or more")
    units = Units.of(shape, axis)
    check_indices(f"{name}, {called}", chosen, units.count, called)
    return units.entries(chosen)


def same_entries(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether masks or indices by parameter name choose the same entries of the same parameters."""
    return first.keys() == second.keys() and all(_same_positions(first[name], second[name]) for name in first)


def _same_positions(first: Tensor, second: Tensor) -> bool:
    if first is second:
        return True
    first, second = torch.as_tensor(first), torch.as_tensor(second)
    if first.is_meta or second.is_meta:  # no values that could be equal
        return False
    if first.dtype == second.dtype == torch.bool and first.shape != second.shape:
        return False
    return torch.equal(_positions(first.cpu()), _positions(second.cpu()))


def _positions(value: Tensor) -> Tensor:
    """Flat positions, ascending, int64, of a mask or of indices in any order."""
    return value.flatten().nonzero().flatten() if value.dtype == torch.bool else value.long().sort().values


def check_indices(name: str, indices: Tensor, numel: int, of: str = "entries") -> None:
    """Prove that `indices` are sorted, distinct and in range; `of` is what they count.

    Raises:
        ValueError: An index is out of range, appears twice or is out of order; the message names the first one.
    """
    bad = host.first_bad_index(indices.cpu(), numel)
    if bad >= 0:
        value = int(indices[bad])
        if not 0 <= value < numel:
            raise ValueError(f"{name}: index {value} (entry {bad}) is out of range for a weight of {numel} {of}")
        relation = "appears twice" if value == int(indices[bad - 1]) else "is not above the one before it"
        raise ValueError(f"{name}: index {value} (entry {bad}) {relation}; expected sorted, distinct indices")


def shares(sizes: Sequence[int], total: int, units: Sequence[int] | None = None) -> list[int]:
    """Divide `total` entries over targets in proportion to their sizes (largest remainders, then order).

    Args:
        sizes: entries of each target.
        total: how many to choose of them all.
        units: entries of one column of each target; they divide its size. By default 1.

    Returns:
        How many of each, whole columns. They add up to `total`, or, with columns, to less by less than the largest.

    Raises:
        ValueError: `total` is more than all targets hold.
    """
    units = units or [1] * len(sizes)
    everything = sum(sizes)
    if total > everything:
        raise ValueError(
            f"budget: {total:,} entries were asked for, but the targets hold {everything:,}; lower it or target more modules"
        )
    if everything == 0:
        return [0] * len(sizes)
    counts = [total * size // (everything * unit) * unit for size, unit in zip(sizes, units, strict=True)]
    remainders = [total * size - everything * count for size, count in zip(sizes, counts, strict=True)]
    left = total - sum(counts)
    for i in sorted(range(len(sizes)), key=lambda i: (-Fraction(remainders[i], units[i]), i)):
        if remainders[i] and units[i] <= left:
            counts[i] += units[i]
            left -= units[i]
    return counts
