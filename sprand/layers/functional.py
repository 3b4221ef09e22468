"""Layers as functions: patch the weight, use it as it is, and give its chosen entries a gradient.

Each function writes `weight.flatten()[indices] = cast(base + scale * delta)` before it uses the weight, in forward and
again in backward (a sharded weight is gathered anew there). The write goes through `weight.data`, which has a version
counter of its own: two forwards before one backward are legal. What backward keeps is the input and references.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves

from ..kernels import ops
from ..kernels.schedule import Schedule
from .sharding import is_dtensor


class Candidates(Protocol):
    """Looks for entries to grow: sees the gradient of a whole weight in backward, in the form in which a layer has it."""

    def add_linear(self, grad_output: Tensor, input: Tensor) -> None:
        """The gradient is `grad_output.T @ input`: `[T, out]` and `[T, in]`."""

    def add_embedding(self, grad_output: Tensor, tokens: Tensor, vocabulary: int, padding_idx: int | None) -> None:
        """The gradient of row `v` is the sum of `grad_output[t]`, `[T, features]`, over the tokens `[T]` that are `v`."""

    def add_dense(self, grad: Tensor) -> None:
        """The gradient itself, contiguous, of the weight's shape."""


class Written:
    """Remembers that a weight holds its delta, so that a write can be left out.

    Only `SparseAdamW` declares it, since it has just written the weight. It ends when delta's version moves, at a
    forward without gradients (so an evaluation always writes) and at the next backward (so any other optimizer, also
    one that does not move the version, is followed by a write).
    """

    __slots__ = ("version",)

    def __init__(self) -> None:
        self.version: int | None = None

    def declare(self, delta: Tensor) -> None:
        self.version = delta._version

    def forget(self) -> None:
        self.version = None

    def holds(self, delta: Tensor) -> bool:
        return self.version is not None and self.version == delta._version


@dataclass
class Entries:
    """The chosen entries of one weight.

    Attributes:
        delta: `[nnz]`, float32 (float64 for a float64 weight), the trained change.
        indices: `[nnz]`, flat positions, sorted.
        base: `[nnz]`, the original entries, in the weight's dtype.
        scale: factor on delta.
        written: shared by all uses of the weight, or None to write every time.
        schedule: how a GPU samples the gradient of a linear layer, or None.
        candidates: sees the gradient of the whole weight in backward, chunk by chunk, or None.
    """

    delta: Tensor
    indices: Tensor
    base: Tensor
    scale: float = 1.0
    written: Written | None = None
    schedule: Schedule | None = None
    candidates: Candidates | None = None

    def values(self) -> Tensor:
        """What the weight holds at the chosen entries, `[nnz]` in its dtype: cast(base + scale * delta)."""
        return ops.patched(self.base, self.delta.detach().to(ops.accumulation_dtype(self.base.dtype)), self.scale)

    def write(self, weight: Tensor) -> None:
        """Make the chosen entries of `weight` hold base + scale * delta.

        A weight of another dtype than base is one that FSDP2 cast for its mixed precision: the sum is rounded once, to it.
        """
        delta = self.delta.detach().to(ops.accumulation_dtype(self.base.dtype))
        if self.base.dtype == weight.dtype:
            ops.patch_(weight.data, self.indices, self.base, delta, self.scale)
        else:
            ops.patch_(weight.data, self.indices, (self.base + self.scale * delta).to(weight.dtype), None)

    def restore(self, weight: Tensor) -> None:
        """Make the chosen entries of `weight` hold base, bit for bit."""
        if self.written is not None:
            self.written.forget()
        ops.patch_(weight.data, self.indices, self.base.to(weight.dtype), None)


