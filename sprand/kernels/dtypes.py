"""The dtypes of the operators: which ones the kernels take, in which one sums are kept, and how a dtype is written in files."""

from __future__ import annotations

import torch

LOW_PRECISION = (torch.float32, torch.bfloat16, torch.float16)  # on every device
HALVES = (torch.bfloat16, torch.float16)
ALL_PRECISIONS = (*LOW_PRECISION, torch.float64)  # on the CPU


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over `dtype` are kept: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype in the words of a file or a table, such as `"bfloat16"`."""
    return str(dtype).removeprefix("torch.")
