"""The operators, each with a wrapper that checks what it is given. The dispatcher picks C++, CUDA or `reference.py`.

Sizes used below: `T` tokens, `out` and `in` features, `nnz` chosen entries. `indices` are flat positions in the
row-major weight, sorted, unique, int32 (int64 where the weight has 2**31 entries or more). They are proven once, when
a pattern is built or loaded; the operators check only what costs O(1).

What writes entries also takes whole columns of a weight `[rows, columns, ...]`: `indices` are the numbers `[c]` of columns then,
and the `nnz` entries all those of `weight[:, indices]`, in the order of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .checks import (
    check_base,
    check_draw,
    check_embedding_grad,
    check_entries,
    check_lists,
    check_product,
    check_sddmm,
    check_weight,
)
from .dtypes import accumulation_dtype
from .products import may_lack_product
from .schedule import Schedule
from .schemas import ON_BLAS as ON_BLAS
from .schemas import SCHEMAS as SCHEMAS


def sddmm(grad_output: Tensor, input: Tensor, indices: Tensor, schedule: Schedule | None = None) -> Tensor:
    """Sampled dense-dense matmul: the chosen entries of `grad_output.T @ input`, and no others.

    Args:
        grad_output: `[T, out]`, float32, bfloat16, float16, or float64 on the CPU.
        input: `[T, in]`, same dtype and device.
        indices: `[nnz]`, flat positions `row * in + column`, sorted.
        schedule: how a GPU walks this pattern (`sprand.kernels.schedule.make_schedule`); without one a slower kernel for any
            pattern serves there. Where the schedule says so, `sddmm_dense` serves instead.

    Returns:
        `[nnz]`, float32 (float64 for float64 input), summed over tokens in a fixed order.

    Raises:
        ValueError: A shape, dtype or device does not fit.
    """
    check_sddmm("sddmm", grad_output, input, indices)
    if schedule is None:
        return torch.ops.sprand.sddmm(grad_output, input, indices)
    first, last = schedule.dense_tokens
    if first <= input.shape[0] < last:
        return sddmm_dense(grad_output, input, indices, schedule)
    return torch.ops.sprand.sddmm(grad_output, input, indices, schedule.table, schedule.launch)


def sddmm_dense(grad_output: Tensor, input: Tensor, indices: Tensor, schedule: Schedule) -> Tensor:
    """`sddmm` by dense products: row chunks of the gradient that stay in a GPU's L2, each gathered at once; never a whole one.

    Args:
        grad_output, input, indices: as for `sddmm`.
        schedule: of this pattern; its chunks are used.

    Returns:
        `[nnz]`, float32 (float64 for float64 input).

    Raises:
        ValueError: A shape, dtype or device does not fit.
    """
    check_sddmm("sddmm_dense", grad_output, input, indices)
    parts = []
    for first_row, last_row, first, last in schedule.chunks:
        offset = first_row * input.shape[1]
        chosen = indices[first:last] - offset if offset else indices[first:last]
        parts.append(torch.ops.sprand.gather(linear_grad(grad_output[:, first_row:last_row], input), chosen))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = False) -> Tensor:
    """`torch.nn.functional.linear` without autograd, at the speed of float32 at least.

    On a CPU without instructions for 16 bits it is computed in float32 and rounded once. The operator asks for them at each call,
    also where a graph was compiled.

    Args:
        input: `[..., in]`.
        weight: `[out, in]`, or `[in, out]` if transposed. It is cast to the dtype of `input`.
        bias: `[out]` in the dtype of `input`, or None.
        transposed: see weight.

    Returns:
        `[..., out]` in the dtype of `input`.

    Raises:
        ValueError: A shape does not fit.
    """
    features = weight.shape[::-1] if transposed else weight.shape
    if len(features) != 2 or input.shape[-1:] != features[1:]:
        raise ValueError(f"linear: expected input [..., in] and weight [out, in], got {list(input.shape)} and {list(features)}")
    in_graph = torch.compiler.is_compiling() and may_lack_product(input)
    return (torch.ops.sprand.linear if in_graph else reference.linear)(input, weight, bias, transposed)


def linear_grad(grad_output: Tensor, input: Tensor) -> Tensor:
    """The gradient of the weight of a linear layer, `grad_output.T @ input`, summed in the accumulation dtype.

    The layer may be a part of one: some rows of a weight, or the columns of some input features. It is BLAS's product; of 16
    bits on a CPU, where BLAS would round to them, it is that of `sddmm`, which casts no operand as a whole.

    Args:
        grad_output: `[T, out]`, float32, bfloat16, float16, or float64 on the CPU.
        input: `[T, in]`, same dtype and device.

    Returns:
        `[out, in]`, contiguous, float32 (float64 for float64 input), summed over tokens in a fixed order.

    Raises:
        ValueError: A shape, dtype or device does not fit.
    """
    check_product("linear_grad", grad_output, input)
    if input.dtype == accumulation_dtype(input.dtype):
        return reference.linear_grad(grad_output, input)
    return torch.ops.sprand.linear_grad(grad_output, input)


def linear_input_grad(
    grad_output: Tensor, weight: Tensor, indices: Tensor, base: Tensor, delta: Tensor | None, scale: float, transposed: bool
) -> Tensor:
    """The gradient of the input of a linear layer, `grad_output @ weight`, whose weight is patched first.

    It is `patch_` and a product, as one operator whose result says all: a compiler sees no write, and so keeps no copy of the
    weight for it. That the weight holds the entries afterwards is nothing to rely on.

    Args:
        grad_output: `[T, out]`.
        weight: `[out, in]`, or `[in, out]` if transposed; contiguous. It is cast to the dtype of `grad_output`.
        indices, base, delta, scale: as for `patch_`; columns are inputs, also where transposed.
        transposed: see weight.

    Returns:
        `[T, in]` in the dtype of `grad_output`.

    Raises:
        ValueError: A shape, dtype or device does not fit.
    """
    features = weight.shape[1 if transposed else 0]
    if grad_output.dim() != 2 or grad_output.shape[1] != features:
        raise ValueError(f"linear_input_grad: expected grad_output [T, {features}], got {list(grad_output.shape)}")
    check_weight("linear_input_grad", weight, indices)
    check_base("linear_input_grad", base, reference.inputs_as_columns(weight, transposed), indices)
    if delta is not None:
        check_entries("linear_input_grad", "delta", delta, base, accumulation_dtype(weight.dtype))
    return torch.ops.sprand.linear_input_grad(grad_output, weight, indices, base, delta, scale, transposed)


def embedding_grad(grad_output: Tensor, tokens: Tensor, indices: Tensor, padding_idx: int | None = None) -> Tensor:
    """The chosen entries of the gradient of an embedding: `grad_output` summed over the tokens of an entry's row.

    Nothing as large as the vocabulary is made. A token outside of it meets no entry.

    Args:
        grad_output: `[T, features]`, float32, bfloat16, float16, or float64 on the CPU.
        tokens: `[T]`, int32 or int64, in any order.
        indices: `[nnz]`, flat positions `token * features + column`, sorted.
        padding_idx: this token gives no gradient.

    Returns:
        `[nnz]`, float32 (float64 for float64 input), summed over tokens in a fixed order.

    Raises:
        ValueError: A shape, dtype or device does not fit.
    """
    check_embedding_grad("embedding_grad", grad_output, tokens, indices, padding_idx)
    return torch.ops.sprand.embedding_grad(grad_output, tokens, indices, padding_idx)


def gather(weight: Tensor, indices: Tensor) -> Tensor:
    """`weight.flatten()[indices]`.

    Args:
        weight: contiguous, any shape.
        indices: `[nnz]`, flat positions, sorted.

    Returns:
        `[nnz]` in the dtype of `weight`.

    Raises:
        ValueError: A shape, dtype or device does not fit.
    """
    check_weight("gather", weight, indices)
    return torch.ops.sprand.gather(weight, indices)


def patch_(weight: Tensor, indices: Tensor, base: Tensor, delta: Tensor | None, scale: float = 1.0) -> None:
    """Set `weight.flatten()[indices] = cast(base + scale * delta)`, rounding once, from float32.

    A zero change writes the bits of `base` (also those of -0.0). With `delta=None` all of `base` is put back.

    Args:
        weight: contiguous, any shape; changed in place.
        indices: `[nnz]`, flat positions, sorted; or `[c]`, columns.
        base: `[nnz]`, the original entries, dtype of `weight`.
        delta: `[nnz]` float32 (float64 for a float64 weight), or None.
        scale: factor on `delta`.

    Raises:
        ValueError: A shape, dtype or device does not fit.
    """
    check_weight("patch_", weight, indices)
    check_base("patch_", base, weight, indices)
    if delta is not None:
        check_entries("patch_", "delta", delta, base, accumulation_dtype(weight.dtype))
    torch.ops.sprand.patch_(weight, indices, base, delta, scale)


def patch_all_(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    bases: Sequence[Tensor],
    deltas: Sequence[Tensor] | None,
    scales: Sequence[float],
) -> None:
    """`patch_` of many weights, in one pass (on a GPU one launch for each pair of weight and index dtype).

    Every list has one element per target; all are on one device, and no two weights share memory. Nothing is written
    if one of them is refused.

    Args:
        weights: contiguous, any shape and dtype; changed in place.
        indices: `[nnz]` each, flat positions, sorted; or `[c]`, columns.
        bases: `[nnz]` each, the original entries, dtype of the weight.
        deltas: `[nnz]` each, float32 (float64 for float64 weights), or None: all bases are put back.
        scales: the factor on each delta.

    Raises:
        ValueError: A shape, dtype or device does not fit, or the lists differ in length.
    """
    check_lists("patch_all_", weights, indices, bases, bases if deltas is None else deltas, scales)
    for weight, index, base in zip(weights, indices, bases, strict=True):
        check_weight("patch_all_", weight, index)
        check_base("patch_all_", base, weight, index)
    for weight, base, delta in zip(weights, bases, deltas or (), strict=False):
        check_entries("patch_all_", "delta", delta, base, accumulation_dtype(weight.dtype))
    torch.ops.sprand.patch_all_(weights, indices, bases, deltas, scales)


def patched(base: Tensor, delta: Tensor, scale: float = 1.0) -> Tensor:
    """What `patch_` writes into a weight, `cast(base + scale * delta)`, as a tensor of its own.

    Args:
        base: `[nnz]`.
        delta: `[nnz]`, float32 (float64 for a float64 base).
        scale: factor on `delta`.

    Returns:
        `[nnz]`, dtype of `base`.

    Raises:
        ValueError: A shape, dtype or device does not fit.
    """
    result = base.clone()
    one_column = torch.zeros(min(1, base.numel()), dtype=torch.int32, device=base.device)
    patch_(result.view(1, 1, -1), one_column, base, delta, scale)
    return result


def scatter_add_all_(
    weights: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor], scales: Sequence[float]
) -> None:
    """Add to entries of many weights, in one pass (on a GPU one launch for each pair of weight and index dtype).

    `weight.flatten()[indices] += scale * values`, in float32, rounded once to the dtype of `weight`; where nothing is added the
    bits stay.

    Every list has one element per target; all are on one device, and no two weights share memory. Nothing is written
    if one of them is refused.

    Args:
        weights: contiguous, any shape and dtype; changed in place.
        indices: `[nnz]` each, flat positions, sorted.
        values: `[nnz]` each, float32 (float64 for float64 weights).
        scales: the factor on each of the values.

    Raises:
        ValueError: A shape, dtype or device does not fit, or the lists differ in length.
    """
    check_lists("scatter_add_all_", weights, indices, values, scales)
    for weight, index, value in zip(weights, indices, values, strict=True):
        check_weight("scatter_add_all_", weight, index)
        check_entries("scatter_add_all_", "values", value, index, accumulation_dtype(weight.dtype))
    torch.ops.sprand.scatter_add_all_(weights, indices, values, scales)


def sparse_adamw_(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    bases: Sequence[Tensor],
    deltas: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    scales: Sequence[float],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    grad_coef: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One AdamW step of all deltas and the patch of their weights, in one pass over memory (arXiv 1711.05101).

    Every list has one element per target. `steps[i]` (float32, one element) counts this step already. Weight decay
    pulls a delta to zero, that is its weight to the pre-trained value.

    Args:
        weights: contiguous, any shape; patched in place.
        indices: `[nnz]` each; or `[c]`, columns.
        bases: `[nnz]` each, dtype of the weight.
        deltas, grads, exp_avgs, exp_avg_sqs: `[nnz]` each, float32 (float64 for float64 weights).
        steps: one element each, float32, on the device of the delta.
        scales: the factor between delta and weight.
        lr: a float, or a one-element float32 tensor on the device.
        beta1, beta2, eps, weight_decay, maximize: as in `torch.optim.AdamW`.
        grad_coef: one float32 (float64 for float64 weights) on the device, multiplied into every gradient as it is read
            (clipping, loss scale).
        found_inf: one float32 on the device; when it is not zero nothing is changed.

    Raises:
        ValueError: A shape, dtype or device does not fit, or the lists differ in length.
    """
    check_lists("sparse_adamw_", weights, indices, bases, deltas, grads, exp_avgs, exp_avg_sqs, steps, scales)
    for weight, index, base, *entries in zip(weights, indices, bases, deltas, grads, exp_avgs, exp_avg_sqs, strict=True):
        check_weight("sparse_adamw_", weight, index)
        check_base("sparse_adamw_", base, weight, index)
        for name, value in zip(("delta", "grad", "exp_avg", "exp_avg_sq"), entries, strict=True):
            check_entries("sparse_adamw_", name, value, base, accumulation_dtype(weight.dtype))
    lr_tensor = lr if isinstance(lr, Tensor) else None
    for name, value in (
        *(("step", step) for step in steps),
        ("lr", lr_tensor),
        ("grad_coef", grad_coef),
        ("found_inf", found_inf),
    ):
        if value is not None and (value.numel() != 1 or value.dtype not in (torch.float32, torch.float64)):
            raise ValueError(f"sparse_adamw_: expected {name} as one float32, got {list(value.shape)} of {value.dtype}")
        if value is not None and weights and value.device != weights[0].device:
            raise ValueError(f"sparse_adamw_: expected {name} on {weights[0].device}, got {value.device}")
    torch.ops.sprand.sparse_adamw_(
        weights, indices, bases, deltas, grads, exp_avgs, exp_avg_sqs, steps, scales,
        0.0 if lr_tensor is not None else lr, beta1, beta2, eps, weight_decay, maximize, lr_tensor, grad_coef, found_inf,
    )  # fmt: skip


