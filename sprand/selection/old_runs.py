"""Draws in runs of adjacent entries, layouts of sprand 0.1.0: the seed of a file from then still names its entries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import ops
from ..layers.units import index_dtype
from .pattern import LONGEST_ROW, RANDOM_STRATEGIES, draw, draw_key, stratified_vector_

RUNS = {"run2": (2, 1), "run4": (4, 1), "run8": (1, 8)}  # rows and columns of a run


def are_runs(layout: Any) -> bool:
    """Whether a file names a layout of runs."""
    return isinstance(layout, str) and layout in RUNS


def draw_runs(strategy: str, name: str, shape: Sequence[int], nnz: int, seed: int, layout: str) -> Tensor:
    """The entries that a layout of runs drew.

    A weight of fewer than two dimensions, or whose rows or columns are no multiple of the run, was drawn as single entries.

    Args:
        strategy: `"random"` or `"uniform"`.
        name: of the parameter.
        shape: of the weight, seen as a matrix `[shape[0], everything else]`.
        nnz: number of entries.
        seed: of the draw.
        layout: a name in `RUNS`.

    Returns:
        `[nnz]`, flat, sorted, distinct, int32 (int64 from 2**31 entries).

    Raises:
        ValueError: The strategy is no random draw, there are more entries than the weight has, or a part of a run.
    """
    if strategy not in RANDOM_STRATEGIES:
        raise ValueError(f"expected a random strategy, one of {', '.join(RANDOM_STRATEGIES)}, got {strategy!r}")
    numel, (run_rows, run_cols) = math.prod(shape), RUNS[layout]
    rows = shape[0] if len(shape) > 1 else 1
    cols = numel // max(rows, 1)
    if len(shape) < 2 or rows % run_rows or cols % run_cols:
        return draw(strategy, name, shape, nnz, seed)
    run = run_rows * run_cols
    if nnz % run:
        raise ValueError(f"{name}: expected whole runs of {run} entries (layout {layout}), got {nnz} entries")
    key = draw_key(f"{strategy} {layout}", name, shape, seed)
    if strategy == "random" and max(rows, cols) <= LONGEST_ROW:
        indices = torch.empty(nnz, dtype=index_dtype(numel))
        ops.stratified_indices_(indices, rows, cols, key, run_rows, run_cols)
        return indices
    runs = torch.empty(nnz // run, dtype=index_dtype(numel))
    fill = ops.uniform_indices_ if strategy == "uniform" else stratified_vector_
    fill(runs, numel // run, key)
    step = cols if run_rows > 1 else 1  # from one entry of a run to the next
    first = runs // step * (run * step) + runs % step
    offsets = torch.arange(run, dtype=runs.dtype) * step
    return (first[:, None] + offsets).flatten().sort().values
