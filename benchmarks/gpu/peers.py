"""Other implementations of the sampled product, as calls with everything prepared that a training step could prepare once."""

from __future__ import annotations

import torch
from torch import Tensor

from timing import Call


def sampled_addmm(grad_output: Tensor, input: Tensor, indices: Tensor) -> Call:
    """PyTorch's own, on cuSPARSE: float32, and a transposed gradient as a view."""
    pattern = _csr(indices, grad_output.shape[1], input.shape[1])
    zeros = torch.zeros(len(indices), device=input.device)
    mask = torch.sparse_csr_tensor(*pattern, zeros, size=(grad_output.shape[1], input.shape[1]), check_invariants=False)
    return lambda: torch.sparse.sampled_addmm(mask, grad_output.t(), input, beta=0.0).values()


def spops(grad_output: Tensor, input: Tensor, indices: Tensor) -> Call:
    """spops (IST-DASLab), the kernels of RoSA: float32, both operands transposed to be contiguous over tokens in every step.

    Raises:
        ImportError: it is not installed.
    """
    import spops as package

    offsets, columns = _csr(indices, grad_output.shape[1], input.shape[1])
    rows = offsets.diff().argsort(descending=True).to(torch.int16)
    columns = columns.to(torch.int16)
    return lambda: package.sddmm(offsets, rows, columns, grad_output.t().contiguous(), input.t().contiguous(), backend="sputnik")


def _csr(indices: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Row offsets and columns, int32, of sorted flat positions."""
    row = indices.long() // columns
    offsets = torch.zeros(rows + 1, dtype=torch.int32, device=indices.device)
    offsets[1:] = torch.bincount(row, minlength=rows).cumsum(0)
    return offsets, (indices.long() % columns).int()
