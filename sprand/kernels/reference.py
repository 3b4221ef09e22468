"""The operators of `ops.py` in plain PyTorch: what every device falls back to, and what the kernels are tested against.

Each function has the parameters of its schema. The formulas are those of `csrc/entry_math.h` and `csrc/pattern_math.h`;
the positions equal the C++ ones bit for bit, with 32-bit unsigned arithmetic carried out in int64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import products
from .dtypes import accumulation_dtype

PRODUCTS_AT_ONCE = 1 << 21  # sddmm and embedding_grad hold this many addends of their sums over tokens at a time
TOKENS_AT_ONCE = 256  # linear_grad casts the operands of so many
DRAWS_AT_ONCE = 1 << 20


@torch.no_grad()
def sddmm(grad_output: Tensor, input: Tensor, indices: Tensor, table: Tensor | None = None, launch: Sequence[int] = ()) -> Tensor:
    """`(grad_output.T @ input).flatten()[indices]`, a bounded number of columns at a time; needs no schedule."""
    tokens, cols = input.shape
    dtype = accumulation_dtype(input.dtype)
    result = input.new_empty(indices.shape, dtype=dtype)
    for part in _parts(indices.numel(), max(1, PRODUCTS_AT_ONCE // max(1, tokens))):
        left = grad_output.index_select(1, indices[part] // cols).to(dtype)
        right = input.index_select(1, indices[part] % cols).to(dtype)
        result[part] = left.mul_(right).sum(0)
    return result


@torch.no_grad()
def linear(input: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool = False) -> Tensor:
    """`F.linear`, in float32 where a CPU has no product of such operands, which is asked at each call."""
    if products.lacks_product(input):
        return products.linear_in_float32(input, weight, bias, transposed)
    used = weight.to(input.dtype)
    return F.linear(input, used.t() if transposed else used, bias)


@torch.no_grad()
def linear_grad(grad_output: Tensor, input: Tensor) -> Tensor:
    """`grad_output.T @ input`; operands of 16 bits are multiplied in the accumulation dtype, a block of tokens at a time."""
    dtype = accumulation_dtype(input.dtype)
    if input.dtype == dtype:
        return _product(grad_output, input)
    if input.is_cuda:
        return torch.mm(grad_output.t(), input, out_dtype=dtype)
    result = input.new_zeros((grad_output.shape[1], input.shape[1]), dtype=dtype)
    for part in _parts(input.shape[0], TOKENS_AT_ONCE):
        result += _product(grad_output[part].to(dtype), input[part].to(dtype))
    return result


@torch.no_grad()
def linear_input_grad(
    grad_output: Tensor, weight: Tensor, indices: Tensor, base: Tensor, delta: Tensor | None, scale: float, transposed: bool
) -> Tensor:
    """`grad_output @ weight` after `patch_`, which is the one that serves the weight's device; inputs are columns to it."""
    torch.ops.sprand.patch_(inputs_as_columns(weight, transposed), indices, base, delta, scale)
    return linear(grad_output, weight, None, not transposed)


def inputs_as_columns(weight: Tensor, transposed: bool) -> Tensor:
    """The weight of a linear layer as `patch_` takes it, whose columns are the layer's inputs."""
    return weight[None] if transposed else weight


@torch.no_grad()
def embedding_grad(grad_output: Tensor, tokens: Tensor, indices: Tensor, padding_idx: int | None = None) -> Tensor:
    """The sums over the tokens of an entry's row, a bounded number of pairs (entry, token of its row) at a time."""
    features = grad_output.shape[1]
    result = grad_output.new_zeros(indices.shape, dtype=accumulation_dtype(grad_output.dtype))
    if indices.numel() == 0:
        return result
    rows, columns = indices.long() // features, indices % features
    sorted_tokens, order = tokens.long().sort(stable=True)
    begin = torch.searchsorted(sorted_tokens, rows)
    count = torch.searchsorted(sorted_tokens, rows, right=True) - begin
    if padding_idx is not None:
        count[rows == padding_idx] = 0
    end = count.cumsum(0)
    for part in _parts(int(end[-1]), PRODUCTS_AT_ONCE):
        pair = torch.arange(part.start, part.stop, device=indices.device)
        entry = torch.searchsorted(end, pair, right=True)
        token = order[begin[entry] + count[entry] - end[entry] + pair]
        result.index_add_(0, entry, grad_output[token, columns[entry]].to(result.dtype))
    return result


@torch.no_grad()
def gather(weight: Tensor, indices: Tensor) -> Tensor:
    """`weight.flatten()[indices]`."""
    return weight.view(-1).index_select(0, indices)


