"""The problems every operator is tested on, builders of their inputs, float64 oracles, and the one tolerance rule."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from sprand import native  # noqa: F401  native loads the compiled operators
from sprand.kernels import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)


@dataclass(frozen=True)
class Problem:
    """A weight `[rows, cols]` with `nnz` chosen entries, met by `tokens` tokens, and why it is in the table."""

    reason: str
    tokens: int
    rows: int
    cols: int
    nnz: int
    where: str = "anywhere"  # or "first and last", "last", "middle row", "equal rows", "runs of 2x1" (rows x columns)

    def __str__(self) -> str:
        return self.reason.replace(" ", "_")


PROBLEMS = (
    Problem("an ordinary layer", 64, 48, 96, 200),
    Problem("empty", 16, 12, 20, 0),
    Problem("empty weight", 16, 0, 20, 0),
    Problem("no tokens", 0, 12, 20, 30),
    Problem("one token", 1, 24, 40, 50),
    Problem("T not a multiple of 16", 37, 24, 40, 50),
    Problem("more tokens than one token block", 1111, 8, 16, 40),
    Problem("one row", 19, 1, 64, 7),
    Problem("one column", 19, 64, 1, 7),
    Problem("one entry in all", 5, 1, 1, 1),
    Problem("odd sizes", 13, 17, 29, 61),
    Problem("more columns than one column block", 24, 5, 1700, 400),
    Problem("more rows than one row block", 24, 1100, 6, 300),
    Problem("most rows empty", 32, 400, 64, 20),
    Problem("all entries in one row", 32, 9, 70, 70, "middle row"),
    Problem("last index", 32, 31, 33, 1, "last"),
    Problem("first and last index", 32, 31, 33, 2, "first and last"),
    Problem("pairs of rows with the same columns", 70, 24, 40, 60, "runs of 2x1"),
    Problem("fours of rows in more than one group of columns", 33, 12, 3300, 600, "runs of 4x1"),
    Problem("runs of 8 columns", 70, 24, 40, 88, "runs of 1x8"),
    Problem("all rows the same columns", 20, 263, 30, 5 * 263, "equal rows"),
    Problem("density 1", 32, 24, 40, 960),
    Problem("more entries than one thread takes", 6, 150, 200, 20_000),
)

ORDINARY, LARGE = PROBLEMS[0], PROBLEMS[-1]

problem_table = pytest.mark.parametrize("problem", PROBLEMS, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
index_dtypes = pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
implementations = pytest.mark.parametrize("ops", [torch.ops.sprand, reference], ids=["dispatched", "reference"])


RUN_PROBLEMS = (
    (32, 64, 0, (2, 1)),
    (2, 8, 2, (2, 1)),
    (30, 24, 130, (2, 1)),
    (64, 512, 640, (4, 1)),
    (36, 100, 1200, (4, 1)),
    (17, 64, 80, (1, 8)),
    (5, 1024, 5 * 1024, (1, 8)),
    (2**20, 2**10, 4000, (4, 1)),
    (3, 2**29, 4000, (1, 8)),
)
run_problems = pytest.mark.parametrize("rows, cols, nnz, run", RUN_PROBLEMS, ids=str)


def skip_unsupported(device: str, dtype: torch.dtype) -> None:
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is for the CPU")


def make_indices(problem: Problem, index_dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
    """`[nnz]` sorted distinct positions."""
    numel = problem.rows * problem.cols
    if problem.where == "anywhere":
        drawn = torch.randperm(numel, generator=_generator(seed))[: problem.nnz].sort().values
    elif problem.where == "middle row":
        drawn = problem.rows // 2 * problem.cols + torch.arange(problem.nnz)
    elif problem.where == "equal rows":
        columns = torch.randperm(problem.cols, generator=_generator(seed))[: problem.nnz // problem.rows].sort().values
        drawn = (torch.arange(problem.rows)[:, None] * problem.cols + columns).flatten()
    elif problem.where.startswith("runs of "):
        rows, cols = map(int, problem.where.removeprefix("runs of ").split("x"))
        runs = torch.randperm(numel // (rows * cols), generator=_generator(seed))[: problem.nnz // (rows * cols)]
        chosen = torch.zeros(problem.rows // rows, 1, problem.cols // cols, 1, dtype=torch.bool)
        chosen.view(-1)[runs] = True
        drawn = chosen.expand(-1, rows, -1, cols).flatten().nonzero().flatten()
    else:
        drawn = torch.tensor([0, numel - 1][-problem.nnz :])
    return drawn.to(device, index_dtype)


def make_sddmm(
    problem: Problem, dtype: torch.dtype, index_dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """`grad_output [T, out]`, `input [T, in]`, `indices [nnz]`."""
    grad_output = _normal((problem.tokens, problem.rows), dtype, device, seed + 1)
    input = _normal((problem.tokens, problem.cols), dtype, device, seed + 2)
    return grad_output, input, make_indices(problem, index_dtype, device, seed)


def make_embedding(
    problem: Problem, dtype: torch.dtype, index_dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """`grad_output [T, features]`, `tokens [T]`, `indices [nnz]`: every third token is the same, the rest are drawn."""
    grad_output = _normal((problem.tokens, problem.cols), dtype, device, seed + 6)
    tokens = torch.randint(max(problem.rows, 1), (problem.tokens,), generator=_generator(seed + 7))
    tokens[::3] = problem.rows // 2
    return grad_output, tokens.to(device), make_indices(problem, index_dtype, device, seed)


@dataclass
class Entries:
    """A weight and what belongs to its chosen entries; `delta` is zero at every fifth entry."""

    weight: Tensor
    indices: Tensor
    base: Tensor
    delta: Tensor


def make_entries(problem: Problem, dtype: torch.dtype, index_dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Entries:
    """A weight away from `base` at the chosen entries, as after some training."""
    weight = _normal((problem.rows, problem.cols), dtype, device, seed + 3)
    indices = make_indices(problem, index_dtype, device, seed)
    base = _normal((problem.nnz,), dtype, device, seed + 4)
    delta = _normal((problem.nnz,), sum_dtype(dtype), device, seed + 5)
    delta[::5] = 0
    return Entries(weight, indices, base, delta)


@dataclass
class AdamWProblem:
    """The lists of `sparse_adamw_`, the gradients `[step][target]` of several steps, and what they were made from."""

    problems: tuple[Problem, ...]
    seed: int
    weights: list[Tensor] = field(default_factory=list)
    indices: list[Tensor] = field(default_factory=list)
    bases: list[Tensor] = field(default_factory=list)
    deltas: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    grads: list[list[Tensor]] = field(default_factory=list)


def make_adamw(
    problems: Sequence[Problem], dtype: torch.dtype, index_dtype: torch.dtype, device: str = "cpu", steps: int = 3, seed: int = 0
) -> AdamWProblem:
    """Targets at the start of training (delta and moments zero), one for each problem, and gradients for some steps."""
    made = AdamWProblem(tuple(problems), seed, grads=[[] for _ in range(steps)])
    for number, problem in enumerate(problems):
        entries = make_entries(problem, dtype, index_dtype, device, seed + 100 * number)
        made.weights.append(entries.weight)
        made.indices.append(entries.indices)
        made.bases.append(entries.base)
        for values in (made.deltas, made.exp_avgs, made.exp_avg_sqs):
            values.append(torch.zeros_like(entries.delta))
        made.steps.append(torch.zeros((), device=device))
        made.scales.append((1.0, 0.5, -2.0)[number % 3])
        for step in range(steps):
            made.grads[step].append(_normal((problem.nnz,), sum_dtype(dtype), device, seed + 100 * number + 10 + step))
    return made


def oracle_sddmm_dense(grad_output: Tensor, input: Tensor) -> Tensor:
    """The whole gradient `[out, in]` in float64."""
    return torch.einsum("to,ti->oi", grad_output.double(), input.double())


def oracle_embedding_dense(grad_output: Tensor, tokens: Tensor, rows: int, padding_idx: int | None = None) -> Tensor:
    """The whole gradient `[rows, features]` of an embedding in float64, as a product with the tokens' one-hot rows."""
    chosen = tokens[:, None] == torch.arange(rows, device=tokens.device)
    if padding_idx is not None:
        chosen[:, padding_idx] = False
    return chosen.double().T @ grad_output.double()


