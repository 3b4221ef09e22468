"""Layers as functions: patch the weight, use it as it is, and give its chosen entries a gradient.

Each function writes `weight.flatten()[indices] = cast(base + scale * delta)` before it uses the weight, in forward and
again in backward (a sharded weight is gathered anew there). The write goes through `weight.data`, which has a version
counter of its own: two forwards before one backward are legal. What backward keeps is the input, or the part of it that belongs
to whole columns (`units.py`), and references.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves

from ..kernels import ops
from ..kernels.schedule import Schedule
from .entries import Candidates, Entries, Written
from .scores import scored
from .units import Pattern, Units


class Use(NamedTuple):
    """How a function uses the entries of a weight: all but their tensors, which autograd must see.

    Attributes:
        columns: as in `Pattern`.
        scale: factor on delta.
        written: as in `Entries`; None in a graph that is compiled.
        candidates: as in `Entries`; None in a graph that is compiled.
    """

    columns: Units | None
    scale: float
    written: Written | None
    candidates: Candidates | None

    @classmethod
    def of(cls, entries: Entries) -> Use:
        """The use of these entries by a function that is called now."""
        if torch.compiler.is_compiling():
            return cls(entries.pattern.columns, entries.scale, None, None)
        if entries.written is not None and not torch.is_grad_enabled():
            entries.written.forget()
        return cls(entries.pattern.columns, entries.scale, entries.written, entries.candidates)

    def entries(self, delta: Tensor, chosen: Tensor, base: Tensor) -> Entries:
        """The entries, of their tensors."""
        return Entries(delta, Pattern(chosen, self.columns), base, self.scale, self.written)

    def write(self, weight: Tensor, delta: Tensor, chosen: Tensor, base: Tensor) -> None:
        """Make the weight hold these entries, unless it is known to."""
        if self.written is None or not self.written.holds(weight, delta, self.scale):
            self.entries(delta, chosen, base).ensure(weight)

    def await_backward(self, ctx: Any) -> None:
        """Remember that a gradient of the entries is still to come, as long as its graph is there."""
        if self.written is not None:
            self.written.awaited = weakref.ref(ctx)

    def begin_backward(self) -> None:
        """The gradient comes now; from backward on the weight may hold anything."""
        if self.written is not None:
            self.written.forget()
            self.written.awaited = None

    def to_delta(self, sampled: Tensor, delta: Tensor) -> Tensor:
        """The gradient of delta, from that of the chosen entries."""
        sampled = sampled.to(ops.accumulation_dtype(sampled.dtype))
        return (sampled if self.scale == 1.0 else sampled * self.scale).to(delta.dtype)


class Product(NamedTuple):
    """A product with a weight.

    Attributes:
        cast: the dtype that autocast gives it, or None.
        transposed: whether the weight is `[in, out]`.
        trains: whether gradients are on; without them it is PyTorch's own, to the bit.
        schedule: how a GPU samples its gradient, or None.
    """

    cast: torch.dtype | None
    transposed: bool
    trains: bool = False
    schedule: Schedule | None = None

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`[..., out]` of an input `[..., in]`."""
        if self.trains and input.dtype == (self.cast or weight.dtype):
            return ops.linear(input, weight, bias, self.transposed)
        used = weight if self.cast is None else weight.to(self.cast)
        return F.linear(input, used.t() if self.transposed else used, bias)

    def input_grad(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        """The gradient of the input, of the shape of `grad_output` but for the last dimension."""
        return ops.linear(grad_output, weight, None, not self.transposed)


class Lookup(NamedTuple):
    """A lookup in an embedding; the options are those of `torch.nn.functional.embedding`."""

    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    scale_grad_by_freq: bool

    def __call__(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """`[*tokens.shape, features]`. Rows are scaled down to `max_norm` here, where PyTorch rewrites them in the weight."""
        rows = F.embedding(tokens, weight)
        if self.max_norm is None:
            return rows
        norms = rows.norm(self.norm_type, dim=-1, keepdim=True)
        return torch.where(norms > self.max_norm, rows * (self.max_norm / (norms + 1e-7)), rows)

    def grad_of_rows(self, grad_output: Tensor, tokens: Tensor, vocabulary: int) -> Tensor:
        """What each token gives to the row it looked up, `[T, features]`; the scaling counts as constant, as in PyTorch."""
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        if not self.scale_grad_by_freq:
            return rows
        ones = torch.ones(tokens.shape, device=tokens.device)
        counts = torch.zeros(vocabulary, device=tokens.device).index_add(0, tokens, ones)
        return rows / counts[tokens, None]


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, entries: Entries, transposed: bool = False) -> Tensor:
    """`torch.nn.functional.linear` with a patched weight; the gradient of delta is sampled, never dense.

    Of the input only what that gradient needs is kept for backward: where whole columns train, those features of it; where delta
    needs no gradient, nothing.

    Args:
        input: `[..., in]`.
        weight: `[out, in]`, frozen; `[in, out]` if transposed (Hugging Face's `Conv1D`).
        bias: `[out]` or None.
        entries: the chosen entries of weight.
        transposed: see weight.

    Returns:
        `[..., out]`.
    """
    input, bias, cast = as_autocast(input, bias)
    if _is_written_without_autograd(weight, entries):
        return Product(cast, transposed)(input, weight, bias)
    leading = None
    if bias is not None and input.dim() > 2 and input.is_contiguous():
        # F.linear computes so too, but the view of a result that it returns may not be changed in place
        leading, input = input.shape[:-1], input.flatten(0, -2)
    schedule = None if entries.schedules is None else entries.schedules.of(input.dtype)
    product = Product(cast, transposed, torch.is_grad_enabled(), schedule)
    operands = input, weight, bias, entries.delta, entries.pattern.chosen, entries.base
    output = _Linear.apply(*operands, Use.of(entries), product)
    output = output if leading is None else output.unflatten(0, leading)
    return output if entries.scores is None else scored(output, input, entries.scores)


def as_autocast(input: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, torch.dtype | None]:
    """Input and bias as autocast gives them to a product, and the dtype that it gives to the weight; None where it is off."""
    device = input.device.type
    if not torch.is_autocast_enabled(device):
        return input, bias, None
    cast = torch.get_autocast_dtype(device)
    return input.to(cast), None if bias is None else bias.to(cast), cast


def embedding(
    input: Tensor,
    weight: Tensor,
    entries: Entries,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """`torch.nn.functional.embedding` with a patched weight; the gradient walks the tokens, never the vocabulary.

    Args:
        input: token numbers, any shape.
        weight: `[vocabulary, features]`, frozen.
        entries: the chosen entries of weight.
        padding_idx: this token gives no gradient.
        max_norm: rows of a larger norm are scaled down to it; weight keeps its values.
        norm_type: the p of that norm.
        scale_grad_by_freq: divide the gradient of a row by the number of its tokens.

    Returns:
        `[*input.shape, features]`.
    """
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    lookup = Lookup(padding_idx, max_norm, norm_type, scale_grad_by_freq)
    if _is_written_without_autograd(weight, entries):
        return lookup(input, weight)
    return _Embedding.apply(input, weight, entries.delta, entries.pattern.chosen, entries.base, Use.of(entries), lookup)


def alias(weight: Tensor, entries: Entries, copy: bool = False) -> Tensor:
    """The patched weight itself, as a tensor whose dense gradient is gathered into delta: for any operation.

    Args:
        weight: any shape, frozen.
        entries: the chosen entries of weight.
        copy: leave weight alone, and write into a copy of it, which autograd may keep until backward.

    Returns:
        A view of weight, or of its copy. Its dense gradient exists while backward passes through this one weight.
    """
    if copy:
        weight = weight.clone()
    return _Alias.apply(weight, entries.delta, entries.pattern.chosen, entries.base, Use.of(entries))


def written_in_backward(output: Any, weight: Tensor, entries: Entries) -> None:
    """Have the weight patched when backward comes to `output`, for an operation that reads it there (a convolution).

    Where FSDP2 or ZeRO-3 gathered the weight anew after forward, it holds its base then.

    Args:
        output: what was computed from the alias of `weight`: tensors, in any nest of tuples, lists and dicts.
        weight: the weight itself.
        entries: the chosen entries of weight.
    """
    for node in {tensor.grad_fn for tensor in tree_leaves(output) if isinstance(tensor, Tensor)} - {None}:
        node.register_prehook(lambda grads: entries.ensure(weight))


def _is_written_without_autograd(weight: Tensor, entries: Entries) -> bool:
    """Whether no gradient is wanted; the weight is written then. An autograd function costs more than a small product."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if entries.written is not None:
        entries.written.forget()
    entries.ensure(weight)
    return True


class _Linear(torch.autograd.Function):
    """Forward: y = x W^T + b.  Backward: dx = dy W, ddelta = scale * (dy^T x)[indices] (SDDMM), db = sum dy.

    Of whole columns, the input features F: ddelta = scale * dy^T x[:, F], and of x nothing else is kept.

    Shapes: x [..., in], W [out, in], dy [..., out], delta, base [nnz], chosen: indices [nnz] or F [c].
    """

    @staticmethod
    def forward(ctx, input, weight, bias, delta, chosen, base, use, product):
        use.write(weight, delta, chosen, base)
        use.await_backward(ctx)
        ctx.is_packed = use.columns is not None and use.candidates is None
        kept = None
        if ctx.needs_input_grad[3]:
            kept = input.index_select(-1, chosen) if ctx.is_packed else input
        ctx.save_for_backward(kept, weight, delta, chosen, base)
        ctx.use, ctx.product = use, product
        return product(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        kept, weight, delta, chosen, base = ctx.saved_tensors
        use, product = ctx.use, ctx.product
        is_compiling = torch.compiler.is_compiling()
        if not is_compiling:
            use.write(weight, delta, chosen, base)
        use.begin_backward()
        grad_input = grad_bias = grad_delta = None
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        if ctx.needs_input_grad[3]:  # first: what comes from the layer behind is in the cache still
            columns = kept.reshape(-1, kept.shape[-1])
            left, right = (columns, rows) if product.transposed else (rows, columns)
            if ctx.is_packed:
                sampled = ops.linear_grad(left, right).flatten()
            else:
                sampled = ops.sddmm(left, right, Pattern(chosen, use.columns).indices, product.schedule)
            grad_delta = use.to_delta(sampled, delta)
            if use.candidates is not None:
                use.candidates.add_linear(left, right)
        if ctx.needs_input_grad[0]:
            if is_compiling:  # a write of its own would be moved to forward, which would keep a copy of the weight for it
                grad_rows = use.entries(delta, chosen, base).input_grad(rows, weight, product.transposed)
            else:
                grad_rows = product.input_grad(rows, weight)
            grad_input = grad_rows.view(*grad_output.shape[:-1], grad_rows.shape[-1])
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_input, None, grad_bias, grad_delta, None, None, None, None


class _Embedding(torch.autograd.Function):
    """Forward: y = W[tokens].  Backward: ddelta[p] = scale * sum of dy[t, column p] over the tokens t of row p.

    Of whole columns, the features F, it is the gradient of an embedding that has no others.

    Shapes: tokens any, W [vocabulary, features], dy [*tokens.shape, features], delta, base [nnz], chosen: indices [nnz] or F [c].
    """

    @staticmethod
    def forward(ctx, tokens, weight, delta, chosen, base, use, lookup):
        use.write(weight, delta, chosen, base)
        use.await_backward(ctx)
        ctx.save_for_backward(tokens, delta, chosen)
        ctx.use, ctx.lookup, ctx.vocabulary = use, lookup, weight.shape[0]
        return lookup(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        tokens, delta, chosen = ctx.saved_tensors
        use, lookup = ctx.use, ctx.lookup
        use.begin_backward()
        grad_delta = None
        if ctx.needs_input_grad[2]:
            tokens = tokens.flatten()
            rows = lookup.grad_of_rows(grad_output, tokens, ctx.vocabulary)
            if use.columns is None:
                sampled = ops.embedding_grad(rows, tokens, chosen, lookup.padding_idx)
            else:
                packed = rows.index_select(-1, chosen).to(delta.dtype)
                padding_idx = -1 if lookup.padding_idx is None else lookup.padding_idx
                sampled = torch.ops.aten.embedding_dense_backward(packed, tokens, ctx.vocabulary, padding_idx, False).flatten()
            grad_delta = use.to_delta(sampled, delta)
            if use.candidates is not None:
                use.candidates.add_embedding(rows, tokens, ctx.vocabulary, lookup.padding_idx)
        return None, None, grad_delta, None, None, None, None


class _Alias(torch.autograd.Function):
    """Forward: W itself.  Backward: ddelta = scale * dW.flatten()[indices].

    Shapes: W any, delta, base [nnz], chosen: indices [nnz] or columns [c].
    """

    @staticmethod
    def forward(ctx, weight, delta, chosen, base, use):
        use.write(weight, delta, chosen, base)
        use.await_backward(ctx)
        ctx.save_for_backward(delta, chosen)
        ctx.use = use
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        delta, chosen = ctx.saved_tensors
        use = ctx.use
        use.begin_backward()
        grad_output = grad_output.contiguous()
        if use.candidates is not None:
            use.candidates.add_dense(grad_output)
        return None, use.to_delta(Pattern(chosen, use.columns).gather(grad_output), delta), None, None, None