def write_all(weights: Sequence[Tensor], entries: Sequence[Entries], trained: bool) -> None:
    """`Entries.write` (or `restore`, where not `trained`) of many weights of one device, in one pass."""
    deltas = None
    if trained:
        deltas = [e.delta.detach().to(ops.accumulation_dtype(w.dtype)) for w, e in zip(weights, entries, strict=True)]
    else:
        for e in entries:
            if e.written is not None:
                e.written.forget()
    ops.patch_all_(
        [weight.data for weight in weights],
        [e.indices for e in entries],
        [e.base for e in entries],
        deltas,
        [e.scale for e in entries],
    )


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, entries: Entries, transposed: bool = False) -> Tensor:
    """`torch.nn.functional.linear` with a patched weight; the gradient of delta is sampled, never dense.

    Args:
        input: `[..., in]`.
        weight: `[out, in]`, frozen; `[in, out]` if transposed (Hugging Face's `Conv1D`).
        bias: `[out]` or None.
        entries: the chosen entries of weight.
        transposed: see weight.

    Returns:
        `[..., out]`.
    """
    cast = None
    device = input.device.type
    if torch.is_autocast_enabled(device):
        cast = torch.get_autocast_dtype(device)
        input = input.to(cast)
        bias = None if bias is None else bias.to(cast)
    if _written_without_autograd(weight, entries):
        return _product(input, weight, bias, cast, transposed)
    leading = None
    if bias is not None and input.dim() > 2 and input.is_contiguous():
        # F.linear computes so too, but the view of a result that it returns may not be changed in place
        leading, input = input.shape[:-1], input.flatten(0, -2)
    output = _Linear.apply(
        input, weight, bias, entries.delta, entries.indices, entries.base, entries.scale, cast, transposed, _written(entries),
        entries.schedule, _candidates(entries),
    )  # fmt: skip
    return output if leading is None else output.unflatten(0, leading)


def embedding(input: Tensor, weight: Tensor, entries: Entries, padding_idx: int | None = None) -> Tensor:
    """`torch.nn.functional.embedding` with a patched weight; the gradient walks the tokens, never the vocabulary.

    Args:
        input: token numbers, any shape.
        weight: `[vocabulary, features]`, frozen.
        entries: the chosen entries of weight.
        padding_idx: this token gives no gradient.

    Returns:
        `[*input.shape, features]`.
    """
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    if _written_without_autograd(weight, entries):
        return F.embedding(input, weight)
    return _Embedding.apply(
        input, weight, entries.delta, entries.indices, entries.base, entries.scale, padding_idx, _written(entries),
        _candidates(entries),
    )  # fmt: skip


def alias(weight: Tensor, entries: Entries, copy: bool = False) -> Tensor:
    """The patched weight itself, as a tensor whose dense gradient is gathered into delta: for any operation.

    Args:
        weight: any shape, frozen.
        entries: the chosen entries of weight.
        copy: leave weight alone, and write into a copy of it, which autograd may keep until backward.

    Returns:
        A view of weight, or of its copy. Its dense gradient exists while backward passes through this one weight.
    """
    return _Alias.apply(
        weight.clone() if copy else weight,
        entries.delta,
        entries.indices,
        entries.base,
        entries.scale,
        _written(entries),
        _candidates(entries),
    )


def written_in_backward(output: Any, weight: Tensor, entries: Entries) -> None:
    """Have the weight patched when backward comes to `output`, for an operation that reads it there (a convolution).

    Where FSDP2 or ZeRO-3 gathered the weight anew after forward, it holds its base then.

    Args:
        output: what was computed from the alias of `weight`: tensors, in any nest of tuples, lists and dicts.
        weight: the weight itself.
        entries: the chosen entries of weight.
    """
    arguments = weight, entries.delta, entries.indices, entries.base, entries.scale, _written(entries)
    for node in {tensor.grad_fn for tensor in tree_leaves(output) if isinstance(tensor, Tensor)} - {None}:
        node.register_prehook(lambda grads: _write(*arguments))


def _written(entries: Entries) -> Written | None:
    if torch.compiler.is_compiling():
        return None
    if entries.written is not None and not torch.is_grad_enabled():
        entries.written.forget()
    return entries.written


def _candidates(entries: Entries) -> Candidates | None:
    return None if torch.compiler.is_compiling() else entries.candidates


def _write(weight: Tensor, delta: Tensor, indices: Tensor, base: Tensor, scale: float, written: Written | None) -> None:
    if is_dtensor(weight):
        raise ValueError(
            "expected a whole weight in a forward pass, got a DTensor: sprand does not train models under tensor parallelism; "
            "shard the model by torch.distributed.fsdp.fully_shard over one mesh dimension instead"
        )
    if written is None or not written.holds(delta):
        Entries(delta, indices, base, scale).write(weight)