def plain_embedding_dense(grad_output: Tensor, tokens: Tensor, rows: int) -> Tensor:
    """PyTorch's dense gradient in float32, where sums are kept in any case."""
    return torch.ops.aten.embedding_dense_backward(grad_output.float(), tokens, rows, -1, False)


def check_sddmm(result: Tensor, grad_output: Tensor, input: Tensor, indices: Tensor, tensor_cores: bool = False) -> None:
    """The chosen part of the float64 gradient, as near as PyTorch's float32 product of the same numbers: sums are kept in it.

    With `tensor_cores`, as near as PyTorch's product of the 16-bit numbers on a GPU: tensor cores keep sums in float32 too, but
    cut them off at each step of 16 tokens instead of rounding.
    """
    assert result.dtype == sum_dtype(input.dtype)
    assert result.shape == indices.shape
    oracle = oracle_sddmm_dense(grad_output, input)
    if tensor_cores and input.element_size() == 2:
        plain = torch.mm(grad_output.T, input, out_dtype=torch.float32)
    else:
        plain = grad_output.float().T @ input.float()
    assert_within(result, oracle.flatten()[indices.long()], tolerance(plain, oracle, result.dtype))


def oracle_patch(entries: Entries, scale: float) -> Tensor:
    """The weight after `patch_`, in float64."""
    return _put(entries, entries.base.double() + scale * entries.delta.double())


