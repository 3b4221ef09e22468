"""Scores of inputs: what comes into a linear layer, and the gradient at its output, summed over tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .units import CHUNK


def sums_over_tokens(input: Tensor, grad_output: Tensor | None = None) -> Tensor:
    """The sum of the squares of each input; with a gradient, each token times the squared length of its own.

    Args:
        input: `[..., in]`.
        grad_output: `[..., out]`, at the output for this input.

    Returns:
        `[in]`, float64.
    """
    rows = input.detach().reshape(-1, input.shape[-1])
    total = torch.zeros(rows.shape[-1], dtype=torch.float64, device=rows.device)
    if not rows.shape[0]:
        return total
    dtype = torch.promote_types(rows.dtype, torch.float32)
    step = rows.shape[0] if torch.compiler.is_compiling() else max(1, CHUNK // rows.shape[-1])
    if grad_output is None:
        for part in rows.split(step):
            total += part.to(dtype).square().sum(0, dtype=torch.float64)
        return total
    grads = grad_output.detach().reshape(rows.shape[0], -1)
    with torch.autocast(rows.device.type, enabled=False):
        for part, grad in zip(rows.split(step), grads.split(step), strict=True):
            lengths = grad.double().square().sum(1)
            largest = lengths.max().clamp_min(torch.finfo(torch.float64).tiny)  # small gradients do not vanish in float32
            total += (part.to(dtype).square().T @ (lengths / largest).to(dtype)).double() * largest
    return total


def scored(output: Tensor, input: Tensor, scores: Tensor) -> Tensor:
    """The output of a linear layer, whose backward adds to the gradient of `scores` what `sums_over_tokens` gives.

    A graph that is compiled does so too, and a layer that is computed again in backward is counted once.

    Args:
        output: `[..., out]`.
        input: `[..., in]`, kept whole until then.
        scores: `[in]`, float64, a leaf.
    """
    return _Scored.apply(output, input, scores)


class _Scored(torch.autograd.Function):
    """Forward: a copy of the output, which may be changed in place.  Backward: its gradient, and the sums."""

    @staticmethod
    def forward(ctx, output, input, scores):
        ctx.save_for_backward(input)
        return output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (input,) = ctx.saved_tensors
        return grad_output, None, sums_over_tokens(input, grad_output)
