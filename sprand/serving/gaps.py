"""Ascending positions as gaps of a byte: few where many entries of those that train have changed."""

from __future__ import annotations

import torch
from torch import Tensor

SKIP = 255  # a byte that is no position, and stands for as many entries


def coded(positions: Tensor) -> Tensor:
    """Positions as bytes: of each, how many entries lie between it and the one before, with a `SKIP` for every 255 of them.

    Args:
        positions: `[n]`, ascending, int64.

    Returns:
        `[bytes]`, uint8, on the same device: n and one more for each `SKIP`.
    """
    if not positions.numel():
        return torch.empty(0, dtype=torch.uint8, device=positions.device)
    gaps = torch.diff(positions, prepend=positions.new_tensor([-1])) - 1
    ends = torch.cumsum(gaps // SKIP + 1, 0) - 1
    result = torch.full((int(ends[-1]) + 1,), SKIP, dtype=torch.uint8, device=positions.device)
    result[ends] = (gaps % SKIP).to(torch.uint8)
    return result


def positions_of(gaps: Tensor) -> Tensor:
    """The positions `[n]`, int64, that were coded to these bytes."""
    is_position = gaps != SKIP
    return (torch.cumsum(gaps.long() + is_position, 0) - 1)[is_position]