def _written_without_autograd(weight: Tensor, entries: Entries) -> bool:
    """Whether no gradient is wanted; the weight is written then. An autograd function costs more than a small product."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    _write(weight, entries.delta, entries.indices, entries.base, entries.scale, _written(entries))
    return True


def _product(input: Tensor, weight: Tensor, bias: Tensor | None, cast: torch.dtype | None, transposed: bool) -> Tensor:
    used = weight if cast is None else weight.to(cast)
    return F.linear(input, used.t() if transposed else used, bias)


class _Linear(torch.autograd.Function):
    """Forward: y = x W^T + b.  Backward: dx = dy W, ddelta = scale * (dy^T x)[indices] (SDDMM), db = sum dy.

    Shapes: x [..., in], W [out, in], dy [..., out], delta, indices, base [nnz].
    """

    @staticmethod
    def forward(ctx, input, weight, bias, delta, indices, base, scale, cast, transposed, written, schedule, candidates):
        _write(weight, delta, indices, base, scale, written)
        ctx.save_for_backward(input, weight, delta, indices, base)
        ctx.scale, ctx.cast, ctx.transposed = scale, cast, transposed
        ctx.written, ctx.schedule, ctx.candidates = written, schedule, candidates
        return _product(input, weight, bias, cast, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        input, weight, delta, indices, base = ctx.saved_tensors
        _write(weight, delta, indices, base, ctx.scale, ctx.written)
        if ctx.written is not None:
            ctx.written.forget()
        used = weight if ctx.cast is None else weight.to(ctx.cast)
        grad_input = grad_bias = grad_delta = None
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        if ctx.needs_input_grad[0]:
            grad_input = (rows @ (used.t() if ctx.transposed else used)).view(input.shape)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        if ctx.needs_input_grad[3]:
            columns = input.reshape(-1, input.shape[-1])
            left, right = (columns, rows) if ctx.transposed else (rows, columns)
            grad_delta = _to_delta(ops.sddmm(left, right, indices, ctx.schedule), delta, ctx.scale)
            if ctx.candidates is not None:
                ctx.candidates.add_linear(left, right)
        return grad_input, None, grad_bias, grad_delta, *(None,) * 8


class _Embedding(torch.autograd.Function):
    """Forward: y = W[tokens].  Backward: ddelta[p] = scale * sum of dy[t, column p] over the tokens t of row p.

    Shapes: tokens any, W [vocabulary, features], dy [*tokens.shape, features], delta, indices, base [nnz].
    """

    @staticmethod
    def forward(ctx, tokens, weight, delta, indices, base, scale, padding_idx, written, candidates):
        _write(weight, delta, indices, base, scale, written)
        ctx.save_for_backward(tokens, delta, indices)
        ctx.scale, ctx.padding_idx, ctx.vocabulary = scale, padding_idx, weight.shape[0]
        ctx.written, ctx.candidates = written, candidates
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        tokens, delta, indices = ctx.saved_tensors
        if ctx.written is not None:
            ctx.written.forget()
        if not ctx.needs_input_grad[2]:
            return (None,) * 9
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        sampled = ops.embedding_grad(rows, tokens.flatten(), indices, ctx.padding_idx)
        if ctx.candidates is not None:
            ctx.candidates.add_embedding(rows, tokens.flatten(), ctx.vocabulary, ctx.padding_idx)
        return None, None, _to_delta(sampled, delta, ctx.scale), *(None,) * 6


class _Alias(torch.autograd.Function):
    """Forward: W itself.  Backward: ddelta = scale * dW.flatten()[indices].  Shapes: W any, delta, indices, base [nnz]."""

    @staticmethod
    def forward(ctx, weight, delta, indices, base, scale, written, candidates):
        _write(weight, delta, indices, base, scale, written)
        ctx.save_for_backward(delta, indices)
        ctx.scale, ctx.written, ctx.candidates = scale, written, candidates
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        delta, indices = ctx.saved_tensors
        if ctx.written is not None:
            ctx.written.forget()
        grad_output = grad_output.contiguous()
        if ctx.candidates is not None:
            ctx.candidates.add_dense(grad_output)
        return None, _to_delta(ops.gather(grad_output, indices), delta, ctx.scale), *(None,) * 5


def _to_delta(grad: Tensor, delta: Tensor, scale: float) -> Tensor:
    grad = grad.to(ops.accumulation_dtype(grad.dtype))
    return (grad if scale == 1.0 else grad * scale).to(delta.dtype)