def stratified_indices_(indices: Tensor, rows: int, cols: int, key: int, run_rows: int = 1, run_cols: int = 1) -> None:
    """Fill `indices` with a stratified draw of positions in a `[rows, cols]` matrix, ascending.

    With runs, what is drawn are runs of `run_rows` adjacent rows and `run_cols` adjacent columns, aligned to their size.

    Args:
        indices: `[nnz]`, int32 or int64, written.
        rows, cols: below 2**32.
        key: 64 bits (as a signed int) that name the draw.
        run_rows, run_cols: size of a run; they divide `rows` and `cols`, and their product divides `nnz`.

    Raises:
        ValueError: There are more entries than the matrix has, the integers are too small for its positions, or runs do not fit.
    """
    check_draw("stratified_indices_", indices, rows * cols)
    if max(rows, cols) >= 2**32:
        raise ValueError(f"stratified_indices_: expected rows and cols below 2**32, got {rows} and {cols}")
    if min(run_rows, run_cols) < 1 or rows % run_rows or cols % run_cols or indices.numel() % (run_rows * run_cols):
        raise ValueError(
            f"stratified_indices_: expected runs that divide rows, cols and nnz, got runs of {run_rows} x {run_cols} in "
            f"{rows} x {cols} for {indices.numel()} entries"
        )
    torch.ops.sprand.stratified_indices_(indices, rows, cols, key, run_rows, run_cols)


def uniform_indices_(indices: Tensor, numel: int, key: int) -> None:
    """Fill `indices` with distinct uniform positions below `numel`, in no order (a keyed permutation of `0..numel-1`).

    Args:
        indices: `[nnz]`, int32 or int64, written.
        numel: below 2**62.
        key: 64 bits (as a signed int) that name the draw.

    Raises:
        ValueError: There are more entries than `numel`, or the integers are too small for its positions.
    """
    check_draw("uniform_indices_", indices, numel)
    torch.ops.sprand.uniform_indices_(indices, numel, key)
