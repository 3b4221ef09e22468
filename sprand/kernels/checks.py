"""The checks of an operator's arguments, O(1) each: a ValueError names the operator, what it expected and what it got."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dtypes import ALL_PRECISIONS, LOW_PRECISION


def check_lists(op: str, weights: Sequence[Tensor], *others: Sequence[Tensor] | Sequence[float]) -> None:
    """Prove that all lists are as long as that of the weights, and all weights on one device."""
    lengths = [len(weights), *map(len, others)]
    if len(set(lengths)) != 1:
        raise ValueError(f"{op}: expected lists of one length, one element per target, got lengths {lengths}")
    for weight in weights:
        if weight.device != weights[0].device:
            raise ValueError(f"{op}: expected all weights on {weights[0].device}, got one on {weight.device}")


def check_values(op: str, name: str, value: Tensor, other: Tensor) -> None:
    """Prove a dtype that the device's kernels take, and that `value` has the dtype and device of `other`."""
    device = value.device.type
    allowed = ALL_PRECISIONS if device in ("cpu", "meta") else LOW_PRECISION
    if value.dtype not in allowed:
        names = ", ".join(map(str, allowed))
        raise ValueError(f"{op}: expected {name} of {names} on {device}, got {value.dtype}")
    if value.dtype != other.dtype or value.device != other.device:
        raise ValueError(f"{op}: expected {name} as {other.dtype} on {other.device}, got {value.dtype} on {value.device}")


def check_indices(op: str, indices: Tensor, other: Tensor) -> None:
    """Prove a contiguous vector of int32 or int64 on the device of `other`."""
    if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64) or not indices.is_contiguous():
        raise ValueError(
            f"{op}: expected contiguous indices [nnz] of int32 or int64, got {list(indices.shape)} of {indices.dtype}"
        )
    if indices.device != other.device:
        raise ValueError(f"{op}: expected indices on {other.device}, got {indices.device}")


def check_product(op: str, grad_output: Tensor, input: Tensor) -> None:
    """Prove two matrices of as many tokens, alike in dtype and device."""
    if grad_output.dim() != 2 or input.dim() != 2 or grad_output.shape[0] != input.shape[0]:
        raise ValueError(
            f"{op}: expected grad_output [T, out] and input [T, in], got {list(grad_output.shape)} and {list(input.shape)}"
        )
    check_values(op, "input", input, grad_output)


def check_sddmm(op: str, grad_output: Tensor, input: Tensor, indices: Tensor) -> None:
    """Prove two matrices of as many tokens, alike in dtype and device, and no more indices than their product has entries."""
    check_product(op, grad_output, input)
    check_indices(op, indices, grad_output)
    entries = grad_output.shape[1] * input.shape[1]
    if indices.numel() > entries:
        raise ValueError(f"{op}: expected at most {entries} indices, got {indices.numel()}")


def check_weight(op: str, weight: Tensor, indices: Tensor) -> None:
    """Prove a contiguous weight of a dtype that the device's kernels take, and no more indices than it has entries."""
    check_values(op, "weight", weight, weight)
    check_indices(op, indices, weight)
    if not weight.is_contiguous():
        raise ValueError(f"{op}: expected a contiguous weight, got strides {weight.stride()} for shape {list(weight.shape)}")
    if indices.numel() > weight.numel():
        raise ValueError(f"{op}: expected at most {weight.numel()} indices for a weight of that size, got {indices.numel()}")


def check_entries(op: str, name: str, value: Tensor, like: Tensor, dtype: torch.dtype) -> None:
    """Prove one contiguous value of `dtype` for each element of `like`, beside it."""
    fits = value.shape == like.shape and value.dtype == dtype and value.device == like.device
    if not fits or not value.is_contiguous():
        raise ValueError(
            f"{op}: expected contiguous {name} {list(like.shape)} of {dtype} on {like.device}, "
            f"got {list(value.shape)} of {value.dtype} on {value.device}"
        )


def check_base(op: str, base: Tensor, weight: Tensor, indices: Tensor) -> None:
    """Prove a base value for each index, or for each entry of the columns that indices number."""
    in_columns = weight.dim() > 1 and base.numel() * weight.shape[1] == weight.numel() * indices.numel()
    check_entries(op, "base", base, base if in_columns and base.dim() == 1 else indices, weight.dtype)
    if base.device != weight.device:
        raise ValueError(f"{op}: expected base on {weight.device}, got it on {base.device}")


def check_draw(op: str, indices: Tensor, numel: int) -> None:
    """Prove that `indices` can hold as many distinct positions below `numel`."""
    check_indices(op, indices, indices)
    if indices.numel() > numel:
        raise ValueError(f"{op}: expected at most {numel} entries, got {indices.numel()}")
    if numel > torch.iinfo(indices.dtype).max + 1:
        raise ValueError(f"{op}: expected int64 indices for {numel} positions, got {indices.dtype}")


def check_embedding_grad(op: str, grad_output: Tensor, tokens: Tensor, indices: Tensor, padding_idx: int | None) -> None:
    """Prove a matrix with a row for each of the tokens, and indices into a weight of its width."""
    if grad_output.dim() != 2 or tokens.dim() != 1 or grad_output.shape[0] != tokens.shape[0]:
        raise ValueError(
            f"{op}: expected grad_output [T, features] and tokens [T], got {list(grad_output.shape)} and {list(tokens.shape)}"
        )
    check_values(op, "grad_output", grad_output, grad_output)
    if tokens.dtype not in (torch.int32, torch.int64) or tokens.device != grad_output.device:
        raise ValueError(
            f"{op}: expected tokens of int32 or int64 on {grad_output.device}, got {tokens.dtype} on {tokens.device}"
        )
    check_indices(op, indices, grad_output)
    if indices.numel() and not grad_output.shape[1]:
        raise ValueError(f"{op}: expected no indices for an embedding of 0 features, got {indices.numel()}")
    if padding_idx is not None and padding_idx < 0:
        raise ValueError(f"{op}: expected padding_idx to be a token or None, got {padding_idx}")