def oracle_scatter_add(entries: Entries, scale: float) -> Tensor:
    """The weight after `scatter_add_all_` of `delta`, in float64."""
    where = torch.unravel_index(entries.indices.long(), entries.weight.shape)
    return entries.weight.double().index_put(where, scale * entries.delta.double(), accumulate=True)


def plain_patch(entries: Entries, scale: float) -> Tensor:
    """What one writes in PyTorch, in the dtype of the weight (float32 for float64, see `tolerance`)."""
    dtype = plain_dtype(entries.base.dtype)
    return _put(entries, entries.base.to(dtype) + scale * entries.delta.to(dtype))


def plain_scatter_add(entries: Entries, scale: float) -> Tensor:
    """What one writes in PyTorch, in the dtype of the weight (float32 for float64, see `tolerance`)."""
    dtype = plain_dtype(entries.base.dtype)
    where = torch.unravel_index(entries.indices.long(), entries.weight.shape)
    return entries.weight.to(dtype).index_put(where, (scale * entries.delta).to(dtype), accumulate=True)


def adamw_on_dense(made: AdamWProblem, dtype: torch.dtype, coef: float = 1.0, **options) -> list[dict[str, Tensor]]:
    """`torch.optim.AdamW` on dense tensors of the weights' shapes, read at the chosen entries: the oracle in float64."""
    return _adamw_on_dense(made.problems, len(made.grads), made.seed, dtype, coef, tuple(options.items()))


@functools.cache
def _adamw_on_dense(problems, steps, seed, dtype, coef, options) -> list[dict[str, Tensor]]:
    made = make_adamw(problems, torch.float64, torch.int64, steps=steps, seed=seed)
    dense = [torch.nn.Parameter(torch.zeros(weight.shape, dtype=dtype)) for weight in made.weights]
    optimizer = torch.optim.AdamW(dense, **dict(options))
    for grads in made.grads:
        for parameter, index, grad in zip(dense, made.indices, grads, strict=True):
            parameter.grad = torch.zeros_like(parameter)
            parameter.grad.view(-1)[index] = coef * grad.to(dtype)
        optimizer.step()
    read = {"delta": lambda parameter: parameter.detach()}
    read |= {name: lambda parameter, name=name: optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")}
    return [
        {name: values(parameter).flatten()[index] for name, values in read.items()}
        for parameter, index in zip(dense, made.indices, strict=True)
    ]


def tolerance(plain: Tensor, oracle: Tensor, dtype: torch.dtype, roundings: int = 1) -> float:
    """Twice the error of plain PyTorch against the float64 oracle, and one rounding of a result in `dtype` (one per step).

    A float64 oracle cannot judge PyTorch's float64; there `plain` is float32, and its error is scaled to float64.
    """
    if oracle.numel() == 0:
        return 0.0
    eps = torch.finfo(dtype).eps
    error = (plain.double() - oracle).abs().max().item() * (eps / torch.finfo(plain.dtype).eps if dtype == torch.float64 else 1)
    return 2 * error + roundings * eps * oracle.abs().max().item()


def assert_within(actual: Tensor, oracle: Tensor, limit: float) -> None:
    """`actual` is finite and nowhere further than `limit` from `oracle`."""
    oracle = oracle.to(actual.device)
    assert actual.shape == oracle.shape
    error = (actual.double() - oracle).abs().max().item() if oracle.numel() else 0.0
    assert math.isfinite(error) and error <= limit, f"error {error:.3g}, allowed {limit:.3g}"


def bits(tensor: Tensor) -> Tensor:
    """The bit pattern, so that equality sees the sign of zero and the payload of NaN."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def guarded(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A contiguous copy of `tensor` with 64 NaN before and behind it in memory, and that whole memory."""
    memory = tensor.new_full((tensor.numel() + 128,), math.nan)
    memory[64 : 64 + tensor.numel()] = tensor.flatten()
    return memory[64 : 64 + tensor.numel()].view(tensor.shape), memory


def guards_hold(memory: Tensor) -> bool:
    """Whether the NaN around a guarded tensor are still there."""
    return bool(memory[:64].isnan().all() and memory[-64:].isnan().all())


def plain_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which plain PyTorch is measured, see `tolerance`."""
    return torch.float32 if dtype == torch.float64 else dtype


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, deltas and moments that goes with a weight of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _put(entries: Entries, values: Tensor) -> Tensor:
    where = torch.unravel_index(entries.indices.long(), entries.weight.shape)
    return entries.weight.to(values.dtype).index_put(where, values)


def _normal(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    return torch.randn(shape, generator=_generator(seed)).to(device, dtype)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