@torch.no_grad()
def patch_(weight: Tensor, indices: Tensor, base: Tensor, delta: Tensor | None, scale: float = 1.0) -> None:
    """`weight.flatten()[indices] = cast(base + scale * delta)`; the bits of `base` where nothing is added."""
    _set(weight, indices, base if delta is None else _patched(base, delta, scale))


@torch.no_grad()
def patch_all_(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    bases: Sequence[Tensor],
    deltas: Sequence[Tensor] | None,
    scales: Sequence[float],
) -> None:
    """`patch_` of every weight."""
    changes = [None] * len(weights) if deltas is None else deltas
    for arguments in zip(weights, indices, bases, changes, scales, strict=True):
        patch_(*arguments)


@torch.no_grad()
def scatter_add_all_(
    weights: Sequence[Tensor], indices: Sequence[Tensor], values: Sequence[Tensor], scales: Sequence[float]
) -> None:
    """`weight.flatten()[indices] = cast(weight.flatten()[indices] + scale * values)`, of every weight."""
    for weight, index, value, scale in zip(weights, indices, values, scales, strict=True):
        _set(weight, index, _patched(gather(weight, index), value, scale))


@torch.no_grad()
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
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    lr_tensor: Tensor | None = None,
    grad_coef: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One AdamW step of every delta, then the patch of its weight; nothing at all where `found_inf` is not zero."""
    for weight, index, base, delta, grad, exp_avg, exp_avg_sq, step, scale in zip(
        weights, indices, bases, deltas, grads, exp_avgs, exp_avg_sqs, steps, scales, strict=True
    ):
        wide = torch.float32 if delta.device.type == "mps" else torch.float64
        count = step.reshape(()).to(wide)
        rate = lr if lr_tensor is None else lr_tensor.reshape(()).to(wide)
        step_size = rate / (1 - beta1**count)
        inv_sqrt_bias2 = 1 / (1 - beta2**count).sqrt()

        g = -grad if maximize else grad
        if grad_coef is not None:
            g = g * grad_coef.reshape(())
        new_exp_avg = exp_avg.lerp(g, 1 - beta1)
        new_exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * (g * g)
        denominator = new_exp_avg_sq.sqrt() * inv_sqrt_bias2 + eps
        new_delta = delta * (1 - rate * weight_decay) - step_size * (new_exp_avg / denominator)
        new_entries = _patched(base, new_delta, scale)

        if found_inf is not None:
            skip = found_inf.reshape(()) != 0
            new_exp_avg = torch.where(skip, exp_avg, new_exp_avg)
            new_exp_avg_sq = torch.where(skip, exp_avg_sq, new_exp_avg_sq)
            new_delta = torch.where(skip, delta, new_delta)
            now = _columns(weight, index, base).index_select(1, index).flatten()
            new_entries = torch.where(skip, now, new_entries)
        exp_avg.copy_(new_exp_avg)
        exp_avg_sq.copy_(new_exp_avg_sq)
        delta.copy_(new_delta)
        _set(weight, index, new_entries)


@torch.no_grad()
def stratified_indices_(indices: Tensor, rows: int, cols: int, key: int, run_rows: int = 1, run_cols: int = 1) -> None:
    """A stratified draw of `len(indices)` positions of a `[rows, cols]` matrix, ascending, in runs of adjacent entries."""
    nnz = indices.numel()
    if nnz == 0:
        return
    run = run_rows * run_cols
    rows, cols = rows // run_rows, cols // run_cols  # of the matrix of runs
    per_row, extra = divmod(nnz // run, rows)
    fullest = per_row + (extra > 0)
    granule = 8 if run_cols == 1 and cols % 8 == 0 and fullest * 8 <= cols else 1
    row_shift = 1 if run_rows == 1 else 0
    row_begin = _row_begin(rows, per_row, extra, key, indices.device)
    for part in _parts(nnz, DRAWS_AT_ONCE):
        entry = torch.arange(part.start, part.stop, device=indices.device)
        row = torch.searchsorted(row_begin * run, entry, right=True) - 1
        count = row_begin[row + 1] - row_begin[row]
        place = entry - row_begin[row] * run  # in the row of runs, which is run_rows lines of the weight
        line_entries = count * run_cols
        line, place = place // line_entries, place % line_entries
        column = _column(row, count, place // run_cols, granule, cols // granule, key, row_shift)
        indices[part] = ((row * run_rows + line) * cols + column) * run_cols + place % run_cols


@torch.no_grad()
def uniform_indices_(indices: Tensor, numel: int, key: int) -> None:
    """Distinct uniform positions below `numel`: entry `p` is the image of `p` under a keyed permutation."""
    half = 1
    while half < 31 and 1 << (2 * half) < numel:
        half += 1
    for part in _parts(indices.numel(), DRAWS_AT_ONCE):
        drawn = _feistel(torch.arange(part.start, part.stop, device=indices.device), half, key)
        while (outside := drawn >= numel).any():
            drawn[outside] = _feistel(drawn[outside], half, key)
        indices[part] = drawn


def _product(left: Tensor, right: Tensor) -> Tensor:
    """`left.T @ right`; BLAS is faster where the narrower matrix comes first."""
    if right.shape[1] < left.shape[1]:
        return (right.t() @ left).t().contiguous()
    return left.t() @ right


def _parts(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _columns(weight: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """A weight as `[rows, columns, run]`, of which indices number columns; a column has one entry where each has one value."""
    if values.numel() == indices.numel():
        return weight.view(1, -1, 1)
    return weight.view(weight.shape[0], weight.shape[1], -1)


def _set(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    # .data: the write leaves weight's autograd version alone, as a C++ kernel does
    columns = _columns(weight.data, indices, values)
    columns.index_copy_(1, indices.long(), values.view(columns.shape[0], indices.numel(), columns.shape[2]))


def _patched(base: Tensor, delta: Tensor, scale: float) -> Tensor:
    change = delta * scale
    return torch.where(change != 0, (base.to(change.dtype) + change).to(base.dtype), base)


# Streams of the hash, as in csrc/pattern_math.h.
ENTRY, ROW_TURN, EXTRA_ROW, EXTRA_TURN, RESIDUE, FEISTEL = (
    0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0,
)  # fmt: skip
LOW32 = 0xFFFFFFFF


def _mix32(x):
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & LOW32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & LOW32
    return x ^ (x >> 16)


def _hash(key: int, stream: int, a, b):
    h = _mix32((key & LOW32) ^ stream)
    h = _mix32((h + (key >> 32 & LOW32)) & LOW32)
    h = _mix32(h ^ (a & LOW32))
    return _mix32((h + 0x9E3779B9 * b) & LOW32)


def _below(h, n):
    # floor(h * n / 2**32) for h < 2**32 and n <= 2**32, in parts that stay below 2**63
    return ((h >> 16) * n + (((h & 0xFFFF) * n) >> 16)) >> 16


def _stratum_begin(size, parts, s):
    return s * size // parts


def _position(size, parts, s, h):
    begin = _stratum_begin(size, parts, s)
    return begin + _below(h, _stratum_begin(size, parts, s + 1) - begin)


def _row_begin(rows: int, per_row: int, extra: int, key: int, device: torch.device) -> Tensor:
    """`[rows + 1]`: the number of entries before each row; `extra` rows, a stratified draw of their own, have one more."""
    counts = torch.full((rows,), per_row, dtype=torch.int64, device=device)
    if extra:
        s = torch.arange(extra, device=device)
        chosen = _position(rows, extra, s, _hash(key, EXTRA_ROW, s, 0))
        counts[(chosen + _below(_hash(key, EXTRA_TURN, 0, 0), rows)) % rows] += 1
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _column(row: Tensor, count: Tensor, rank: Tensor, granule: int, granules: int, key: int, row_shift: int) -> Tensor:
    """The column of the run of ascending `rank` among the `count` runs of its `row`; a lane owns `2**row_shift` rows."""

    def unturned(s: Tensor) -> Tensor:
        return _position(granules, count, s, _hash(key, ENTRY, row, s))

    turn = _below(_hash(key, ROW_TURN, row, 0), granules)
    edge = granules - turn  # positions from here on wrap to the front of the row
    s = ((edge + 1) * count - 1) // granules
    first_wrapped = torch.where(turn > 0, s + (unturned(s) < edge), count)
    s = (rank + first_wrapped) % count
    column = (unturned(s) + turn) % granules
    if granule == 1:
        return column
    return column * granule + ((row >> row_shift & 7) ^ (_hash(key, RESIDUE, row >> row_shift + 3, rank) & 7))


def _feistel(p: Tensor, half: int, key: int) -> Tensor:
    mask = (1 << half) - 1
    left, right = p >> half & mask, p & mask
    for turn in range(6):
        left, right = right, left ^ (_hash(key, FEISTEL, right, turn) & mask)
    return left << half | right
